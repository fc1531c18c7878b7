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
from sensmerge.tasks.networks.networks import Head, computation_digest


@dataclass
class _Asked:
    """What a recipe asks of networks of one kind."""

    config: PretrainedConfig
    folder: Path
    head: Head
    generating: list[str] = field(default_factory=list)
    """tasks that have them generate"""


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
        key, way_out = f"tasks.{''.join(asked.generating[:1])}.generate", "set it to 0"
        if statistics or recipe.calibrated_variants():
            key, way_out = _measured_for(recipe)
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


def _measured_for(recipe: Recipe) -> tuple[str, str]:
    """Return the key of a recipe for which experts run on calibration sets, and what to do where they cannot."""
    for name in recipe.sens_variants():
        return f"merges.{name}.coefficients", "use other coefficients than sens"
    for name, variant in recipe.merges.items():
        if variant.method.statistics:
            return f"merges.{name}.method", "use another method"
    return f"merges.{recipe.calibrated_variants()[0]}.calibrate", "leave it out"


def _asked(recipe: Recipe, inputs: Inputs) -> list[_Asked]:
    """Return what is asked of each kind of network, without those of which nothing is."""
    found: dict[tuple[Head, str], _Asked] = {}
    for name, task in recipe.tasks.items():
        generates = task.answer_tokens > 0 and bool(inputs.data[name].evaluation)
        if not (generates or wanted_statistics(recipe) or recipe.calibrated_variants()):
            continue
        expert = inputs.networks.experts[name]
        asked = _Asked(expert.config, expert.folder, task.head)
        asked = found.setdefault((task.head, computation_digest(expert.config)), asked)
        asked.generating += [name] * generates
    return list(found.values())


@contextmanager
def _refused(key: str, way_out: str) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"{key}: {error}; {way_out}") from error
