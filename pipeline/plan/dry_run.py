"""What a recipe asks of its networks, tried on tiny ones before anything is run."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PretrainedConfig

from sensmerge.pipeline.plan.inputs import Inputs
from sensmerge.pipeline.plan.placement import PlacementChoice
from sensmerge.pipeline.plan.statistics import wanted_statistics
from sensmerge.pipeline.recipe.schema import Recipe
from sensmerge.pipeline.recipe.stage import Stage
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.dry_run import stand_in
from sensmerge.tasks.networks.expert import Expert
from sensmerge.tasks.networks.networks import Head, computation_digest, reads_images

_STATIC = "use application: {kind: static}"


@dataclass
class _Asked:
    """What a recipe asks of networks of one kind."""

    config: PretrainedConfig
    folder: Path
    head: Head
    generating: list[str] = field(default_factory=list)
    """tasks that have them generate"""
    reading: list[str] = field(default_factory=list)
    """tasks that have them read texts alone, though they also read images, or make a decoder's inputs of labels"""
    detached: bool = False
    """whether heads of experts answer on what a trunk of mixed weights gives"""


def try_networks(recipe: Recipe, inputs: Inputs, placements: Mapping[Stage, PlacementChoice]) -> tuple[str, ...]:
    """Check on tiny networks that those of a recipe can do what it asks: statistics, distances, parts, generation, …

    It takes a fraction of a second for each kind of network, whatever its size, and none if nothing of this is asked.

    Args:
        recipe: the recipe.
        inputs: its models.
        placements: where networks run, from `choose`; none where nothing is measured.

    Returns:
        A line for each kind of network of which no tiny one can be made.

    Raises:
        InputError: a network that cannot do it; it names the recipe's key and a way out.
    """
    notes = []
    statistics = wanted_statistics(recipe)
    in_parts = any(one.placement != "whole" for one in placements.values())
    for asked in _asked(recipe, inputs):
        key, way_out = _asked_for(recipe, asked)
        for name in recipe.calibrated_variants()[:1] if asked.head == "seq2seq_lm" else ():
            raise InputError(
                f"merges.{name}.calibrate: fits block after block, and the blocks of {asked.folder} are an encoder's "
                "and a decoder's; leave it out"
            )
        with TemporaryDirectory(prefix="sensmerge-") as scratch:
            with _refused(key, way_out):
                tiny = stand_in(asked.config, asked.head, asked.folder, Path(scratch))
            if tiny is None:
                notes.append(
                    f"{asked.folder}: no small network can be made from its config, so the recipe was not tried on one"
                )
                continue
            if statistics:
                with _refused(key, way_out):
                    tiny.check_statistics(statistics)
                    if recipe.sens_variants():
                        tiny.check_head()
            for name in recipe.se_variants()[:1] if asked.detached else ():
                with _refused(f"merges.{name}.application", _STATIC):
                    tiny.check_head()
            if in_parts:
                with _refused("placement", f"set placement: whole, or {way_out}"):
                    tiny.check_parts(statistics)
            for name in recipe.calibrated_variants()[:1]:
                with _refused(f"merges.{name}.calibrate", "leave it out"):
                    tiny.check_calibration()
            for name in asked.generating:
                with _refused(f"tasks.{name}.generate", "set it to 0"):
                    tiny.check_generation()
    return tuple(notes)


def inseparable_heads(recipe: Recipe, inputs: Inputs) -> frozenset[str]:
    """Return the tasks on which no head of an expert can be run apart from its trunk, as far as a tiny one tells.

    Some networks tell their trunk what their head will look at. With sens coefficients `try_networks` refuses these.
    """
    found: dict[tuple[Head, str], bool] = {}
    tasks = set()
    for name, task in recipe.tasks.items() if not recipe.sens_variants() else ():
        expert = inputs.networks.experts[name]
        if task.has_own_head and expert.head and inputs.data[name].evaluation:
            ending = (task.head, computation_digest(expert.config))
            if ending not in found:
                found[ending] = _is_separable(expert, task.head)
            tasks |= set() if found[ending] else {name}
    return frozenset(tasks)


def _is_separable(expert: Expert, head: Head) -> bool:
    with TemporaryDirectory(prefix="sensmerge-") as scratch:
        try:
            tiny = stand_in(expert.config, head, expert.folder, Path(scratch))
            if tiny is not None:
                tiny.check_head()
        except InputError:
            return False
    return tiny is not None


def _asked_for(recipe: Recipe, asked: _Asked) -> tuple[str, str]:
    """Return the key of a recipe for which a network has to do what it is asked, and what to do where it cannot."""
    for name in recipe.sens_variants():
        return f"merges.{name}.coefficients", "use other coefficients than sens"
    for name, variant in recipe.merges.items():
        if variant.method.statistics:
            return f"merges.{name}.method", "use another method"
    for name in recipe.calibrated_variants():
        return f"merges.{name}.calibrate", "leave it out"
    for name in asked.reading:
        return f"tasks.{name}.kind", "leave the task out"
    for name in asked.generating:
        return f"tasks.{name}.generate", "set it to 0"
    return f"merges.{recipe.se_variants()[0]}.application", _STATIC


def _asked(recipe: Recipe, inputs: Inputs) -> list[_Asked]:
    """Return what is asked of each kind of network, without those of which nothing is."""
    found: dict[tuple[Head, str], _Asked] = {}
    for name, task in recipe.tasks.items():
        expert = inputs.networks.experts[name]
        generates = task.answer_tokens > 0 and bool(inputs.data[name].evaluation)
        detached = task.has_own_head and bool(expert.head and recipe.se_variants())
        reads = task.head == "seq2seq_lm" or (task.head == "causal_lm" and reads_images(expert.config))
        if not (generates or detached or reads or wanted_statistics(recipe) or recipe.calibrated_variants()):
            continue
        asked = _Asked(expert.config, expert.folder, task.head)
        asked = found.setdefault((task.head, computation_digest(expert.config)), asked)
        asked.generating += [name] * generates
        asked.reading += [name] * reads
        asked.detached |= detached
    return list(found.values())


@contextmanager
def _refused(key: str, way_out: str) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"{key}: {error}; {way_out}") from error
