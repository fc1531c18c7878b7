import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sensmerge.tasks.methods.contract import TaskVector, method_of
from sensmerge.tasks.methods.kernels.delta import Unchanged, Whole
from sensmerge.tasks.methods.kernels.singular import isometry, singular
from tests.tasks.methods.pieces import whole_tensor

NAMES = ["tsv_m", "iso_c", "iso_cts"]


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SHAPES = [(12, 17), (17, 12), (12, 12)]
WEIGHTS = [0.5, 0.3, 0.4]


def deltas_of(shape: tuple[int, ...], count: int = 3) -> list[Tensor]:
    return [randn(k + 1, *shape) for k in range(count)]


def vectors(deltas: Sequence[Tensor], weights: Sequence[float] | None = None) -> list[TaskVector]:
    weights = [1.0] * len(deltas) if weights is None else weights
    return [
        TaskVector(f"{k}", "tensor", Whole(delta.reshape(-1)), weight)
        for k, (delta, weight) in enumerate(zip(deltas, weights, strict=True))
    ]


def added(name: str, given: list[TaskVector], shape: tuple[int, ...]) -> Tensor:
    """What a method adds to a base of zeros."""
    return whole_tensor(torch.zeros(shape), given, method_of({"method": name}))


def naive_tsv(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """TSV-M as in the paper, with LAPACK's decompositions."""
    count = min(deltas[0].shape) // len(deltas)
    left, values, right = [], [], []
    for delta, weight in zip(deltas, weights, strict=True):
        u, s, vh = torch.linalg.svd(delta.double() * weight, full_matrices=False)
        left.append(u[:, :count])
        values.append(s[:count])
        right.append(vh[:count])
    (pu, _, qu), (pv, _, qv) = (
        torch.linalg.svd(matrix, full_matrices=False) for matrix in (torch.cat(left, 1), torch.cat(right))
    )
    return pu @ qu @ torch.diag(torch.cat(values)) @ pv @ qv


def naive_iso(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = sum(weight * delta.double() for weight, delta in zip(weights, deltas, strict=True))
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    return s.mean() * u @ vh


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize(("name", "naive"), [("tsv_m", naive_tsv), ("iso_c", naive_iso)])
def test_formulas(name: str, naive: type, count: int, shape: tuple[int, ...]) -> None:
    deltas, weights = deltas_of(shape, count), [0.5 + k for k in range(count)]
    expected = naive(deltas, weights)
    torch.testing.assert_close(added(name, vectors(deltas, weights), shape).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_weight_scales_what_is_added(name: str) -> None:
    assert method_of({"method": name}).scales_with_weight()
    deltas = deltas_of((12, 17))
    once, twice = (added(name, vectors(deltas, [f * w for w in WEIGHTS]), (12, 17)) for f in (1, 2))
    torch.testing.assert_close(twice, 2 * once, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_order_of_experts_does_not_matter(name: str) -> None:
    given = vectors(deltas_of((12, 17)), WEIGHTS)
    first = added(name, given, (12, 17))
    for order in itertools.permutations(given):
        torch.testing.assert_close(added(name, list(order), (12, 17)), first, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(5,), (2, 9), (9, 2), (4, 3, 5), ()])
def test_what_is_no_matrix_or_too_narrow_gets_the_mean(name: str, shape: tuple[int, ...]) -> None:
    deltas = deltas_of(shape)
    expected = sum(w * delta for w, delta in zip(WEIGHTS, deltas, strict=True)) / 3
    torch.testing.assert_close(added(name, vectors(deltas, WEIGHTS), shape), expected)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_comes_of_nothing(name: str) -> None:
    base = randn(0, 12, 17)
    how = method_of({"method": name})
    assert torch.equal(whole_tensor(base, vectors(deltas_of((12, 17)), [0.0] * 3), how), base)
    unchanged = [replace(one, delta=Unchanged(base.numel())) for one in vectors(deltas_of((12, 17)))]
    assert torch.equal(whole_tensor(base, unchanged, how), base)


def test_one_expert_of_tsv_m_is_itself() -> None:
    delta = randn(1, 12, 17)
    torch.testing.assert_close(added("tsv_m", vectors([delta]), (12, 17)), delta, rtol=1e-4, atol=1e-5)


def test_orthogonal_task_vectors_are_kept_whole_by_tsv_m() -> None:
    deltas = [torch.zeros(12, 17) for _ in range(3)]
    for k, delta in enumerate(deltas):
        delta[4 * k : 4 * k + 4, 5 * k : 5 * k + 4] = randn(k, 4, 4)
    torch.testing.assert_close(added("tsv_m", vectors(deltas), (12, 17)), sum(deltas), rtol=1e-4, atol=1e-5)


def test_equal_experts_of_tsv_m_give_their_largest_part() -> None:
    """What their singular vectors do not span stays as it is, however often they come."""
    delta = randn(1, 12, 17)
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    expected = (u[:, :4] * s[:4]) @ vh[:4]
    torch.testing.assert_close(added("tsv_m", vectors([delta] * 3), (12, 17)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_factors_give_what_their_product_does(name: str, shape: tuple[int, int]) -> None:
    rows, columns = shape
    pairs = [(randn(k, 2, columns), randn(k + 5, rows, 2), 0.5 + k) for k in range(3)]
    whole = vectors([scaling * second @ first for first, second, scaling in pairs], WEIGHTS)
    low_rank = [
        replace(one, delta=Unchanged(0), factors=lambda pair=pair: pair) for one, pair in zip(whole, pairs, strict=True)
    ]
    expected = added(name, whole, shape)
    torch.testing.assert_close(added(name, low_rank, shape), expected, rtol=1e-4, atol=1e-5)
    mixed = [low_rank[0], whole[1], low_rank[2]]
    torch.testing.assert_close(added(name, mixed, shape), expected, rtol=1e-4, atol=1e-5)


def test_iso_c_keeps_to_the_directions_that_there_are() -> None:
    """Of a sum of low rank, the nuclear norm is spread over that rank, and nothing arbitrary is added."""
    total = randn(1, 12, 3) @ randn(2, 3, 17)
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    found = added("iso_c", vectors([total / 2] * 2), (12, 17))
    torch.testing.assert_close(found, s.sum() / 3 * u[:, :3] @ vh[:3], rtol=1e-4, atol=1e-5)


def naive_cts(deltas: Sequence[Tensor], weights: Sequence[float], common: float) -> Tensor:
    """Iso-CTS as in FusionBench, with LAPACK's decompositions."""
    scaled = [weight * delta.double() for weight, delta in zip(weights, deltas, strict=True)]
    rank, count = min(deltas[0].shape), len(deltas)
    own = round((rank - int(rank * common)) / count)
    u, s, vh = torch.linalg.svd(sum(scaled), full_matrices=False)
    shared = rank - own * count
    left, values, right = [u[:, :shared]], [s[:shared]], [vh[:shared]]
    for one in scaled:
        u, s, vh = torch.linalg.svd(one - left[0] @ left[0].T @ one, full_matrices=False)
        left.append(u[:, :own])
        values.append(s[:own])
        right.append(vh[:own])
    (pu, _, qu), (pv, _, qv) = (
        torch.linalg.svd(matrix, full_matrices=False) for matrix in (torch.cat(left, 1), torch.cat(right))
    )
    return torch.cat(values).mean() * pu @ qu @ pv @ qv


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("common", [0.3, 0.8, 1.0])
def test_formula_of_iso_cts(common: float, shape: tuple[int, int]) -> None:
    deltas = deltas_of(shape)
    found = whole_tensor(
        torch.zeros(shape), vectors(deltas, WEIGHTS), method_of({"method": "iso_cts", "common": common})
    )
    torch.testing.assert_close(found.double(), naive_cts(deltas, WEIGHTS, common), rtol=1e-4, atol=1e-5)


def test_iso_cts_with_only_common_directions_is_iso_c() -> None:
    given = vectors(deltas_of((12, 17)), WEIGHTS)
    all_common, none = (method_of({"method": "iso_cts", "common": share}) for share in (1.0, 0.0))
    expected = added("iso_c", given, (12, 17))
    torch.testing.assert_close(whole_tensor(torch.zeros(12, 17), given, all_common), expected, rtol=1e-4, atol=1e-6)
    assert torch.linalg.matrix_rank(whole_tensor(torch.zeros(12, 17), given, none), rtol=1e-3) == 12


@given(
    shape=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    rank=st.integers(0, 8),
    count=st.none() | st.integers(1, 8),
    scale=st.sampled_from([1e-12, 1.0, 1e6]),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_singular_vectors(shape: tuple[int, int], rank: int, count: int | None, scale: float, seed: int) -> None:
    matrix = scale * (randn(seed, shape[0], rank) @ randn(seed + 1, rank, shape[1])).double()
    found = singular(matrix, count)
    expected = torch.linalg.svdvals(matrix)[: min(shape) if count is None else count]
    kept = len(found.values)
    torch.testing.assert_close(found.values, expected[:kept], rtol=1e-6, atol=1e-12 * scale)
    assert bool((expected[kept:] <= 1e-5 * expected[:1]).all())
    for side in (found.left, found.right):
        torch.testing.assert_close(side.T @ side, torch.eye(kept).double(), rtol=0, atol=1e-5)
    if count is None:
        restored = (found.left * found.values) @ found.right.T
        torch.testing.assert_close(restored, matrix, rtol=0, atol=1e-5 * scale * (1 + rank))


def test_the_nearest_isometry_of_dependent_vectors_stays_in_their_range() -> None:
    unit = torch.linalg.qr(randn(0, 9, 3).double())[0]
    found = isometry(torch.cat([unit, unit], 1))
    torch.testing.assert_close(found, torch.cat([unit, unit], 1) / 2**0.5)
    alone = isometry(randn(1, 9, 4).double())
    torch.testing.assert_close(alone.T @ alone, torch.eye(4).double())
