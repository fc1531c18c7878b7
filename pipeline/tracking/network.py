"""What a merged folder is to whoever asks it: told by classes of transformers, and kept, since these take seconds."""

from dataclasses import dataclass
from pathlib import Path

from sensmerge.pipeline.plan.kept import program
from sensmerge.pipeline.store.facts import find_fact, keep_fact
from sensmerge.tasks.artifacts import canonical, sha256_file, sha256_text
from sensmerge.tasks.checkpoints.companions import CONFIG
from sensmerge.tasks.checkpoints.weights import HEADS
from sensmerge.tasks.networks.pictures import Reads
from sensmerge.tasks.serving.form import Form

NETWORKS = "networks"
"""Kind of fact."""


@dataclass(frozen=True)
class MergedNetwork:
    """What a static merge is."""

    form: Form | None
    """None where it is no model that answers texts or pictures"""
    is_known: bool
    """whether a class of transformers reads it"""
    reads: Reads
    """what it answers, if it answers"""


def network_of(folder: Path) -> MergedNetwork:
    """Return what the static merge in a folder is, which its config and those of its heads tell.

    Raises:
        InputError: transformers has the class, but its config is not in order.
    """
    configs = [path for path in (folder / CONFIG, *sorted((folder / HEADS).glob(f"*/{CONFIG}"))) if path.is_file()]
    digests = {str(path.relative_to(folder)): sha256_file(path) for path in configs}
    name = sha256_text(canonical([digests, program()]))
    found = find_fact(NETWORKS, name, MergedNetwork)
    if found is None:
        from sensmerge.tasks.networks.known import why_unknown  # transformers takes seconds
        from sensmerge.tasks.serving.static_model import form_of, reads_of

        form, is_known = form_of(folder), why_unknown(folder) is None
        found = MergedNetwork(form, is_known, "texts" if form is None else reads_of(folder, folder))
        if is_known:  # else a package that reads it may be installed tomorrow
            keep_fact(NETWORKS, name, found)
    return found
