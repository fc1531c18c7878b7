"""Probes: what the base, the static merge and every expert make of a sample, up to one block."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sensmerge.tasks.dynamic.application import PoolName
from sensmerge.tasks.dynamic.network import DynamicNetwork
from sensmerge.tasks.dynamic.router import Features, Rule, pooled
from sensmerge.tasks.networks.blocks import to_device

Place = tuple[int, PoolName]
"""Layer and pool."""


def probe(
    network: DynamicNetwork, inputs: Mapping[str, Tensor], rules: Sequence[Rule], experts: int, static: float
) -> dict[Place, Features]:
    """Return the features that some rules need, by layer and pool, from one forward pass of all probes stacked.

    Args:
        network: the network.
        inputs: of B samples: `input_ids` and `attention_mask`, (B, T), or pictures.
        rules: at least one.
        experts: K.
        static: every expert's coefficient in the static merge.
    """
    coefficients = probes(rules, experts, static)
    first = next(iter(inputs.values()))
    count, batch = len(coefficients), len(first)
    stacked = {name: values.repeat(count, *[1] * (values.dim() - 1)) for name, values in inputs.items()}
    repeated = coefficients.repeat_interleave(batch, dim=0).to(first.device)
    states = network.hidden_states(stacked, repeated, sorted({rule.layer for rule in rules}))
    found = _pooled(states, stacked.get("attention_mask"), rules)
    return {key: _features(values.view(count, batch, -1), rules) for key, values in found.items()}


def probe_all(
    network: DynamicNetwork,
    batches: Sequence[Mapping[str, Tensor]],
    rules: Sequence[Rule],
    experts: int,
    static: float,
    alike: bool = True,
) -> dict[Place, Features]:
    """Return the features of all samples of some batches, in their order, on the CPU; otherwise as `probe`.

    With `alike`, where there are many tokens and task vectors are whole, all batches pass by one probe after the other:
    each is written out once, and costs no more than the plain network.
    """
    device = str(network.network.device)
    if not alike or not network.writes_out(
        sum(batch["input_ids"].numel() for batch in batches if "input_ids" in batch)
    ):
        parts = [probe(network, to_device(dict(batch), device), rules, experts, static) for batch in batches]
        return {key: _joined([part[key] for part in parts]) for key in parts[0]}
    layers = sorted({rule.layer for rule in rules})
    found: dict[Place, list[Tensor]] = {}
    for row in probes(rules, experts, static):
        each = []
        with network.alike(row):
            for batch in batches:
                inputs = to_device(dict(batch), device)
                each.append(_pooled(network.states(inputs, layers), inputs.get("attention_mask"), rules))
        for key in each[0]:
            found.setdefault(key, []).append(torch.cat([one[key] for one in each]).cpu())
    return {key: _features(torch.stack(found.pop(key)), rules) for key in list(found)}


def probes(rules: Sequence[Rule], experts: int, static: float) -> Tensor:
    """Return the coefficients of the probes that some rules need, (probes, K): base, merge and experts, if needed."""
    return torch.cat(
        [
            torch.zeros(int(any(rule.needs_base for rule in rules)), experts),
            torch.full((int(any(rule.needs_merged for rule in rules)), experts), static),
            *[torch.eye(experts)] * any(rule.needs_experts for rule in rules),
        ]
    )


def _pooled(states: Mapping[int, Tensor], mask: Tensor | None, rules: Sequence[Rule]) -> dict[Place, Tensor]:
    """Return pooled hidden states; without a mask, as for pictures, all positions count."""
    masks = {layer: one.new_ones(one.shape[:2]) if mask is None else mask for layer, one in states.items()}
    places = dict.fromkeys((rule.layer, rule.pool) for rule in rules)
    return {(layer, pool): pooled(states[layer], masks[layer], pool) for layer, pool in places}


def _features(found: Tensor, rules: Sequence[Rule]) -> Features:
    """Return pooled hidden states, (probes, N, width), in the order of `probes`, as features."""
    base, merged, each = (
        any(getattr(rule, need) for rule in rules) for need in ("needs_base", "needs_merged", "needs_experts")
    )
    return Features(
        base=found[0] if base else None,
        merged=found[int(base)] if merged else None,
        experts=found[int(base) + int(merged) :].transpose(0, 1) if each else None,
    )


def _joined(parts: list[Features]) -> Features:
    columns = ([getattr(part, name) for part in parts] for name in ("base", "merged", "experts"))
    return Features(*(None if column[0] is None else torch.cat(column).cpu() for column in columns))
