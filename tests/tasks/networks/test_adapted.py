"""Which tensors adapters can hold, by the names that peft would take for others."""

from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sensmerge.tasks.networks.adapted import AdaptedNetwork
from sensmerge.tasks.networks.base import open_base

NAMES = st.lists(st.sampled_from("ab"), min_size=1, max_size=4).map(".".join)


def network_of(names: list[str]) -> AdaptedNetwork:
    base: Any = None
    network = AdaptedNetwork(base)
    vars(network)["modules"] = {name: nn.Linear(1, 1) for name in names}
    vars(network)["places"] = {f"{name}.weight": f"{name}.weight" for name in names}
    return network


@given(st.sets(NAMES, min_size=1, max_size=8))
def test_a_name_that_others_end_in_is_found(names: set[str]) -> None:
    network = network_of(sorted(names))
    for name in names:
        others = {other for other in names if other != name and other.endswith(name)}
        why = network.why_not(f"{name}.weight")
        assert bool(why) == bool(others)
        assert not why or any(why == f"peft would adapt {other} by its name, too" for other in others)


def test_what_there_can_be_factors_of(llamas: dict[str, Path]) -> None:
    network = AdaptedNetwork(open_base(llamas["base"]))
    assert network.task_type == "CAUSAL_LM"
    assert network.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    held = {name for name in network.base.weights if not network.why_not(name)}
    assert held == {name for name in network.base.weights if "_proj" in name}
    assert network.module("model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj"


def test_what_peft_can_store_whole(llamas: dict[str, Path]) -> None:
    network = AdaptedNetwork(open_base(llamas["base"]))
    norm = "model.layers.1.input_layernorm"
    assert network.whole_module(f"{norm}.weight", ()) == (norm, {f"{norm}.weight": f"{norm}.weight"})
    assert network.whole_module(f"{norm}.weight", (norm,)) is None
    assert network.whole_module("elsewhere.weight", ()) is None
