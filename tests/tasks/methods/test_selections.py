"""Methods that choose elements by variance, change or importance: sce, ram, ramplus_tl, nearswap, arcee_fusion."""

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

from sensmerge.tasks.methods.contract import TaskVector, method_of
from sensmerge.tasks.methods.kernels import delta as delta_module
from sensmerge.tasks.methods.kernels import loops
from sensmerge.tasks.methods.kernels.delta import BLOCK, Difference, Whole
from tests.tasks.methods.pieces import vector, whole_tensor

ONE: dict[str, dict[str, Any]] = {"nearswap": {"t": 0.1}, "arcee_fusion": {}, "passthrough": {}}
MANY: dict[str, dict[str, Any]] = {"sce": {"select_topk": 0.5}, "ram": {}, "ramplus_tl": {}}
ALL = ONE | MANY


def merge(name: str, base: torch.Tensor, deltas: Sequence[torch.Tensor], **settings: Any) -> torch.Tensor:
    vectors = [vector(delta, 1.0, f"{k}") for k, delta in enumerate(deltas)]
    return whole_tensor(base, vectors, method_of({"method": name, **ALL[name], **settings}))


def drawn(name: str, shape: tuple[int, ...] = (12, 17)) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base, and task vectors of as many experts as a method takes, a third of their elements zero."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator)
    kept = [torch.rand(shape, generator=generator) < 2 / 3 for _ in range(1 if name in ONE else 3)]
    return base, [one * torch.randn(shape, generator=generator) for one in kept]


# sce ------------------------------------------------------------------------------------------------------------------


def naive_sce(base: torch.Tensor, deltas: Sequence[torch.Tensor], top: float) -> torch.Tensor:
    """SCE element by element in float64, from the paper: select by variance, calculate shares, erase minorities."""
    columns = torch.stack([delta.flatten().double() for delta in deltas]).T.tolist()
    variances = [float(np.var(column)) for column in columns]
    keep = int(sum(one > 0 for one in variances) * top)
    chosen = (
        set(sorted(range(len(columns)), key=lambda i: -variances[i])[:keep]) if top < 1 else set(range(len(columns)))
    )
    columns = [column if i in chosen else [0.0] * len(column) for i, column in enumerate(columns)]
    squares = [sum(column[k] ** 2 for column in columns) for k in range(len(deltas))]
    shares = [one / sum(squares) for one in squares] if sum(squares) else [1 / len(deltas)] * len(deltas)
    merged = []
    for origin, column in zip(base.flatten().double().tolist(), columns, strict=True):
        sign = 1 if sum(column) >= 0 else -1
        agreeing = [(share, value) for share, value in zip(shares, column, strict=True) if value * sign > 0]
        total = sum(share for share, _ in agreeing)
        merged.append(origin + (sum(share * value for share, value in agreeing) / max(total, 1e-6)))
    return torch.tensor(merged, dtype=torch.float64).view_as(base)


@pytest.mark.parametrize("top", [0.0, 0.001, 0.1, 0.5, 0.99, 1.0])
def test_sce_of_the_paper(top: float) -> None:
    base, deltas = drawn("sce")
    found = merge("sce", base, deltas, select_topk=top)
    torch.testing.assert_close(found.double(), naive_sce(base, deltas, top), rtol=1e-5, atol=1e-5)
    if top <= 0.001:
        assert torch.equal(found, base)


def test_sce_of_tiny_task_vectors_counts_experts_equally() -> None:
    base, signs = torch.zeros(2), torch.tensor([1.0, -1.0])
    found = merge("sce", base, [1e-4 * signs, 3e-4 * signs], select_topk=1.0)
    torch.testing.assert_close(found, 2e-4 * signs)
    # Mean squares whose sum is 10⁻⁶ or more are shares.
    found = merge("sce", base, [1e-2 * signs, 3e-2 * signs], select_topk=1.0)
    torch.testing.assert_close(found, 2.8e-2 * signs)


@given(arrays("float32", st.tuples(st.integers(1, 6), st.integers(0, 2500)), elements=st.floats(-9, 9, width=32)))
def test_variance(values: np.ndarray) -> None:
    found = np.empty(values.shape[1], np.float32)
    loops.variance(values, found)
    np.testing.assert_allclose(found, values.astype(np.float64).var(0), rtol=1e-4, atol=1e-5)
    assert (found[(values == values[0]).all(0)] == 0).all() or len(values) > 1


