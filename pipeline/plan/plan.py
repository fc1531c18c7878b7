"""From a recipe to a plan: RUN or SKIP for every step, and why."""

import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal
from rich.table import Table

from sensmerge.pipeline.plan.gather import gather_inputs
from sensmerge.pipeline.plan.idle import without_idle
from sensmerge.pipeline.plan.models import is_lost
from sensmerge.pipeline.plan.step import Resolved, Step
from sensmerge.pipeline.plan.steps import lay_out
from sensmerge.pipeline.plan.table import StepRow, step_table
from sensmerge.pipeline.recipe.schema import Recipe
from sensmerge.pipeline.recipe.stage import Stage
from sensmerge.pipeline.store.freed import FREED, is_freed
from sensmerge.pipeline.store.store import Key, Store
from sensmerge.tasks.checkpoints.listing import Listing
from sensmerge.tasks.errors import InputError


@dataclass(frozen=True)
class Plan(Resolved):
    """All steps of a recipe, in an order in which each comes after those it needs."""

    steps: tuple[Step, ...]
    makers: Mapping[str, str]
    """title → title of the step that makes it: its own, or that of a variant that is made the same way"""
    todo: Mapping[str, str]
    """title → why, of the steps that the store lacks"""
    undecided: Collection[str] = ()
    """titles of the steps that are in the store or not, which only digests tell that nobody has computed yet"""

    def step(self, stage: Stage, name: str) -> Step:
        """Return the step that makes something."""
        title = self.makers[f"{stage} {name}"]
        return next(step for step in self.steps if step.title == title)

    def names(self, stage: Stage) -> list[str]:
        """Return the names of all that a stage makes, in the plan's order."""
        return [title.removeprefix(f"{stage} ") for title in self.makers if title.startswith(f"{stage} ")]

    def keys(self) -> list[Key]:
        """Return what names the artifacts of all steps."""
        return [step.key for step in self.steps]

    def lasting_keys(self) -> list[Key]:
        """Return what names the artifacts that the plan has the next time, once all steps have run."""
        return [step.key for step in without_idle(self.steps, self.store)]

    def artifact(self, stage: Stage, name: str) -> Path:
        """Return the folder of a step's artifact."""
        return self.store.folder(self.step(stage, name).key)

    def models(self) -> dict[str, Path]:
        """Return the folder of every model by name: base, experts, variants."""
        folders = {name: listing.folder for name, listing in self.inputs.listings.items()}
        return folders | {name: self.artifact(one.last_stage, name) for name, one in self.recipe.merges.items()}


def make_plan(recipe: Recipe, folder: Path, store: Store, listings: Mapping[str, Listing]) -> Plan:
    """Resolve the data of a recipe, check all that can be checked without work, and lay out the steps.

    Args:
        recipe: the recipe.
        folder: what its relative paths are relative to.
        store: where artifacts are looked for.
        listings: its models, from `list_models` or `hash_models`. Of the steps that depend on weights without a digest
            it is not known whether they run: they are undecided, unless the store has no artifact of them at all.

    Raises:
        InputError: models that cannot be merged, data that does not fit its task, no room on the disk.
    """
    inputs = gather_inputs(recipe, listings, folder, store)
    resolved = Resolved(recipe, store, inputs, {}, ())
    if recipe.tasks:
        from sensmerge.pipeline.plan.networks import with_networks  # transformers takes seconds

        resolved = with_networks(resolved)
    steps, makers = lay_out(resolved)
    undecided = _undecided(steps, store, listings)
    todo = {
        step.title: store.why(step.key)
        for step in steps
        if step.title not in undecided and store.manifest(step.key) is None
    }
    todo |= _freed(resolved, steps, makers, todo)
    # A model whose files are gone from this machine is fetched again if a step that runs reads it.
    read = {title for step in steps if step.title in todo for title in step.needs}
    lost = {f"download {name}" for name, listing in inputs.listings.items() if is_lost(listing)}
    todo |= dict.fromkeys(lost & read - todo.keys(), "files are gone")
    plan = Plan(
        recipe, store, resolved.inputs, resolved.placements, resolved.inseparable, tuple(steps), makers, todo, undecided
    )
    _check_room(plan)
    return plan


