import pytest
import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.core_model_loading import revert_weight_conversion

from sensmerge.tasks.networks.names import names_of
from sensmerge.tasks.networks.regions import regions
from tests.conftest import make_llama

SIZE = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}


def mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**SIZE, intermediate_size=24, num_local_experts=3))


def qwen() -> PreTrainedModel:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZE, moe_intermediate_size=24, num_experts=3, head_dim=8))


@pytest.mark.parametrize("make", [mixtral, qwen])
@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
def test_the_parts_of_a_stacked_parameter(make: type[PreTrainedModel], parameter: str) -> None:
    """Each view is, element by element, the tensor that transformers saves."""
    network = make()
    names = names_of(network)
    full = f"model.layers.0.mlp.experts.{parameter}"
    value = network.get_parameter(full).detach()
    with torch.device("meta"):
        views = regions(make(), names, f"layers.0.mlp.experts.{parameter}")
    saved = revert_weight_conversion(network, {full: value})
    assert views is not None
    assert len(views) == len(saved) == (6 if parameter == "gate_up_proj" else 3)
    for name, expected in saved.items():
        assert torch.equal(views[names.key(name)].of(value), expected)


def test_a_plain_parameter_is_its_only_part() -> None:
    with torch.device("meta"):
        network = make_llama()
    views = regions(network, names_of(network), "norm.weight")
    assert views is not None
    assert {key: view.shape for key, view in views.items()} == {"norm.weight": (32,)}
