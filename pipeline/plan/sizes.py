"""How many bytes steps write, estimated from headers."""

from sensmerge.pipeline.plan.inputs import Inputs
from sensmerge.pipeline.recipe.variant import Variant
from sensmerge.tasks.checkpoints.weights import BaseWeights
from sensmerge.tasks.stages.written import plan_merged

HISTOGRAM = 32_000
"""Bytes of a tensor's magnitude histogram, about."""


def task_vector(base: BaseWeights) -> int:
    """Return the size of what is measured of a task vector."""
    return len(base.weights) * HISTOGRAM


def merged_model(inputs: Inputs, variant: Variant) -> int:
    """Return the size of a static merge."""
    return sum(plan_merged(inputs.base, variant.out_dtype, variant.shard_size).sizes.values())


def vectors(inputs: Inputs, variant: Variant) -> int:
    """Return the size of what leads from a static merge to all experts at most: whole, of what the merge changes."""
    experts, is_calibrated = inputs.experts.values(), variant.calibrate is not None
    names = [one for one in inputs.base.weights if is_calibrated or any(expert.touches(one) for expert in experts)]
    return len(experts) * sum(inputs.base.info(name).nbytes for name in names)
