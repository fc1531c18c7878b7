"""Which experts look as if they were made from another base: nothing refuses them, and merges with them score badly."""

import re
from collections.abc import Mapping
from pathlib import Path

from sensmerge.tasks.artifacts import load_object
from sensmerge.tasks.checkpoints.kinship import kinship
from sensmerge.tasks.checkpoints.listing import HubModel, Listing
from sensmerge.tasks.checkpoints.weights import ExpertWeights
from sensmerge.tasks.networks.adapter_config import ADAPTER_CONFIG

FAR = 0.1
"""Cosine of weights below which an expert is said to be of another base; fine-tunes have 0.9 and more, as a rule."""
WAY_OUT = "merges with it will score badly: name the base that it was made from, or leave the expert out"
_REPOSITORY = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)
_QUANTISED = re.compile(r"((-unsloth)?-bnb)?-[48]bit$|-(gptq|awq|fp8)\b.*$")
"""What follows a model's name in that of a quantised copy, on which adapters are trained."""


def other_bases(experts: Mapping[str, ExpertWeights], listings: Mapping[str, Listing]) -> dict[str, str]:
    """Return a line for each expert that looks as if it was made from another base, by its name.

    Args:
        experts: matched with the base.
        listings: of base and experts by name.
    """
    adapters = {name: listings[name] for name, one in experts.items() if one.low_rank}
    return _by_weights(experts) | _by_name(listings["base"], adapters)


def _by_weights(experts: Mapping[str, ExpertWeights]) -> dict[str, str]:
    found = {name: kinship(one) for name, one in experts.items()}
    return {
        name: f"experts.{name} looks like a fine-tune of another base: its weights have a cosine of {near[0]:z.2f} "
        f"with the base's (the median of {near[1]} matrices; a fine-tune of the base has nearly 1); {WAY_OUT}"
        for name, near in found.items()
        if near is not None and near[0] < FAR
    }


def _by_name(base: Listing, adapters: Mapping[str, Listing]) -> dict[str, str]:
    """Return a line for each adapter that names another base on the hub than the recipe, or than another adapter."""
    source = base.source
    expected = f"the base is {source.repo}" if isinstance(source, HubModel) else ""
    known = _plain_name(source.repo) if isinstance(source, HubModel) else None
    found = {}
    for name, listing in adapters.items():
        stated = _stated_base(listing.folder / ADAPTER_CONFIG)
        if stated is None:
            continue
        if known is None:
            known, expected = _plain_name(stated), f"experts.{name} for {stated}"
        elif _plain_name(stated) != known:
            found[name] = (
                f"experts.{name}: its {ADAPTER_CONFIG} says that it was made for {stated}, and {expected}; if these "
                f"are different networks, {WAY_OUT}"
            )
    return found


def _stated_base(config: Path) -> str | None:
    """Return the repository that an adapter says it was made for; None where it names none."""
    stated = load_object(config).get("base_model_name_or_path")
    return stated if isinstance(stated, str) and _REPOSITORY.fullmatch(stated) else None


def _plain_name(repository: str) -> str:
    """Return a name that copies of a repository share, those of other owners and quantised ones."""
    return _QUANTISED.sub("", repository.rpartition("/")[2].lower())
