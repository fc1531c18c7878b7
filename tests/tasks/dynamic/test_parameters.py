"""Task vectors by parameter against the networks that transformers loads from checkpoints of other forms."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForPreTraining,
    BertForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from sensmerge.tasks.dynamic.parameters import by_parameter, holdings
from sensmerge.tasks.dynamic.vectors import Dense, Vector, compact
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.base import open_base
from tests.conftest import make_llama, perturbed

SIZE: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}


def mixtral() -> PreTrainedModel:
    config = MixtralConfig(
        **SIZE, num_key_value_heads=2, num_local_experts=3, intermediate_size=24, max_position_embeddings=64
    )
    torch.manual_seed(0)
    return MixtralForCausalLM(config).eval()


def saved(network: PreTrainedModel, folder: Path) -> Mapping[str, Tensor]:
    network.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def test_vectors_of_a_mixture_are_stacked_as_its_weights(tmp_path: Path) -> None:
    base = saved(mixtral(), tmp_path / "base")
    tuned = saved(perturbed(mixtral(), 1), tmp_path / "expert")
    assert any(".experts.2.w2." in name for name in base)  # a checkpoint holds each of the three by itself
    left_out = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    vectors: dict[str, dict[str, Vector]] = {}
    for name, values in tuned.items():
        vector = compact(values - base[name], torch.float32)
        assert vector is not None
        if name != left_out:
            vectors[name] = {"one": vector}
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    found = by_parameter(open_base(tmp_path / "base"), network, vectors, ["other", "one"])
    expert = AutoModelForCausalLM.from_pretrained(tmp_path / "expert")
    before = dict(network.named_parameters())
    assert found.keys() == before.keys()
    for name, values in expert.named_parameters():
        assert set(found[name]) == {1}
        delta = found[name][1].dense()
        expected = (values - before[name]).detach()
        if name == "model.layers.1.mlp.experts.down_proj":
            expected = expected.clone()
            assert expected[2].any()
            expected[2] = 0
        assert torch.allclose(delta, expected, rtol=0, atol=1e-7), name


def test_what_a_network_does_without_is_left_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(**SIZE, intermediate_size=24)
    base = saved(BertForPreTraining(config), tmp_path)
    network = BertForSequenceClassification(config)
    vectors: dict[str, dict[str, Vector]] = {name: {"one": Dense(torch.ones_like(one))} for name, one in base.items()}
    found = by_parameter(open_base(tmp_path), network, vectors, ["one"])
    assert found.keys() == {name for name, _ in network.bert.named_parameters(prefix="bert")}


def test_a_parameter_that_no_tensor_is_told_to_be(tmp_path: Path) -> None:
    saved(make_llama(), tmp_path)
    base = open_base(tmp_path)
    network = make_llama()
    network.model.another = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"as model\.another\.weight of LlamaForCausalLM; save the base again"):
        holdings(base, network)
