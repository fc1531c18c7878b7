"""Probes: what the base, the static merge and every expert make of a sample, up to one block."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sensmerge.tasks.dynamic.application import PoolName
from sensmerge.tasks.dynamic.network import DynamicNetwork
from sensmerge.tasks.dynamic.router import Features, Rule, pooled


def probe(
    network: DynamicNetwork, inputs: Mapping[str, Tensor], rules: Sequence[Rule], experts: int, static: float
) -> dict[tuple[int, PoolName], Features]:
    """Return the features that some rules need, by layer and pool, from one forward pass of all probes stacked.

    Args:
        network: the network.
        inputs: `input_ids` and `attention_mask`, (B, T).
        rules: at least one.
        experts: K.
        static: every expert's coefficient in the static merge.
    """
    base = any(rule.needs_base for rule in rules)
    merged = any(rule.needs_merged for rule in rules)
    each = any(rule.needs_experts for rule in rules)
    # One row of coefficients per probe.
    rows = [torch.zeros(1, experts)] * base + [torch.full((1, experts), static)] * merged + [torch.eye(experts)] * each
    coefficients = torch.cat(rows)
    probes, batch = len(coefficients), len(inputs["input_ids"])
    stacked = {name: values.repeat(probes, *[1] * (values.dim() - 1)) for name, values in inputs.items()}
    repeated = coefficients.repeat_interleave(batch, dim=0).to(inputs["input_ids"].device)
    states = network.hidden_states(stacked, repeated, sorted({rule.layer for rule in rules}))
    features = {}
    for layer, pool in dict.fromkeys((rule.layer, rule.pool) for rule in rules):
        found = pooled(states[layer], stacked["attention_mask"], pool).view(probes, batch, -1)
        features[layer, pool] = Features(
            base=found[0] if base else None,
            merged=found[int(base)] if merged else None,
            experts=found[int(base) + int(merged) :].transpose(0, 1) if each else None,
        )
    return features
