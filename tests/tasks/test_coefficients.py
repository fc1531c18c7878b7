import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from scipy.special import softmax

from sensmerge.tasks.coefficients import (
    Coefficients,
    ExplicitCoefficients,
    Lines,
    SensCoefficients,
    UniformCoefficients,
    alpha,
    matches,
    plain_weights,
    row_of,
    scaled,
    sens_weights,
    sigma,
    tau,
)

LAYERS = ["embed_tokens", "layers.0", "layers.1", "layers.10", "norm"]


def test_alpha_has_length_one() -> None:
    assert alpha({"a": 3.0, "b": 4.0}) == {"a": pytest.approx(0.6), "b": pytest.approx(0.8)}


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_alpha_does_not_depend_on_the_unit(scale: float) -> None:
    assert alpha({"a": 3 * scale, "b": 4 * scale}) == {"a": pytest.approx(0.6), "b": pytest.approx(0.8)}


def test_alpha_of_an_insensitive_expert_is_zero() -> None:
    assert alpha({"a": 0.0, "b": 0.0}) == {"a": 0.0, "b": 0.0}


DISTANCES = {
    "x": {"x": 0.0, "y": 1.0, "z": 3.0},
    "y": {"x": 2.0, "y": 0.0, "z": 0.0},
    "z": {"x": 1.0, "y": 1.0, "z": 0.0},
}


def test_tau_from_distances_is_the_share_of_the_row_sums() -> None:
    assert tau(DISTANCES, "distance") == {"x": pytest.approx(0.5), "y": pytest.approx(0.25), "z": pytest.approx(0.25)}


def test_tau_from_similarities_leaves_out_the_diagonal() -> None:
    rows = {"x": 1 / 2 + 1 / 4, "y": 1 / 3 + 1, "z": 1 / 2 + 1 / 2}
    total = sum(rows.values())
    assert tau(DISTANCES, "similarity") == {name: pytest.approx(row / total) for name, row in rows.items()}


def test_directions_order_experts_oppositely() -> None:
    two = {"far": {"far": 0.0, "near": 5.0}, "near": {"far": 1.0, "near": 0.0}}
    assert tau(two, "distance")["far"] > 0.5 > tau(two, "similarity")["far"]


@pytest.mark.parametrize("direction", ["distance", "similarity"])
def test_identical_experts_share_tau(direction: str) -> None:
    zero = {i: dict.fromkeys("xyz", 0.0) for i in "xyz"}
    assert tau(zero, direction) == dict.fromkeys("xyz", pytest.approx(1 / 3))


ALPHAS = {"x": {"a": 0.6, "b": 0.8}, "y": {"a": 1.0, "b": 0.0}}
TAUS = {"x": 0.75, "y": 0.25}


@pytest.mark.parametrize("temperature", [0.05, 1.0, 3.0])
def test_sigma_is_the_softmax_over_experts(temperature: float) -> None:
    found = sigma(ALPHAS, TAUS, temperature, ["a", "b"])
    for layer, table in found.items():
        products = [ALPHAS[expert][layer] * TAUS[expert] / temperature for expert in ALPHAS]
        assert list(table.values()) == pytest.approx(softmax(products).tolist())


def test_large_temperature_is_uniform() -> None:
    for table in sigma(ALPHAS, TAUS, 1e12, ["a", "b"]).values():
        assert list(table.values()) == pytest.approx([0.5, 0.5], abs=1e-12)


@pytest.mark.parametrize("temperature", [1e-6, 1e-310])
def test_small_temperature_takes_the_largest(temperature: float) -> None:
    assert sigma(ALPHAS, TAUS, temperature, ["a", "b"]) == {"a": {"x": 1.0, "y": 0.0}, "b": {"x": 1.0, "y": 0.0}}


def test_a_layer_that_an_expert_lacks_counts_as_zero() -> None:
    found = sigma({"x": {"a": 1.0}, "y": {"a": 0.5, "head": 0.5}}, TAUS, 0.1, ["a", "head"])
    assert list(found["head"].values()) == pytest.approx(softmax([0.0, 0.5 * 0.25 / 0.1]).tolist())


shares = st.floats(0, 1)


@given(
    alphas=st.lists(st.tuples(shares, shares), min_size=1, max_size=6),
    taus=st.lists(shares, min_size=6, max_size=6),
    temperature=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    weight=st.floats(-10, 10),
)
def test_weights_average_to_the_variants_weight(
    alphas: list[tuple[float, float]], taus: list[float], temperature: float, weight: float
) -> None:
    names = [f"expert{i}" for i in range(len(alphas))]
    by_expert = {name: {"a": a, "b": b} for name, (a, b) in zip(names, alphas, strict=True)}
    sigmas = sigma(by_expert, dict(zip(names, taus, strict=False)), temperature, ["a", "b", "missing"])
    weights = sens_weights(sigmas, weight)
    for layer, row in sigmas.items():
        assert list(row) == names
        assert math.fsum(row.values()) == pytest.approx(1)
        assert all(share >= 0 for share in row.values())
        assert math.fsum(weights[layer].values()) / len(names) == pytest.approx(weight)
    assert list(weights["missing"].values()) == pytest.approx([weight] * len(names))


