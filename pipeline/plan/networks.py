"""The networks of a recipe with tasks: what is asked of them, and the rows that they read."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from sensmerge.pipeline.plan.dry_run import inseparable_heads, try_networks
from sensmerge.pipeline.plan.few import few_rows
from sensmerge.pipeline.plan.inputs import Inputs
from sensmerge.pipeline.plan.kinds import check_kinds
from sensmerge.pipeline.plan.opened import Opened
from sensmerge.pipeline.plan.placement import PlacementChoice, choose
from sensmerge.pipeline.plan.rows import RowUse, TaskRows, Tuning, gather_rows
from sensmerge.pipeline.plan.seen import Tokenizer
from sensmerge.pipeline.plan.statistics import takes_losses, wanted_statistics
from sensmerge.pipeline.plan.step import Resolved
from sensmerge.pipeline.recipe.schema import Recipe
from sensmerge.pipeline.recipe.stage import Stage
from sensmerge.pipeline.recipe.variant import Variant
from sensmerge.tasks.dynamic.application import SeApplication
from sensmerge.tasks.dynamic.network import trunk_blocks
from sensmerge.tasks.dynamic.parameters import holdings
from sensmerge.tasks.dynamic.trial import try_network
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.methods.settings import WIDENED, combinations
from sensmerge.tasks.networks.base import Base
from sensmerge.tasks.networks.expert import Expert
from sensmerge.tasks.networks.networks import load_tokenizer, skeleton, trunk_name
from sensmerge.tasks.networks.readers import load_reader
from sensmerge.tasks.stages import cross_task


def gather_data(recipe: Recipe, opened: Opened, folder: Path) -> tuple[dict[str, TaskRows], list[str]]:
    """Resolve the rows of a recipe's tasks, and check what networks, configs and rows tell.

    Args:
        recipe: the recipe.
        opened: its models, from `open_models`.
        folder: what its relative paths are relative to.

    Returns:
        Rows by task, and what a user should know of networks and rows: a line each.

    Raises:
        InputError: a task or variant that the networks cannot do, rows that do not fit their task.
    """
    base, tokenizer = opened.base, opened.tokenizer
    assert isinstance(base, Base), "tasks of models without networks are refused"
    experts = {name: one for name, one in opened.experts.items() if isinstance(one, Expert)}
    check_kinds(recipe.tasks, experts)
    notes = []
    for name, variant in recipe.merges.items():
        if isinstance(variant.application, SeApplication):
            notes += _check_application(f"merges.{name}.application", variant, recipe, base, experts)
    notes += opened.about_tokenizer
    readers = _readers(recipe, tokenizer)
    use = RowUse(bool(recipe.se_variants()), _tuning(recipe), takes_losses(recipe))
    data, said = gather_rows(recipe.tasks, experts, readers, folder, use)
    return data, [*notes, *said, *few_rows(data), *_tuning_passes(recipe, data)]


def with_networks(resolved: Resolved) -> Resolved:
    """Return a recipe with tasks as it is run: where its networks run, and what tiny ones say of them.

    Raises:
        InputError: what `choose` and `try_networks` raise.
    """
    recipe, inputs = resolved.recipe, resolved.inputs
    placements = _placements(recipe, inputs)
    inputs = replace(inputs, notes=(*inputs.notes, *try_networks(recipe, inputs, placements)))
    return replace(resolved, inputs=inputs, placements=placements, inseparable=inseparable_heads(recipe, inputs))


def _placements(recipe: Recipe, inputs: Inputs) -> dict[Stage, PlacementChoice]:
    if not wanted_statistics(recipe):
        return {}
    longest = max(one.longest_calibration for one in inputs.data.values())
    tokens: dict[Stage, int] = {"statistics": longest}
    if recipe.sens_variants():
        together = cross_task.PICTURES if recipe.reads == "pictures" else 1
        tokens["cross_task"] = max(together * longest, cross_task.CHUNK_TOKENS)
    return {stage: choose(recipe, stage, inputs.networks.base, count, decimal) for stage, count in tokens.items()}


def _readers(recipe: Recipe, tokenizer: Tokenizer) -> dict[str, list[Any]]:
    """Return what reads each task: its expert's tokenizer, if that is another, and that of merged models."""
    tasks = recipe.tasks
    merged = load_reader(tokenizer.folder, recipe.reads)
    own = {name: load_tokenizer(one.folder) for name, one in tokenizer.readers.items() if name in tasks}
    return {name: [own[name], merged] if name in own else [merged] for name in tasks}


def _tuning(recipe: Recipe) -> Tuning:
    """Return what is tuned: how good a variant is cannot be told by the rows that it was made of."""
    splits = {recipe.merges[name].tuning_split for name in recipe.tuned_variants()}
    return "apart" if "held_out" in splits else "on_calibration" if splits else "none"


def _tuning_passes(recipe: Recipe, data: Mapping[str, TaskRows]) -> list[str]:
    """Return a line for each variant that is tuned: what is run for it at most."""
    lines = []
    for name in recipe.tuned_variants():
        variant = recipe.merges[name]
        rows = sum(len(getattr(one, variant.tuning_split)) for one in data.values())
        asked = len(combinations(variant.grid(), variant.default()))
        most = asked + WIDENED * len(variant.tune)
        lines.append(
            f"merges.{name}.tune: {asked} candidates, {most} if the best is at the end of a grid, answer "
            f"{rows} rows each: {asked * rows:,} to {most * rows:,} samples, beside those of the experts"
        )
    return lines


def _check_application(
    key: str, variant: Variant, recipe: Recipe, base: Base, experts: Mapping[str, Expert]
) -> list[str]:
    """Check that the network can be run with coefficients per sample, and has the layer that the route looks at.

    Returns:
        What a user should know of it.
    """
    application, is_calibrated = variant.application, variant.calibrate is not None
    assert isinstance(application, SeApplication)
    head = next(task.head for task in recipe.tasks.values())  # all tasks have one: the schema refuses others
    config = next((expert.config for expert in experts.values() if expert.head), base.config)
    network = skeleton(config, head, base.folder)
    _check_heads(key, trunk_name(network), experts)
    changed = [
        name
        for holding in holdings(base, network)
        if is_calibrated or any(one.touches(tensor) for one in experts.values() for tensor in holding.tensors)
        for name in holding.parameters.values()
    ]
    trial = try_network(config, network, changed, key)
    blocks = len(trunk_blocks(network))
    if application.layer != "auto" and not 1 <= application.layer <= blocks:
        raise InputError(f"{key}.layer is {application.layer}; the model has {blocks} blocks, 1 to {blocks}")
    return trial.notes(network, key)


def _check_heads(key: str, trunk: str, experts: Mapping[str, Expert]) -> None:
    """Check that the experts share one trunk, and that each has a head of its own or none has."""
    lacking = [name for name, expert in experts.items() if not expert.head]
    for name, expert in experts.items():
        own = [parameter for parameter in expert.head if parameter.startswith(f"{trunk}.")]
        if own:
            raise InputError(
                f"{key}: experts.{name} has {own[0]}, which the base lacks, as one that was saved without a pooler "
                "does; take a base that has it, or application: {kind: static}, which keeps each expert's own in heads/"
            )
        if expert.head and lacking:
            raise InputError(
                f"{key}: experts.{name} has its own head, but the head of experts.{lacking[0]} is merged; "
                "use application: {kind: static}"
            )
