"""How a recipe's models changed since they were last used, and which steps depend on that."""

from typing import Any

from rich.filesize import decimal

from sensmerge.pipeline.plan.plan import Plan
from sensmerge.pipeline.plan.step import Step
from sensmerge.tasks.artifacts import read_json
from sensmerge.tasks.checkpoints.listing import HubModel, ListedFile, Listing
from sensmerge.tasks.stages.download import listed_files


def model_changes(plan: Plan) -> list[str]:
    """Return a line for every model whose files are not those of its last artifact: what changed, and what it costs.

    `math: main moved 1a2b3c4 → 9f8e7d6; 9 of 31 steps depend on it, and read 2.1 of 14.0 GB`: of all steps those that
    run.
    """
    lines = []
    every = sum(step.reads for step in plan.steps)
    for name, listing in plan.inputs.listings.items():
        step = plan.step("download", name)
        last = plan.store.last(step.key) if step.title in plan.todo else None
        if last is None or last == plan.store.folder(step.key):  # new, or only to be fetched again
            continue
        following = [one for one in dependents(plan, step) if one.title in plan.todo]
        reads = decimal(sum(one.reads for one in following))
        lines.append(
            f"{name}: {_difference(read_json(last / 'files.json'), listing)}; "
            f"{len(following)} of {len(plan.steps)} steps depend on it, and read {reads} of {decimal(every)}"
        )
    return lines


def dependents(plan: Plan, step: Step) -> list[Step]:
    """Return a step and all that need it, directly or through others, in the plan's order."""
    titles = {step.title}
    found = []
    for one in plan.steps:
        if one.title in titles or titles & set(one.needs):
            titles.add(one.title)
            found.append(one)
    return found


def _difference(last: dict[str, Any], listing: Listing) -> str:
    """Say what differs between `files.json` of a model's artifact and its files now."""
    if isinstance(listing.source, HubModel) and last["revision"] not in (None, listing.revision):
        return f"{listing.source.revision} moved {last['revision'][:7]} → {str(listing.revision)[:7]}"
    before = {file.name: file for file in listed_files(last)}
    now = {file.name: file for file in listing.files}
    changed = [name for name in {**before, **now} if _differ(before.get(name), now.get(name))]
    if not changed:
        return "digests are of another kind now"
    return f"{len(changed)} of {len({**before, **now})} files changed"


def _differ(one: ListedFile | None, other: ListedFile | None) -> bool:
    """Return whether two files are known to differ; of digests of two kinds it cannot be told."""
    if one is None or other is None or one.size != other.size:
        return True
    is_comparable = one.digest.partition(":")[0] == other.digest.partition(":")[0]
    return is_comparable and one.digest != other.digest