def _undecided(steps: Sequence[Step], store: Store, listings: Mapping[str, Listing]) -> frozenset[str]:
    """Return the titles of the steps that depend on digests nobody knows, and of which the store has artifacts."""
    unknown = {f"download {name}" for name, listing in listings.items() if listing.unhashed()}
    for step in steps:
        if unknown & set(step.needs):
            unknown.add(step.title)
    return frozenset(step.title for step in steps if step.title in unknown and store.last(step.key) is not None)


def _freed(
    resolved: Resolved, steps: Sequence[Step], makers: Mapping[str, str], todo: Mapping[str, str]
) -> dict[str, str]:
    """Return why steps run again whose weights were freed: the recipe keeps them, or a step that runs reads them."""
    store, merges = resolved.store, resolved.recipe.merges
    freed = {step.title for step in steps if step.title not in todo and is_freed(store, step.key)}
    kept = merges.keys() - resolved.recipe.disposable().keys()
    keeps = {makers[f"{merges[name].last_stage} {name}"] for name in kept}
    found = dict.fromkeys(freed & keeps, f"{FREED}, and the recipe keeps them")
    for step in reversed(steps):  # each stands behind those that it needs
        if step.title in todo or step.title in found:
            found |= {one: f"{FREED}, and {step.title} reads them" for one in step.needs if one in freed - found.keys()}
    return found


def _check_room(plan: Plan) -> None:
    needed = sum(step.writes for step in plan.steps if step.title in plan.todo)
    existing = next(path for path in (plan.store.root, *plan.store.root.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise InputError(
            f"{plan.store.root}: no room on the disk: the run writes {decimal(needed)}, but "
            f"{decimal(free)} are free; free some space or choose another --store"
        )


def plan_summary(plan: Plan) -> str:
    """Return the plan in a line: how many steps run, and the bytes they read and write."""
    run = [step for step in plan.steps if step.title in plan.todo]
    if not run and not plan.undecided:
        return f"{plan.recipe.name}: all {len(plan.steps)} steps are in the store"
    undecided = f", {len(plan.undecided)} undecided" if plan.undecided else ""
    reads, writes = sum(step.reads for step in run), sum(step.writes for step in run)
    return (
        f"{plan.recipe.name}: {len(run)} of {len(plan.steps)} steps to run{undecided}, "
        f"{decimal(reads)} to read, {decimal(writes)} to write"
    )


def plan_table(plan: Plan) -> Table:
    """Return the plan for people: RUN, SKIP or ? (undecided) of every step and why, and what it reads and writes."""
    table = step_table(plan_summary(plan), _rows(plan))
    running = {step.stage for step in plan.steps if step.title in plan.todo}
    placed = [f"{stage} runs {one.name} ({one.why})" for stage, one in plan.placements.items() if stage in running]
    if placed:
        table.caption, table.caption_justify = "\n".join(placed), "left"
    return table


def _rows(plan: Plan) -> Iterator[StepRow]:
    steps = {step.title: step for step in plan.steps}
    for title, maker in plan.makers.items():
        if maker not in steps:  # it would save no work
            continue
        step = steps[maker]
        if title != maker:
            yield StepRow(step.stage, title.removeprefix(f"{step.stage} "), "SAME", f"as {maker}")
        elif step.title in plan.undecided:
            yield StepRow(step.stage, step.name, "?", "depends on weights without a digest")
        elif step.title in plan.todo:
            yield StepRow(step.stage, step.name, "RUN", plan.todo[step.title], step.reads, step.writes)
        else:
            yield StepRow(step.stage, step.name, "SKIP", "in the store")
