"""Our methods against outputs of mergekit 0.1.5: what `record_mergekit.py` recorded, and the reference beside us."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sensmerge.tasks.methods.contract import METHODS, TaskVector, method_of
from sensmerge.tasks.methods.kernels.delta import Difference
from tests.conftest import SHARED
from tests.tasks.methods.pieces import whole_tensor

REFERENCE = SHARED / "reference" / "merge_methods.json"
RECORDED = Path(__file__).with_name("mergekit.safetensors")
with safe_open(RECORDED, "pt") as opened:
    METADATA = opened.metadata()
CASES: list[dict[str, Any]] = json.loads(METADATA["cases"])
WEIGHTS: list[float] = json.loads(METADATA["weights"])
TENSORS = load_file(RECORDED)
INPUTS = sorted(name.removesuffix(".base") for name in TENSORS if name.endswith(".base"))


def merged(
    base: torch.Tensor, experts: Sequence[torch.Tensor], weights: Sequence[float], settings: Mapping[str, Any]
) -> torch.Tensor:
    """Merge one tensor; settings given as lists are per expert."""
    names = [f"expert{k}" for k in range(len(experts))]
    by_expert = {
        key: dict(zip(names, value, strict=True)) if isinstance(value, list) else value
        for key, value in settings.items()
    }
    vectors = [
        TaskVector(name, "tensor", Difference(expert.reshape(-1)), weight, shape=tuple(base.shape))
        for name, expert, weight in zip(names, experts, weights, strict=True)
    ]
    method = method_of(by_expert)
    method.check_experts(len(experts))
    return whole_tensor(base, vectors, method)


def settings_of(method: str, parameters: Mapping[str, Any], has_base: bool) -> dict[str, Any]:
    """Ours: whether mergekit was given a base says what some methods mix."""
    found = {"method": method, **parameters}
    return found | {"task_vectors": has_base} if method in ("nuslerp", "multislerp") else found


def reference_cases() -> list[Any]:
    if not REFERENCE.is_file():
        return [pytest.param(None, marks=pytest.mark.skip(reason="needs ../shared"))]
    return [pytest.param(one, id=one["output"][4:]) for one in json.loads(REFERENCE.read_text())["cases"]]


@pytest.mark.shared
@pytest.mark.parametrize("case", reference_cases())
def test_reference_cases(case: dict[str, Any]) -> None:
    given, number = dict(case["parameters"]), case["tensor"]
    weights = given.pop("weight", [1.0] * case["experts"])
    with safe_open(REFERENCE.with_suffix(".safetensors"), framework="pt") as tensors:
        base = tensors.get_tensor(f"{number}.base")
        experts = [tensors.get_tensor(f"{number}.expert{k}") for k in range(case["experts"])]
        expected = tensors.get_tensor(case["output"])
    found = merged(base, experts, weights, settings_of(case["method"], given, case["base"]))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.shared
def test_no_reference_case_is_left_out() -> None:
    assert len([case for case in reference_cases() if case.values[0]]) == 66


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize(
    "place", [pytest.param(place, id=f"{place}-{one['method']}") for place, one in enumerate(CASES)]
)
def test_recorded_cases(place: int, inputs: str) -> None:
    case = CASES[place]
    parameters = {key: value for key, value in case["parameters"].items() if key != "weight"}
    weights = WEIGHTS[: case["experts"]] if "weight" in case["parameters"] else [1.0] * case["experts"]
    if case["method"] == "passthrough":
        parameters["scale"] = parameters["scale"][0]
    base = TENSORS[f"{inputs}.base"]
    experts = [TENSORS[f"{inputs}.expert{k}"] for k in range(case["experts"])]
    found = merged(base, experts, weights, settings_of(case["method"], parameters, case["base"]))
    torch.testing.assert_close(found, TENSORS[f"{inputs}.merged"][place], rtol=0, atol=1e-5)


def test_every_method_of_mergekit_is_there() -> None:
    compared = {case["method"] for case in CASES}
    assert len(compared | {"linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"}) == 20
    assert compared < set(METHODS)
