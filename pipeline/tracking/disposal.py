"""Frees the weights of variants that lost against another one of their sweep, where the recipe says so."""

from collections.abc import Iterator
from itertools import chain

from rich.filesize import decimal

from sensmerge.pipeline.plan.plan import Plan
from sensmerge.pipeline.plan.step import Step
from sensmerge.pipeline.report.gate import best_of
from sensmerge.pipeline.report.report import Report
from sensmerge.pipeline.store.freed import free, is_freed
from sensmerge.pipeline.store.garbage import needed_artifacts
from sensmerge.pipeline.tracking.versions import known_versions, mark_deleted
from sensmerge.tasks.errors import InputError, StepError


def free_losers(plan: Plan, report: Report) -> list[str]:
    """Free the weights of the variants of `keep: best` sweeps that did not win, and return what is to be said of it.

    The best variant of each sweep stays, and the one that the gate chooses; so does what a version with an alias, a
    pinned one, a former champion or a server needs, and what another variant shares.

    Args:
        plan: of a run that has ended and is recorded; its store is locked.
        report: of that run.
    """
    disposable = plan.recipe.disposable()
    best = best_of(report, plan.recipe.gate)
    winners = {sweep.best for sweep in report.sweeps.values()} | ({best.name} if best is not None else set())
    losers = [name for name, sweep in disposable.items() if sweep in report.sweeps and name not in winners]
    if not losers:
        return []
    lost = [name for name in winners if any(is_freed(plan.store, step.key) for step in _weights(plan, name))]
    if lost:
        return [
            f"{', '.join(sorted(lost))}: the best by now, but the weights were freed before; run again without keep: "
            "best to get them back; nothing else is freed"
        ]
    try:
        versions = known_versions(plan.store, None)
    except (InputError, StepError) as error:
        return [f"no weights are freed, because nobody knows which ones are still needed: {error}"]
    needed = needed_artifacts(plan.store, 0, chain.from_iterable(versions.values()))
    stay = {step.title for name in plan.recipe.merges.keys() - set(losers) for step in _weights(plan, name)}
    freed, names, size = set[str](), list[str](), 0
    for name in losers:
        for step in _weights(plan, name):
            artifact = f"{step.stage}/{plan.store.folder(step.key).name}"
            if step.title not in stay and artifact not in needed:
                manifest = plan.store.manifest(step.key)
                assert manifest is not None, f"{step.title} has run"
                size += free(plan.store, step.key, manifest["result"].get("by_tensor", ()))
                freed.add(artifact)
                names += [name] if step.stage == plan.recipe.merges[name].last_stage else []
    plan.store.look()
    mark_deleted(plan.store, freed, versions)
    if not size:
        return []
    return [f"{decimal(size)} freed: the weights of {', '.join(names)} (keep: best)"]


def _weights(plan: Plan, name: str) -> Iterator[Step]:
    """Yield the steps that make the weights of a variant."""
    variant = plan.recipe.merges[name]
    for stage in dict.fromkeys(("merge", variant.last_static_stage, variant.last_stage)):
        yield plan.step(stage, name)
