"""How many bytes the steps of networks write, estimated from headers."""

import torch

from sensmerge.pipeline.plan.inputs import Inputs
from sensmerge.pipeline.plan.memory import totals_of
from sensmerge.pipeline.plan.models import weight_bytes
from sensmerge.pipeline.plan.step import Resolved
from sensmerge.pipeline.recipe.stage import Stage
from sensmerge.tasks.checkpoints.layers import block_names
from sensmerge.tasks.networks.readers import width_of
from sensmerge.tasks.networks.watching import Statistics, needs_gradients
from sensmerge.tasks.networks.zero_shot import CLASSES
from sensmerge.tasks.stages.merge_vectors import MergeVectorsJob


def networks(inputs: Inputs, *experts: str) -> int:
    """Return the size of the weights that networks of experts are made of: of an adapter, those of the base too."""
    of_adapters = weight_bytes(inputs.listings["base"])
    of_each = {name: of_adapters * one.is_adapter for name, one in inputs.networks.experts.items()}
    return sum(weight_bytes(inputs.listings[name]) + of_each[name] for name in experts)


def made_head(inputs: Inputs, expert: str) -> int:
    """Return the size of the head that is made for an expert."""
    return inputs.networks.experts[expert].source.tensors[CLASSES].nbytes


def statistics(resolved: Resolved, measured: Statistics, tokens: int) -> int:
    """Return the size of the totals by tensor that an expert has at most, and of the states kept while it runs."""
    base = resolved.inputs.networks.base
    totals = totals_of(base, measured, lambda statistic, shape: statistic.stored_bytes(shape))
    blocks = len(block_names(base.weights)) if needs_gradients(measured) else 0
    return sum(totals.values()) + _kept_states(resolved, "statistics", blocks, tokens)


def _kept_states(resolved: Resolved, stage: Stage, blocks: int, tokens: int) -> int:
    """Return the size of the hidden states that a streamed network keeps on disk while it runs.

    They are those before and behind a block; if there is a way back, those of all blocks, and as many gradients.
    """
    return 2 * (blocks + 1) * _states(resolved, tokens) if resolved.placements[stage].placement == "streamed" else 0


def kept_trunks(resolved: Resolved) -> int:
    """Return the size of what stage cross_task keeps while it runs: what every trunk gives for every token."""
    tokens = sum(one.calibration_tokens for one in resolved.inputs.data.values())
    return len(resolved.recipe.experts) * _states(resolved, tokens) + _kept_states(resolved, "cross_task", 1, tokens)


def travelling_states(resolved: Resolved) -> int:
    """Return the size of the hidden states that stage calibrate keeps while it runs: of two networks, at two blocks."""
    return 4 * _states(resolved, sum(one.calibration_tokens for one in resolved.inputs.data.values()))


def _states(resolved: Resolved, tokens: int) -> int:
    itemsize: int = getattr(torch, resolved.recipe.dtype).itemsize
    return tokens * width_of(resolved.inputs.networks.base.config) * itemsize


def dynamic_model(inputs: Inputs, job: MergeVectorsJob) -> int:
    """Return the size of base and task vectors at most: all whole but for the factors of adapters."""
    size = weight_bytes(inputs.listings["base"])
    for name, expert in inputs.networks.experts.items():
        if expert.is_adapter and job.method.keeps_whole(name):
            size += weight_bytes(inputs.listings[name])
        else:
            size += sum(inputs.base.info(tensor).nbytes for tensor in inputs.base.weights if expert.touches(tensor))
    return size