def test_uniform_weights() -> None:
    assert plain_weights(UniformCoefficients(), 0.4, {"a": ["a.w"], "b": ["b.w"]}, {}, ["x", "y"]) == {
        "a": {"x": 0.4, "y": 0.4},
        "b": {"x": 0.4, "y": 0.4},
    }


def test_explicit_weights_last_matching_pattern_wins() -> None:
    patterns: dict[str, Any] = {"*": 1.0, "layers.*": 2.0, "layers.?": 3.0, "layers.[1]": 4.0}
    coefficients = ExplicitCoefficients(kind="explicit", weights={"x": patterns, "y": -0.5})
    found = plain_weights(
        coefficients, 0.5, {layer: [f"{layer}.weight"] for layer in LAYERS}, dict.fromkeys(LAYERS, 0.0), ["x", "y"]
    )
    assert {layer: row["x"] for layer, row in found.items()} == {
        "embed_tokens": 0.5,
        "layers.0": 1.5,
        "layers.1": 2.0,
        "layers.10": 1.0,
        "norm": 0.5,
    }
    assert {row["y"] for row in found.values()} == {-0.25}


def test_a_later_general_pattern_overrides_an_earlier_special_one() -> None:
    coefficients = ExplicitCoefficients(kind="explicit", weights={"x": {"layers.0": 9.0, "*": 1.0}})
    assert plain_weights(coefficients, 1.0, {"layers.0": ["layers.0.weight"]}, {"layers.0": 0}, ["x"]) == {
        "layers.0": {"x": 1.0}
    }


def test_patterns_are_those_of_a_shell_and_mind_case() -> None:
    assert matches("model.layers.[01]", "model.layers.1")
    assert not matches("model.layers.[01]", "model.layers.2")
    assert not matches("MODEL.*", "model.norm")
    assert not matches("layers.1", "layers.10")


def test_lines_scales_every_expert_alike() -> None:
    weights = {"a": {"x": 1.0, "y": -2.0}, "b": {"x": 1.0, "y": 3.0}, "c": {"x": 0.0, "y": 1.0}}
    found = scaled(weights, Lines(first=0.5), {"a": 0.0, "b": 0.25, "c": 1.0})
    assert found == {"a": {"x": 0.5, "y": -1.0}, "b": {"x": 0.625, "y": 1.875}, "c": {"x": 0.0, "y": 1.0}}
    falling = Lines(first=2.0, last=0.0)
    assert [falling.at(depth) for depth in (0.0, 0.5, 1.0)] == [2.0, 1.0, 0.0]


@pytest.mark.parametrize("setting", [{}, {"first": -0.1}, {"first": 1.0, "last": -1.0}, {"first": math.nan}])
def test_bad_lines_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Lines.model_validate(setting)


@pytest.mark.parametrize(
    "setting",
    [
        {"kind": "sens", "temperature": 0},
        {"kind": "sens", "temperature": -1},
        {"kind": "sens", "temperature": math.nan},
        {"kind": "sens", "temperature": math.inf},
        {"kind": "sens", "direction": "up"},
        {"kind": "sens", "temprature": 1},
        {"kind": "explicit"},
        {"kind": "explicit", "weights": {"x": math.nan}},
        {"kind": "explicit", "weights": {"x": {"*": math.inf}}},
        {"kind": "uniform", "weights": {}},
        {"kind": "best"},
        {},
    ],
)
def test_bad_settings_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Coefficients).validate_python(setting)


def test_defaults() -> None:
    sens = TypeAdapter(Coefficients).validate_python({"kind": "sens"})
    assert sens == SensCoefficients(kind="sens", temperature=1.0, direction="distance")


def test_gradients_give_a_row_to_each_layer_and_filters_to_each_tensor_that_differs() -> None:
    layers = {
        "embed": ["embed.weight"],
        "layers.0": ["layers.0.attn.weight", "layers.0.mlp.weight"],
        "layers.1": ["layers.1.attn.weight", "layers.1.mlp.weight"],
    }
    coefficients = ExplicitCoefficients.model_validate(
        {
            "kind": "explicit",
            "weights": {"x": [0.2, 0.6], "y": [{"filter": "0.mlp", "value": 3}, {"value": [1, 2]}], "z": {"*": 1.0}},
        }
    )
    depths = {"embed": 0.0, "layers.0": 0.0, "layers.1": 1.0}
    found = plain_weights(coefficients, 0.5, layers, depths, ["x", "y", "z"])
    assert found == {
        "embed": {"x": 0.1, "y": 0.5, "z": 0.5},
        "layers.0.attn.weight": {"x": 0.1, "y": 0.5, "z": 0.5},
        "layers.0.mlp.weight": {"x": 0.1, "y": 1.5, "z": 0.5},
        "layers.1": {"x": 0.3, "y": 1.0, "z": 0.5},
    }
    assert row_of(found, "layers.0.mlp.weight", "layers.0")["y"] == 1.5
    assert row_of(found, "layers.1.mlp.weight", "layers.1")["y"] == 1.0
    doubled = scaled(found, Lines(first=2, last=1), {row: float("1" in row) for row in found})
    assert doubled["layers.0.mlp.weight"]["y"] == 3.0
    assert doubled["layers.1"] == found["layers.1"]
