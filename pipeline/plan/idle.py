"""Which steps save no work: what they count once for several steps, only one of them would need."""

from collections.abc import Sequence
from dataclasses import replace

from sensmerge.pipeline.plan.step import Step
from sensmerge.pipeline.store.store import Store


def without_idle(steps: Sequence[Step], store: Store) -> list[Step]:
    """Return steps without those of stage task_vectors that fewer than two others are still to read.

    A merge counts the magnitudes of its task vectors itself, tensor by tensor as it merges them, where nobody has
    counted them before. For one merge that is cheaper than another pass over all weights; for several it is not.

    Args:
        steps: each after those that it needs.
        store: has what some steps have made.
    """
    waiting = [step for step in steps if store.manifest(step.key) is None]
    idle = {
        step.title
        for step in steps
        if step.stage == "task_vectors" and sum(step.title in other.needs for other in waiting) < 2
    }
    return [
        replace(step, needs=tuple(title for title in step.needs if title not in idle))
        for step in steps
        if step.title not in idle
    ]
