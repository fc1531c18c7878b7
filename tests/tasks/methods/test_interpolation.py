"""Interpolation by lengths and angles against closed forms, and against float64 on the vectors themselves."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.methods.contract import method_of
from sensmerge.tasks.methods.kernels import delta as delta_module
from sensmerge.tasks.methods.kernels.delta import BLOCK, Difference, Whole
from sensmerge.tasks.methods.kernels.products import inner_products
from sensmerge.tasks.methods.remarks import remarks
from tests.tasks.methods.pieces import vector, whole_tensor

Tensors = Sequence[torch.Tensor]
WEIGHTS = [0.5, 0.3, 0.4]
ONE: dict[str, dict[str, Any]] = {"slerp": {"t": 0.3}}
TWO: dict[str, dict[str, Any]] = {"nuslerp": {}}
MANY: dict[str, dict[str, Any]] = {"multislerp": {}, "karcher": {}, "model_stock": {}}
ALL = ONE | TWO | MANY


def merge(
    name: str, base: torch.Tensor, experts: Tensors, weights: Sequence[float] = (), **settings: Any
) -> torch.Tensor:
    given = weights or [1.0] * len(experts)
    vectors = [vector(one - base, weight, f"{k}") for k, (one, weight) in enumerate(zip(experts, given, strict=True))]
    return whole_tensor(base, vectors, method_of({"method": name, **ALL[name], **settings}))


def models(name: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base, and as many experts as a method takes."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(12, 17, generator=generator)
    count = 1 if name in ONE else 2 if name in TWO else 3
    return base, [base + 0.5 * torch.randn(12, 17, generator=generator) for _ in range(count)]


def angle(first: torch.Tensor, second: torch.Tensor) -> float:
    one, other = first.flatten().double(), second.flatten().double()
    return math.acos(float((one @ other / (one.norm() * other.norm())).clamp(-1, 1)))


@pytest.fixture
def three() -> tuple[torch.Tensor, list[torch.Tensor]]:
    return models("karcher")


# slerp ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_slerp_goes_along_a_quarter_circle(t: float) -> None:
    base, expert = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    expected = torch.tensor([math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)])
    torch.testing.assert_close(merge("slerp", base, [expert], t=t), expected)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.7])
def test_slerp_of_equal_lengths_keeps_the_length_and_turns_evenly(t: float) -> None:
    generator = torch.Generator().manual_seed(3)
    base, expert = (torch.nn.functional.normalize(torch.randn(300, generator=generator), dim=0) for _ in range(2))
    found = merge("slerp", base, [expert], t=t)
    assert float(found.norm()) == pytest.approx(1, rel=1e-6)
    assert angle(base, found) == pytest.approx(t * angle(base, expert), rel=1e-5)
    torch.testing.assert_close(found, merge("slerp", expert, [base], t=1 - t))


def test_slerp_of_collinear_models_is_a_line() -> None:
    base = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    for factor in (1.0, 3.0):
        torch.testing.assert_close(merge("slerp", base, [factor * base], t=0.25), (0.75 + 0.25 * factor) * base)


def test_slerp_of_antipodal_models_is_a_line_and_says_so() -> None:
    base = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    with remarks() as said:
        found = merge("slerp", base, [-2 * base], t=0.25)
    torch.testing.assert_close(found, (0.75 - 0.5) * base)
    assert said == ["base and expert point in opposite directions, so they were mixed along a line"]


def test_slerp_of_a_zero_model_counts_it_as_orthogonal() -> None:
    """As mergekit does: its length of 0 is divided by as by 1."""
    expert, zero = torch.randn(9, generator=torch.Generator().manual_seed(0)), torch.zeros(9)
    torch.testing.assert_close(merge("slerp", zero, [expert], t=0.25), math.sin(math.pi / 8) * expert)
    torch.testing.assert_close(merge("slerp", expert, [zero], t=0.25), math.sin(3 * math.pi / 8) * expert)
    assert torch.equal(merge("slerp", zero, [zero], t=0.25), zero)


# nuslerp --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task_vectors", [True, False])
def test_nuslerp_is_slerp_with_the_second_share_of_the_weights(task_vectors: bool) -> None:
    base, experts = models("nuslerp")
    found = merge("nuslerp", base, experts, [0.5, 0.3], task_vectors=task_vectors)
    first, second = (one - base for one in experts) if task_vectors else experts
    expected = merge("slerp", first, [second], t=0.3 / 0.8)
    torch.testing.assert_close(found, base + expected if task_vectors else expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("task_vectors", [True, False])
def test_nuslerp_by_rows_and_columns(task_vectors: bool) -> None:
    base, experts = models("nuslerp")
    given: dict[str, Any] = {"task_vectors": task_vectors, "nuslerp_flatten": False}
    rows = merge("nuslerp", base, experts, [0.5, 0.3], **given)
    for number, row in enumerate(rows):
        one = merge(
            "nuslerp", base[number], [expert[number] for expert in experts], [0.5, 0.3], task_vectors=task_vectors
        )
        torch.testing.assert_close(row, one)
    columns = merge("nuslerp", base, experts, [0.5, 0.3], nuslerp_row_wise=True, **given)
    transposed = merge("nuslerp", base.T.contiguous(), [one.T.contiguous() for one in experts], [0.5, 0.3], **given)
    torch.testing.assert_close(columns, transposed.T)
    assert not torch.allclose(rows, columns, atol=1e-3)


def test_nuslerp_of_weights_that_cancel_is_the_middle() -> None:
    base, experts = models("nuslerp")
    torch.testing.assert_close(
        merge("nuslerp", base, experts, [1.0, -1.0]), merge("nuslerp", base, experts, [1.0, 1.0])
    )


def test_nuslerp_of_antipodal_task_vectors_is_a_line() -> None:
    base, (expert, _) = models("nuslerp")
    delta = expert - base
    found = merge("nuslerp", base, [base + delta, base - delta], [3.0, 1.0])
    torch.testing.assert_close(found, base + 0.5 * delta, rtol=1e-5, atol=1e-5)


# multislerp -----------------------------------------------------------------------------------------------------------


def tangent_multislerp(vectors: Tensors, weights: Sequence[float], eps: float = 1e-8) -> torch.Tensor:
    """In float64 on the vectors themselves, with the step along the tangent."""
    flat = torch.stack([one.flatten().double() for one in vectors])
    shares = torch.tensor(weights, dtype=torch.float64)[:, None]
    lengths = flat.norm(dim=1, keepdim=True)
    units = flat / (lengths + eps)
    mean = torch.nn.functional.normalize((shares * units).sum(0), dim=0)
    tangent = (shares * (units - (units @ mean)[:, None] * mean)).sum(0)
    step = tangent.norm() + eps
    found = mean * step.cos() + tangent * step.sin() / step
    return (found * (shares * lengths).sum()).view(vectors[0].shape).float()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("task_vectors", [True, False])
def test_multislerp(task_vectors: bool, normalize: bool, three: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    base, experts = three
    shares = [weight / sum(WEIGHTS) for weight in WEIGHTS] if normalize else WEIGHTS
    vectors = [one - base for one in experts] if task_vectors else experts
    expected = tangent_multislerp(vectors, shares) + (base if task_vectors else 0)
    found = merge("multislerp", base, experts, WEIGHTS, task_vectors=task_vectors, normalize_weights=normalize)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_multislerp_scales_with_task_vectors_and_weights(three: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    base, experts = three
    once = merge("multislerp", base, experts, WEIGHTS) - base
    wide = merge("multislerp", base, [base + 3 * (one - base) for one in experts], WEIGHTS) - base
    torch.testing.assert_close(wide, 3 * once, rtol=1e-5, atol=1e-5)
    for settings in ({}, {"normalize_weights": False}, {"task_vectors": False, "normalize_weights": False}):
        how = method_of({"method": "multislerp", **settings})
        first, second = (
            merge("multislerp", base, experts, [factor * one for one in WEIGHTS], **settings) - base
            for factor in (1, 2)
        )
        assert torch.allclose(second, 2 * first, rtol=1e-5, atol=1e-5) == how.scales_with_weight()
        assert torch.allclose(second, first, rtol=1e-5, atol=1e-5) != how.depends_on_weight()


def test_multislerp_of_one_expert_is_the_expert() -> None:
    base, experts = models("slerp")
    for task_vectors in (True, False):
        found = merge("multislerp", base, experts, [0.3], task_vectors=task_vectors)
        torch.testing.assert_close(found, experts[0])


def test_multislerp_of_directions_that_cancel() -> None:
    base, (expert,) = models("slerp")
    delta = expert - base
    with remarks() as said:
        found = merge("multislerp", base, [base + 2 * delta, base - delta], [0.5, 0.5])
    torch.testing.assert_close(found, base + 0.5 * delta, rtol=1e-5, atol=1e-5)
    assert said == ["the directions of the experts cancel, so they were mixed along a line"]
    third = 2 * math.pi / 3
    corners = [torch.tensor([math.cos(k * third), math.sin(k * third)]) for k in range(3)]
    with pytest.raises(InputError, match="method multislerp: the weighted directions of the experts cancel"):
        merge("multislerp", torch.zeros(2), corners)


def test_multislerp_of_task_vectors_that_are_all_zero_is_the_base() -> None:
    base, _ = models("slerp")
    assert torch.equal(merge("multislerp", base, [base.clone()] * 3), base)


def test_multislerp_does_not_divide_by_zero() -> None:
    with pytest.raises(ValueError, match="the weights sum to 0, which multislerp divides by"):
        method_of({"method": "multislerp"}).check_weights([1.0, -1.0])
    method_of({"method": "multislerp", "normalize_weights": False}).check_weights([1.0, -1.0])


# karcher --------------------------------------------------------------------------------------------------------------


def test_karcher_mean_is_where_the_ways_to_the_experts_cancel(three: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    base, experts = three
    experts = [torch.randn(12, 17, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    found = merge("karcher", base, experts, max_iter=100, tol=1e-9).flatten().double()
    mean, ways = found / found.norm(), torch.zeros_like(found)
    for one in experts:
        unit = torch.nn.functional.normalize(one.flatten().double(), dim=0)
        cosine = unit @ mean
        ways += cosine.acos() / cosine.acos().sin() * (unit - cosine * mean)
    assert float(ways.norm()) < 1e-6
    assert float(found.norm()) == pytest.approx(float(np.mean([float(one.norm()) for one in experts])), rel=1e-6)


def test_karcher_mean_of_two_is_the_middle_of_the_arc() -> None:
    base, (first, second) = models("nuslerp")
    units = [one / one.norm() for one in (first, second)]
    middle = merge("slerp", units[0], [units[1]], t=0.5)
    expected = middle * (first.norm() + second.norm()) / 2
    torch.testing.assert_close(merge("karcher", base, [first, second]), expected, rtol=1e-5, atol=1e-5)


def test_karcher_mean_of_antipodal_experts_has_the_first_ones_direction() -> None:
    one = torch.randn(7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(merge("karcher", torch.zeros(7), [one, -3 * one]), 2 * one)


def test_karcher_mean_counts_zero_experts_in_the_length_alone() -> None:
    one = torch.randn(7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(merge("karcher", torch.zeros(7), [one, torch.zeros(7)]), one / 2)
    assert torch.equal(merge("karcher", torch.zeros(7), [torch.zeros(7)] * 2), torch.zeros(7))


# model_stock ----------------------------------------------------------------------------------------------------------


def test_model_stock_by_the_papers_formula(three: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    base, experts = three
    deltas = [(one - base).flatten().double() for one in experts]
    cosine = np.mean([math.cos(angle(one, other)) for one, other in itertools.combinations(deltas, 2)])
    ratio = 3 * cosine / (1 + 2 * cosine)
    expected = ratio * torch.stack(experts).double().mean(0) + (1 - ratio) * base.double()
    torch.testing.assert_close(merge("model_stock", base, experts), expected.float(), rtol=1e-5, atol=1e-6)


def test_model_stock_by_filters_is_row_by_row(three: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    base, experts = three
    found = merge("model_stock", base, experts, filter_wise=True)
    for number, row in enumerate(found):
        alone = merge("model_stock", base[number], [one[number] for one in experts])
        torch.testing.assert_close(row, alone, rtol=1e-5, atol=1e-5)


def test_model_stock_of_orthogonal_task_vectors_is_the_base() -> None:
    base = torch.ones(3)
    torch.testing.assert_close(merge("model_stock", base, list(base + torch.eye(3))), base)


def test_model_stock_of_task_vectors_that_cancel_is_the_base_and_says_so() -> None:
    base, delta = torch.ones(4), torch.tensor([1.0, -2.0, 0.5, 3.0])
    with remarks() as said:
        assert torch.equal(merge("model_stock", base, [base + delta, base - delta]), base)
    assert said == ["task vectors point away from each other, where the ratio of the mean is not between 0 and 1"]


# All ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_hidden_that_is_no_number(name: str) -> None:
    base, experts = models(name)
    for bad in (math.nan, math.inf):
        experts[0][2, 3] = bad
        assert not merge(name, base, experts)[2, 3].isfinite()


@pytest.mark.parametrize("name", TWO | MANY)
def test_identical_experts_are_themselves(name: str) -> None:
    base, (expert, *_) = models(name)
    count = 2 if name in TWO else 4
    torch.testing.assert_close(merge(name, base, [expert] * count), expert, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TWO | MANY)
def test_order_of_experts_does_not_matter(name: str) -> None:
    base, experts = models(name)
    weights = WEIGHTS[: len(experts)]
    first = merge(name, base, experts, weights)
    for order in itertools.permutations(range(len(experts))):
        found = merge(name, base, [experts[k] for k in order], [weights[k] for k in order])
        torch.testing.assert_close(found, first, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (3, 0), (2, 3, 4)])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in ALL),
        ("nuslerp", {"nuslerp_flatten": False}),
        ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
        ("model_stock", {"filter_wise": True}),
    ],
)
def test_any_shape(name: str, settings: dict[str, Any], shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator)
    experts = [base + torch.randn(shape, generator=generator) for _ in models(name)[1]]
    found = merge(name, base, experts, **settings)
    assert found.shape == shape
    assert found.dtype == torch.float32
    assert found.isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_inputs_are_left_alone(name: str) -> None:
    base, experts = models(name)
    before = [one.clone() for one in (base, *experts)]
    merge(name, base, experts)
    assert all(torch.equal(*pair) for pair in zip(before, (base, *experts), strict=True))


@pytest.mark.parametrize("name", ALL)
def test_size_of_chunks_changes_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(3 * BLOCK + 77, generator=generator)
    experts = [base + torch.randn(len(base), generator=generator) for _ in models(name)[1]]
    found = []
    for size in (BLOCK, 2 * BLOCK, 8 * BLOCK):
        monkeypatch.setattr(delta_module, "CHUNK", size)
        found.append(merge(name, base, experts))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


finite = st.floats(-100, 100, width=32)


@given(arrays("float32", st.tuples(st.integers(1, 4), st.integers(0, 3000)), elements=finite))
def test_inner_products(values: np.ndarray) -> None:
    base, *deltas = torch.from_numpy(values)
    found = inner_products(base, [Whole(one) for one in deltas], np.eye(len(values)))
    exact = values.astype(np.float64) @ values.astype(np.float64).T
    np.testing.assert_allclose(found, exact, rtol=1e-12, atol=1e-9)


@given(arrays("float32", st.tuples(st.integers(2, 4), st.integers(0, 3000)), elements=finite))
def test_inner_products_of_base_and_experts(values: np.ndarray) -> None:
    base, *experts = torch.from_numpy(values)
    made_of = np.eye(len(values))
    made_of[:, 0] = 1
    found = inner_products(base, [Difference(one) for one in experts], made_of)
    exact = values.astype(np.float64) @ values.astype(np.float64).T
    np.testing.assert_allclose(found, exact, rtol=1e-12, atol=1e-9)


@given(arrays("float32", (2, 6), elements=finite), st.floats(0, 1))
def test_slerp_never_makes_what_is_no_number(values: np.ndarray, t: float) -> None:
    base, expert = torch.from_numpy(values)
    assert merge("slerp", base, [expert], t=t).isfinite().all()


@pytest.mark.parametrize("name", ["karcher", "model_stock"])
def test_scale(name: str) -> None:
    base, experts = models(name)
    once = merge(name, base, experts)
    torch.testing.assert_close(merge(name, 4 * base, [4 * one for one in experts]), 4 * once, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_experts_that_are_next_to_nothing_beside_the_base(name: str) -> None:
    """Their squared length is the difference of numbers that are many times larger."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        base = 1e3 * torch.randn(40, generator=generator)
        experts = [1e-7 * torch.randn(40, generator=generator) for _ in models(name)[1]]
        settings = {"task_vectors": False} if name in ("nuslerp", "multislerp") else {}
        assert merge(name, base, experts, **settings).isfinite().all()
