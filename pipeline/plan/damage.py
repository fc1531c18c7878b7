"""What a run reads of earlier ones is read through first: what is damaged is made again."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from sensmerge.pipeline.plan.models import is_lost
from sensmerge.pipeline.plan.plan import Plan
from sensmerge.pipeline.plan.step import Step
from sensmerge.pipeline.store.freed import FREED, is_freed
from sensmerge.pipeline.store.verify import damaged_files


def with_damaged(plan: Plan) -> tuple[Plan, list[str]]:
    """Add the steps whose artifacts others are about to read, and which are not as they were written.

    All files that are read are compared with the checksums of their manifests, as large as they may be; those at a URL
    are downloaded for it. That warms the page cache, and costs little beside what steps do with weights.

    Args:
        plan: of the steps that the store lacks.

    Returns:
        The plan with these steps as well, and a line for each.
    """
    todo, whole, said = dict(plan.todo), set[str](), list[str]()
    while True:
        read = {title for step in plan.steps if step.title in todo for title in step.needs} - todo.keys() - whole
        steps = [step for step in plan.steps if step.title in read]
        if not steps:
            return replace(plan, todo={step.title: todo[step.title] for step in plan.steps if step.title in todo}), said
        for step in steps:
            plan.store.fetch(step.key)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = list(pool.map(lambda step: _damage(plan, step), steps))
        for step, wrong in zip(steps, found, strict=True):
            if wrong is None:
                whole.add(step.title)
            else:
                todo[step.title] = wrong
                said.append(f"{step.title}: {wrong} in {plan.store.folder(step.key)}; it is made again")


def _damage(plan: Plan, step: Step) -> str | None:
    """Return what is wrong with the artifact of a step; of a model, its files may be gone from this machine."""
    if any(step.title == f"download {name}" and is_lost(one) for name, one in plan.inputs.listings.items()):
        return "files are gone"
    return FREED if is_freed(plan.store, step.key) else next(damaged_files(plan.store.folder(step.key)), None)
