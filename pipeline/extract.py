"""What `extract` does: a fine-tune as a LoRA adapter in a folder, with the error that it makes beside it."""

import shutil
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from sensmerge.pipeline.plan.adapters import base_of
from sensmerge.tasks.artifacts import partial_of, write_json
from sensmerge.tasks.checkpoints.listing import Listing, parse_model_id
from sensmerge.tasks.checkpoints.source import fetch_files, resolve
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.adapter_files import write_adapter
from sensmerge.tasks.networks.base import open_base
from sensmerge.tasks.networks.expert import open_expert
from sensmerge.tasks.networks.extraction import Extracted, ExtractedPart, extract

ERRORS = "errors.json"
"""Beside an extracted adapter: what it lacks of the fine-tune, by tensor and in all."""


def parse_rank(text: str) -> float:
    """Read a rank: a whole number from 1 on, or a share above 0 and below 1.

    Raises:
        InputError: it is neither.
    """
    try:
        rank = float(text)
    except ValueError:
        rank = 0.0
    if 0 < rank < 1 or (rank >= 1 and rank.is_integer()):
        return rank
    raise InputError(
        f"--rank {text}: expected a whole number from 1 on, or below 1 the share of each task vector's squared norm to "
        "keep"
    )


def extract_adapter(
    models: tuple[str, str], rank: float, whole: bool, target: Path, cache: Path, console: Console
) -> None:
    """Write a fine-tune as an adapter to a folder, and print what it lacks.

    Args:
        models: base and fine-tune: folders, or `hub:ORG/NAME@REVISION`.
        rank: see `parse_rank`.
        whole: whether what no factors can hold is stored whole where peft can load it.
        target: folder to make.
        cache: of the hub.
        console: where it is printed.

    Raises:
        InputError: the folder exists, the models do not fit each other, or as `extract`.
    """
    if target.exists():
        raise InputError(f"-o {target}: exists; name a folder that does not")
    if not target.absolute().parent.is_dir():
        raise InputError(f"-o {target}: folder {target.absolute().parent} does not exist; make it first")
    listings = {name: _fetched(text, cache) for name, text in zip(("base", "expert"), models, strict=True)}
    base = open_base(listings["base"].folder)
    expert = open_expert(listings["expert"].folder, base, "expert")
    if expert.base.untied and not base.untied:
        raise InputError(f"{models[1]}: changes one of two parameters that the base ties; no adapter can hold that")
    for note in (*base.notes, *expert.notes):
        console.print(note, highlight=False, soft_wrap=True)

    def said(name: str, part: ExtractedPart) -> None:
        if part.rank:
            console.print(
                f"{name}: rank {part.rank}, error {part.error / part.norm:.3g}", highlight=False, soft_wrap=True
            )

    found = extract(expert, rank, base_of(listings["base"]), whole, said)
    _write(found, sorted(expert.head), target)
    for line in summary(found, sorted(expert.head)):
        console.print(line, highlight=False, soft_wrap=True)


def summary(found: Extracted, head: list[str]) -> list[str]:
    """Return what is to be said of an adapter: what it leaves out, what it stores whole, and its error.

    Args:
        found: the adapter.
        head: parameters of a head that the fine-tune has for itself.
    """
    lines = [
        f"{name}: {'' if part.error == 0 else 'left out: '}{part.why}, {found.share(part):.2%} of the change"
        for name, part in found.parts.items()
        if not part.rank
    ]
    lines += [f"{name}: left out: it is of a head that the base does not have" for name in head]
    size = sum(tensor.nbytes for tensor in found.tensors.values())
    return [*lines, f"the adapter has {size / 1e6:,.1f} MB and lacks {found.error:.3g} of the change (relative norm)"]


def _fetched(text: str, cache: Path) -> Listing:
    listing = resolve(parse_model_id(text, Path()), cache)
    fetch_files(listing, [file.name for file in listing.files], cache)
    return listing


def _write(found: Extracted, head: list[str], target: Path) -> None:
    """Write all files beside the target, and rename the folder into place."""
    partial = partial_of(target)
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        partial.mkdir()
        write_adapter(partial, found.tensors, found.config)
        tensors = {
            name: {"share": found.share(part), "relative_error": part.error / part.norm, **asdict(part)}
            for name, part in found.parts.items()
        }
        write_json(partial / ERRORS, {"relative_error": found.error, "tensors": tensors, "left_out_head": head})
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
