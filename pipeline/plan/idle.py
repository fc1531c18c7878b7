"""Which steps save no work: what they count once for several steps, only one of them would need."""

from collections.abc import Sequence
from dataclasses import replace

from sensmerge.pipeline.plan.step import Step
from sensmerge.pipeline.store.store import Store
from sensmerge.tasks.stages.variant import VariantJob


def without_idle(steps: Sequence[Step], store: Store) -> list[Step]:
    """Return steps without those of stage task_vectors that are still to run for fewer than two others.

    A merge counts the magnitudes of its task vectors itself, tensor by tensor as it merges them, where nobody has
    counted them before. For one merge that is cheaper than another pass over all weights; for several it is not.

    Args:
        steps: each after those that it needs.
        store: has what some steps have made.
    """
    waiting = [step for step in steps if store.manifest(step.key) is None]
    idle = {
        step.title
        for step in waiting
        if step.stage == "task_vectors" and sum(step.title in other.needs for other in waiting) < 2
    }
    return [_without(step, idle) for step in steps if step.title not in idle]


def _without(step: Step, idle: set[str]) -> Step:
    """Return a step that counts itself what no other step counts for it."""
    if idle.isdisjoint(step.needs):
        return step
    assert isinstance(step.job, VariantJob), "only merges, and what tries them, read magnitudes"
    needs = tuple(title for title in step.needs if title not in idle)
    return replace(step, needs=needs, job=replace(step.job, task_vectors={}))