# ram ------------------------------------------------------------------------------------------------------------------


def naive_ram(
    base: torch.Tensor, deltas: Sequence[torch.Tensor], epsilon: float, r: float, alpha: float
) -> torch.Tensor:
    """RAM(+) element by element in float64."""
    columns = torch.stack([delta.flatten().double() for delta in deltas]).T.tolist()
    changed = [[abs(value) > epsilon for value in column] for column in columns]
    factors = []
    for k in range(len(deltas)):
        own = sum(row[k] and sum(row) == 1 for row in changed)
        shared = sum(row[k] and sum(row) > 1 for row in changed)
        factors.append(1 + r * min(alpha, shared / own if own else math.inf if shared else 0))
    merged = []
    for origin, column, row in zip(base.flatten().double().tolist(), columns, changed, strict=True):
        kept = [value for value, is_changed in zip(column, row, strict=True) if is_changed]
        factor = factors[row.index(True)] if len(kept) == 1 else 1
        merged.append(origin + (factor * sum(kept) / len(kept) if kept else 0))
    return torch.tensor(merged, dtype=torch.float64).view_as(base)


@pytest.mark.parametrize("epsilon", [1e-5, 0.3])
def test_ram(epsilon: float) -> None:
    base, deltas = drawn("ram")
    found = merge("ram", base, deltas, epsilon=epsilon)
    torch.testing.assert_close(found.double(), naive_ram(base, deltas, epsilon, 0, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("r", "alpha"), [(0.1, 0.2), (0.5, 9.0), (0.0, 1.0)])
@pytest.mark.parametrize("epsilon", [1e-5, 0.9])
def test_ramplus(epsilon: float, r: float, alpha: float) -> None:
    base, deltas = drawn("ram")
    found = merge("ramplus_tl", base, deltas, epsilon=epsilon, r=r, alpha=alpha)
    torch.testing.assert_close(found.double(), naive_ram(base, deltas, epsilon, r, alpha), rtol=1e-5, atol=1e-6)


def test_ramplus_of_experts_with_nothing_of_their_own() -> None:
    base, (delta, *_) = drawn("ram")
    torch.testing.assert_close(merge("ramplus_tl", base, [delta, delta]), base + delta)
    torch.testing.assert_close(merge("ramplus_tl", base, [delta, 0 * delta]), base + delta)
    torch.testing.assert_close(merge("ramplus_tl", base, [delta, 0 * delta], epsilon=0.0), base + delta)


# one expert -----------------------------------------------------------------------------------------------------------


def test_nearswap_moves_no_element_further_than_t() -> None:
    base, (delta,) = drawn("nearswap")
    found = merge("nearswap", base, [delta], t=0.3)
    torch.testing.assert_close(found, base + delta.clamp(-0.3, 0.3))
    assert torch.equal(merge("nearswap", base, [delta], t=0.0), base)
    torch.testing.assert_close(merge("nearswap", base, [delta], t=99.0), base + delta)


def test_nearswap_of_differences_below_its_floor() -> None:
    base, delta = torch.zeros(2), torch.tensor([1e-7, -1e-7])
    torch.testing.assert_close(merge("nearswap", base, [delta], t=5e-7), 0.5 * delta)


def importance_of(base: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    before, after = ((one.float().softmax(-1) + 1e-8) for one in (base, base + delta))
    return delta.abs() * (after * (after / before).log()).sum(-1, keepdim=True)


@pytest.mark.parametrize("shape", [(12, 17), (40,), (3, 4, 5), (2000, 70)])
def test_arcee_fusion_takes_what_is_above_the_quartiles(shape: tuple[int, ...]) -> None:
    base, (delta,) = drawn("arcee_fusion", shape)
    importance = importance_of(base, delta)
    ordered = importance.flatten().sort().values
    first, median, third = (ordered[quarter * (len(ordered) - 1) // 4] for quarter in (1, 2, 3))
    expected = torch.where(importance >= median + 1.5 * (third - first), base + delta, base)
    torch.testing.assert_close(merge("arcee_fusion", base, [delta]), expected, rtol=0, atol=1e-6)


def test_arcee_fusion_where_rounding_makes_divergences_negative() -> None:
    base, (delta,) = drawn("arcee_fusion", (50, 64))
    delta *= 1e-5
    importance = importance_of(base, delta)
    assert (importance < 0).any()
    ordered = importance.flatten().sort().values
    first, median, third = (ordered[quarter * (len(ordered) - 1) // 4] for quarter in (1, 2, 3))
    chosen = (importance >= median + 1.5 * (third - first)) & (delta != 0)
    found = merge("arcee_fusion", base, [delta]) != base
    # δ of a few 10⁻⁵ is not lost when it is added to a base of about 1.
    assert (found & ~chosen).sum() == 0
    assert (found & chosen).sum() > 0.95 * chosen.sum()


def test_arcee_fusion_of_an_unchanged_tensor_is_the_base() -> None:
    base, (delta,) = drawn("arcee_fusion")
    assert torch.equal(merge("arcee_fusion", base, [0 * delta]), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_passthrough_changes_no_bit(dtype: torch.dtype) -> None:
    base, (delta,) = drawn("passthrough", (700, 300))
    expert = (base + 1e-3 * delta).to(dtype)
    given = TaskVector("one", "tensor", Difference(expert.flatten()), 1.0)
    found = whole_tensor(base.to(dtype), [given], method_of({"method": "passthrough"}))
    assert torch.equal(found.to(dtype), expert)
    half = whole_tensor(base.to(dtype), [given], method_of({"method": "passthrough", "scale": 0.5}))
    assert torch.equal(half, 0.5 * expert.float())
    adapted = TaskVector("one", "tensor", Whole(delta.flatten()), 1.0)
    found = whole_tensor(base.to(dtype), [adapted], method_of({"method": "passthrough"}))
    torch.testing.assert_close(found, base.to(dtype).float() + delta)


# all ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_hidden_that_is_no_number(name: str) -> None:
    base, deltas = drawn(name)
    deltas[0][2, 3] = math.nan
    settings = {"select_topk": 1.0} if name == "sce" else {}
    assert merge(name, base, deltas, **settings)[2, 3].isnan()


@pytest.mark.parametrize("name", MANY)
def test_order_of_experts_does_not_matter(name: str) -> None:
    base, deltas = drawn(name)
    first = merge(name, base, deltas)
    for order in itertools.permutations(deltas):
        torch.testing.assert_close(merge(name, base, order), first, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_identical_experts_are_themselves(name: str, count: int) -> None:
    base, (delta, *_) = drawn(name)
    settings: dict[str, Any] = {"select_topk": 1.0} if name == "sce" else {"r": 0.0} if name == "ramplus_tl" else {}
    torch.testing.assert_close(merge(name, base, [delta] * count, **settings), base + delta, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MANY)
def test_scale(name: str) -> None:
    base, deltas = drawn(name)
    once = merge(name, base, deltas) - base
    settings = {"epsilon": 4e-5} if name != "sce" else {}
    found = merge(name, base, [4 * delta for delta in deltas], **settings) - base
    torch.testing.assert_close(found, 4 * once, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (3, 0), (2, 3, 4)])
@pytest.mark.parametrize("name", ALL)
def test_any_shape(name: str, shape: tuple[int, ...]) -> None:
    base, deltas = drawn(name, shape)
    found = merge(name, base, deltas)
    assert found.shape == shape
    assert found.dtype == torch.float32
    assert found.isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_inputs_are_left_alone(name: str) -> None:
    base, deltas = drawn(name)
    before = [one.clone() for one in (base, *deltas)]
    merge(name, base, deltas)
    assert all(torch.equal(*pair) for pair in zip(before, (base, *deltas), strict=True))


@pytest.mark.parametrize("name", ALL)
def test_size_of_chunks_changes_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, deltas = drawn(name, (3, BLOCK + 77))
    found = []
    for size in (BLOCK, 2 * BLOCK, 8 * BLOCK):
        monkeypatch.setattr(delta_module, "CHUNK", size)
        found.append(merge(name, base, deltas))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
