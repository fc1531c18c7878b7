"""The trial of application se: what it finds of networks whose linear layers are read in other ways than called."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    XLNetConfig,
    XLNetLMHeadModel,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from sensmerge.tasks.dynamic.network import unlinear
from sensmerge.tasks.dynamic.trial import try_network
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.stand_in import LARGEST, pattern, stand_ins

SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 300}


def hollow(build: Callable[[], PreTrainedModel]) -> tuple[PreTrainedModel, list[str]]:
    """A network on the meta device and the names of all its parameters."""
    with torch.device("meta"):
        network = build()
    return network, [name for name, _ in network.named_parameters()]


def written(build: Callable[[], PreTrainedModel]) -> set[str]:
    """What a trial has written out if experts change everything, by pattern."""
    network, changed = hollow(build)
    trial = try_network(network.config, network, changed, "merges.x")
    assert trial.is_checked
    assert set(trial.written) <= set(changed)
    assert {name for name in changed if pattern(name) in {pattern(one) for one in trial.written}} == trial.written
    return {pattern(name) for name in trial.written}


def test_usual_networks_have_nothing_written_out() -> None:
    assert written(lambda: LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=24))) == set()
    assert written(lambda: BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=16, n_layer=3, n_head=4))) == set()
    opt = {"ffn_dim": 24, "word_embed_proj_dim": 8, "max_position_embeddings": 64, "pad_token_id": 1}
    assert written(lambda: OPTForCausalLM(OPTConfig(**SMALL, **opt))) == set()


def test_bloom_that_slices_its_weights_is_found() -> None:
    """In its exact mode of pretraining, BLOOM multiplies with slices of weights of layers that it does not call."""
    config = {"vocab_size": 300, "hidden_size": 16, "n_layer": 3, "n_head": 4}
    build = lambda: BloomForCausalLM(BloomConfig(**config, pretraining_tp=2, slow_but_exact=True))  # noqa: E731
    network, changed = hollow(build)
    assert not unlinear(network, changed)
    sliced = {"mlp.dense_4h_to_h", "self_attention.dense"}
    assert written(build) == {f"transformer.h.*.{name}.weight" for name in sliced}


class Uncalled(LlamaMLP):
    """Reads a weight without calling its layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.act_fn(self.gate_proj(x)), F.linear(x, next(self.up_proj.parameters()))
        return self.down_proj(gate * up)


class Uncalling(LlamaForCausalLM):
    """A Llama with such a layer in every block."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = Uncalled(config)


def test_any_layer_that_is_read_without_a_call_is_found() -> None:
    found = written(lambda: Uncalling(LlamaConfig(**SMALL, intermediate_size=24)))
    assert found == {"model.layers.*.mlp.up_proj.weight"}


def test_a_large_mixture_is_tried_on_a_small_one_and_its_cost_is_said() -> None:
    network, changed = hollow(
        lambda: MixtralForCausalLM(MixtralConfig(hidden_size=4096, num_hidden_layers=32, num_local_experts=8))
    )
    before = torch.random.get_rng_state()
    small, is_whole = next(stand_ins(network.config, network))
    assert not is_whole
    assert sum(one.numel() for one in small.parameters()) <= LARGEST
    assert {pattern(name) for name, _ in small.named_parameters()} == {pattern(name) for name in changed}
    trial = try_network(network.config, network, changed, "merges.x")
    assert torch.equal(torch.random.get_rng_state(), before)
    experts = [f"model.layers.*.mlp.{name}" for name in ("experts.down_proj", "experts.gate_up_proj", "gate.weight")]
    assert sorted({pattern(name) for name in trial.written}) == experts
    assert len(trial.written) == 32 * 3
    (note,) = trial.notes(network, "merges.x")
    assert note == (
        f"merges.x: of MixtralForCausalLM, {', '.join(experts)} have no linear form and are written out for every "
        "distinct row of coefficients: a batch takes a pass for each, and memory for 97% of the weights once more"
    )
    attention = [name for name in changed if ".self_attn." in name]
    assert try_network(network.config, network, attention, "merges.x").notes(network, "merges.x") == []


@pytest.mark.parametrize("width", [16, 1024])
def test_a_network_that_cannot_be_run_so_is_refused_by_name(width: int) -> None:
    network, changed = hollow(lambda: XLNetLMHeadModel(XLNetConfig(vocab_size=300, d_model=width, n_layer=3, n_head=4)))
    message = (
        r"merges\.x: XLNetLMHeadModel cannot be run with coefficients per sample \(.*\); "
        r"use application: \{kind: static\}"
    )
    with pytest.raises(InputError, match=message):
        try_network(network.config, network, changed, "merges.x")


class Unshrinkable(LlamaForCausalLM):
    """A network that is large whatever its config says."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.large = nn.Linear(5000, 5000, bias=False)


def test_what_cannot_be_tried_is_written_out() -> None:
    network, changed = hollow(lambda: Unshrinkable(LlamaConfig(**SMALL, intermediate_size=24)))
    trial = try_network(network.config, network, changed, "merges.x")
    assert not trial.is_checked
    assert trial.written == set(changed)
    (note,) = trial.notes(network, "merges.x")
    assert "could not be tried on a small network of this kind" in note
    assert "memory for 100% of the weights" in note
