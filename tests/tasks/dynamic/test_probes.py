"""Probes against the hidden states that transformers gives for weights that are written out."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sensmerge.tasks.dynamic.application import PoolName
from sensmerge.tasks.dynamic.network import DynamicNetwork
from sensmerge.tasks.dynamic.probes import probe, probe_all, probes
from sensmerge.tasks.dynamic.router import POOLS, SCORES, Rule
from sensmerge.tasks.dynamic.vectors import Dense, LowRank, Vector
from tests.conftest import make_bert_trunk, make_gpt2, make_llama

EXPERTS, STATIC = 3, 0.4
NETWORKS: dict[str, Any] = {"bert": make_bert_trunk, "llama": make_llama, "gpt2": make_gpt2}


def make(name: str) -> tuple[PreTrainedModel, dict[str, dict[int, Vector]]]:
    network = NETWORKS[name]().eval()
    torch.manual_seed(1)
    vectors: dict[str, dict[int, Vector]] = {}
    for parameter, values in network.named_parameters():
        vectors[parameter] = {expert: Dense(0.02 * torch.randn(values.shape)) for expert in range(EXPERTS)}
        if values.dim() == 2:
            vectors[parameter][1] = LowRank(0.1 * torch.randn(2, values.shape[1]), 0.1 * torch.randn(len(values), 2))
    return network, vectors


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 259, (2, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, 3:], mask[1, 3:] = 2, 0
    return {"input_ids": ids, "attention_mask": mask}


def states(
    network: PreTrainedModel, vectors: dict[str, dict[int, Vector]], row: list[float], layer: int
) -> list[Tensor]:
    """What comes out of a block for each sample, without its padding, at base + Σ coefficient · vector."""
    other = copy.deepcopy(network)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            for expert, vector in vectors[name].items():
                parameter += row[expert] * vector.dense()
        found = other.base_model(**batch(), output_hidden_states=True).hidden_states[layer]
    return [found[0], found[1, :3]]


def by_hand(found: list[Tensor], pool: PoolName) -> Tensor:
    return torch.stack([{"cls": one[0], "mean": one.mean(0), "last": one[-1]}[pool] for one in found])


@pytest.mark.parametrize(("name", "layers"), [("bert", (1, 2)), ("llama", (1,)), ("gpt2", (1,))])
def test_features_are_those_of_base_merge_and_experts(name: str, layers: tuple[int, ...]) -> None:
    network, vectors = make(name)
    rules = [Rule("alignment", layer, pool, "l2") for layer in layers for pool in POOLS]
    with torch.inference_mode():
        found = probe(DynamicNetwork(network, vectors, EXPERTS), batch(), rules, EXPERTS, STATIC)
    assert set(found) == {(layer, pool) for layer in layers for pool in POOLS}
    one_hot = torch.eye(EXPERTS).tolist()
    for layer in layers:
        base, merged = (states(network, vectors, [value] * EXPERTS, layer) for value in (0.0, STATIC))
        experts = [states(network, vectors, row, layer) for row in one_hot]
        for pool in POOLS:
            features = found[layer, pool]
            assert features.base is not None
            assert features.merged is not None
            assert features.experts is not None
            close: dict[str, float] = {"rtol": 0, "atol": 1e-4}
            torch.testing.assert_close(features.base, by_hand(base, pool), **close)
            torch.testing.assert_close(features.merged, by_hand(merged, pool), **close)
            expected = torch.stack([by_hand(one, pool) for one in experts], dim=1)
            torch.testing.assert_close(features.experts, expected, **close)
            assert (features.base - features.merged).abs().max() > 0.01


@pytest.mark.parametrize(
    ("score", "probes"), [("centroid", 1), ("discriminant", 1), ("nearest", 4), ("shift", 4), ("alignment", 5)]
)
def test_only_what_a_rule_reads_is_run(score: Any, probes: int) -> None:
    network, vectors = make("llama")
    sizes: dict[int, int] = {}
    for number, block in enumerate(network.base_model.layers, 1):
        block.register_forward_pre_hook(lambda module, args, number=number: sizes.update({number: len(args[0])}))
    rule = Rule(score, 1, "mean", "l2")
    with torch.inference_mode():
        found = probe(DynamicNetwork(network, vectors, EXPERTS), batch(), [rule], EXPERTS, STATIC)[1, "mean"]
    assert sizes == {1: 2 * probes}
    assert (found.base is not None) == rule.needs_base
    assert (found.merged is not None) == rule.needs_merged
    assert (found.experts is not None) == rule.needs_experts
    assert rule.passes(EXPERTS, 2) == probes / 2


def test_several_rules_share_one_pass_and_give_what_each_alone_gives() -> None:
    network, vectors = make("bert")
    dynamic = DynamicNetwork(network, vectors, EXPERTS)
    rules = [Rule(score, layer, "last", "l2") for score in SCORES for layer in (1, 2)]
    with torch.inference_mode():
        together = probe(dynamic, batch(), rules, EXPERTS, STATIC)
        for rule in rules:
            alone = probe(dynamic, batch(), [rule], EXPERTS, STATIC)[rule.layer, rule.pool]
            for key, value in vars(alone).items():
                if value is not None:
                    torch.testing.assert_close(getattr(together[rule.layer, rule.pool], key), value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("low_rank", [False, True])
def test_all_batches_at_once_give_what_each_gives(score: Any, low_rank: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    network, vectors = make("llama")
    if not low_rank:
        vectors = {
            name: {expert: Dense(vector.dense()) for expert, vector in by_expert.items()}
            for name, by_expert in vectors.items()
        }
    dynamic = DynamicNetwork(network, vectors, EXPERTS)
    rules = [Rule(score, layer, "mean", "l2") for layer in (1, 2)]
    batches = [{key: values[rows] for key, values in batch().items()} for rows in ([0, 1], [1])]
    with torch.inference_mode():
        parts = [probe(dynamic, one, rules, EXPERTS, STATIC) for one in batches]
        monkeypatch.setattr("sensmerge.tasks.dynamic.network.ALIKE_TOKENS", 1)
        if not low_rank:
            monkeypatch.delattr(DynamicNetwork, "mixed")
        found = probe_all(dynamic, batches, rules, EXPERTS, STATIC)
    assert found.keys() == parts[0].keys()
    for key, features in found.items():
        for name, values in vars(features).items():
            several = [getattr(part[key], name) for part in parts]
            assert (values is None) == (several[0] is None)
            if values is not None:
                torch.testing.assert_close(values, torch.cat(several), rtol=0, atol=1e-5)


def test_probes_are_those_that_rules_need() -> None:
    rows = {score: probes([Rule(score, 1, "mean", "l2")], 2, STATIC).tolist() for score in SCORES}
    base, merged, experts = [0.0, 0.0], pytest.approx([STATIC, STATIC]), [[1.0, 0.0], [0.0, 1.0]]
    assert rows == {
        "centroid": [base],
        "discriminant": [base],
        "nearest": [merged, *experts],
        "shift": [base, *experts],
        "alignment": [base, merged, *experts],
    }
