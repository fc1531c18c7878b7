import itertools
from typing import Any

import pytest
import torch

from sensmerge.tasks.methods.contract import METHODS, Additive, TaskVector, method_of
from sensmerge.tasks.methods.kernels import delta as delta_module
from sensmerge.tasks.methods.kernels.delta import BLOCK, CHUNK, Difference, Whole
from sensmerge.tasks.methods.kernels.sparsify import norm_ratio
from tests.tasks.methods.pieces import agreed_contributions, contribution, joined, vector, whole_tensor

SPARSE = [
    "ties",
    "dare_linear",
    "dare_ties",
    "breadcrumbs",
    "breadcrumbs_ties",
    "della",
    "della_linear",
]
NAMES = ["linear", "task_arithmetic", *SPARSE]
WEIGHTS = [0.5, 0.3, 0.4]


def of(name: str, density: Any = None, **settings: Any) -> Additive:
    """A method with its settings, `density` among them if it has one; the others are mergekit's defaults."""
    given = {"density": density} if density is not None and name in SPARSE else {}
    found = method_of({"method": name, **given, **settings})
    assert isinstance(found, Additive)
    return found


def vectors(deltas: list[torch.Tensor], weights: list[float]) -> list[TaskVector]:
    return [vector(delta, weight, f"expert{i}") for i, (delta, weight) in enumerate(zip(deltas, weights, strict=True))]


@pytest.fixture
def base() -> torch.Tensor:
    return torch.randn(12, 17, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def deltas() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(12, 17, generator=generator) for _ in range(3)]


def naive_ties(
    base: torch.Tensor, deltas: list[torch.Tensor], weights: list[float], density: float, normalize: bool
) -> torch.Tensor:
    """TIES element by element in float64, from the paper: trim, elect signs, take the weighted disjoint mean."""
    trimmed = []
    for delta in deltas:
        values = delta.double().flatten().tolist()
        kept = sorted(range(len(values)), key=lambda i: -abs(values[i]))[: max(1, int(density * len(values)))]
        trimmed.append([value if i in set(kept) else 0.0 for i, value in enumerate(values)])
    merged = []
    for i, origin in enumerate(base.double().flatten().tolist()):
        scaled = [weight * column[i] for weight, column in zip(weights, trimmed, strict=True)]
        sign = 1 if sum(scaled) >= 0 else -1
        agreeing = [(weight, value) for weight, value in zip(weights, scaled, strict=True) if value * sign > 0]
        divisor = sum(weight for weight, _ in agreeing) if normalize and agreeing else 1.0
        merged.append(origin + sum(value for _, value in agreeing) / divisor)
    return torch.tensor(merged, dtype=torch.float64).view_as(base)


def test_linear_is_the_mean_of_the_experts(base: torch.Tensor, deltas: list[torch.Tensor]) -> None:
    experts = [(base + delta).double() for delta in deltas]
    total = sum(w * e for w, e in zip(WEIGHTS, experts, strict=True))
    mean = whole_tensor(base, vectors(deltas, WEIGHTS), of("linear"))
    torch.testing.assert_close(mean, (total / sum(WEIGHTS)).float(), rtol=1e-6, atol=1e-6)
    raw = whole_tensor(base, vectors(deltas, WEIGHTS), of("linear", normalize=False))
    torch.testing.assert_close(raw, total.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lambda_", [1.0, 0.7])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("method", ["task_arithmetic", "dare_linear"])
def test_sum_of_task_vectors(
    method: str, normalize: bool, lambda_: float, base: torch.Tensor, deltas: list[torch.Tensor]
) -> None:
    mixed = sum(w * d.double() for w, d in zip(WEIGHTS, deltas, strict=True)) / (sum(WEIGHTS) if normalize else 1)
    merged = whole_tensor(base, vectors(deltas, WEIGHTS), of(method, normalize=normalize, **{"lambda": lambda_}))
    torch.testing.assert_close(merged, (base + lambda_ * mixed).float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("density", [1.0, 0.4, 0.001])
@pytest.mark.parametrize("weights", [WEIGHTS, [1.0, -0.5, 0.2], [0.0, 1.0, 0.0]])
def test_ties_of_the_paper(
    weights: list[float], density: float, normalize: bool, base: torch.Tensor, deltas: list[torch.Tensor]
) -> None:
    merged = whole_tensor(base, vectors(deltas, weights), of("ties", density, normalize=normalize))
    expected = naive_ties(base, deltas, weights, density, normalize)
    torch.testing.assert_close(merged.double(), expected, rtol=1e-5, atol=1e-5)


def naive_breadcrumbs(delta: torch.Tensor, density: float, gamma: float) -> torch.Tensor:
    """Model Breadcrumbs on a sorted list: the largest share gamma goes, then as much as density says stays."""
    values = delta.flatten().tolist()
    keep = int(density * len(values))
    outliers = min(int(gamma * len(values)), len(values) - keep)
    kept = sorted(range(len(values)), key=lambda i: -abs(values[i]))[outliers : outliers + keep]
    return torch.tensor([value if i in set(kept) else 0.0 for i, value in enumerate(values)]).view_as(delta)


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize(("density", "gamma"), [(0.6, 0.05), (0.9, 0.3), (0.3, 0.0), (0.001, 0.1), (0.5, 1.0)])
def test_breadcrumbs_of_the_paper(
    density: float, gamma: float, coarse: bool, base: torch.Tensor, deltas: list[torch.Tensor]
) -> None:
    """Coarse task vectors have many elements of equal magnitude."""
    given = [delta.round() if coarse else delta for delta in deltas]
    sparse = [naive_breadcrumbs(delta, density, gamma) for delta in given]
    expected = base + sum(weight * one for weight, one in zip(WEIGHTS, sparse, strict=True))
    found = whole_tensor(base, vectors(given, WEIGHTS), of("breadcrumbs", density, gamma=gamma))
    torch.testing.assert_close(found, expected)
    ties = whole_tensor(base, vectors(given, WEIGHTS), of("breadcrumbs_ties", density, gamma=gamma, normalize=True))
    torch.testing.assert_close(ties, naive_ties(base, sparse, WEIGHTS, 1.0, True).float(), rtol=1e-5, atol=1e-5)


def test_breadcrumbs_per_expert(base: torch.Tensor, deltas: list[torch.Tensor]) -> None:
    gammas, densities = {"expert0": 0.0, "expert1": 0.2}, {"expert0": 0.3, "expert1": 0.7}
    found = whole_tensor(base, vectors(deltas[:2], [1.0, 1.0]), of("breadcrumbs", densities, gamma=gammas))
    expected = base + naive_breadcrumbs(deltas[0], 0.3, 0.0) + naive_breadcrumbs(deltas[1], 0.7, 0.2)
    torch.testing.assert_close(found, expected)


def test_della_keeps_large_elements_rather() -> None:
    """Of many rows, each rank is kept as often as its probability says."""
    generator = torch.Generator().manual_seed(2)
    delta = torch.randn(4000, 9, generator=generator)
    given = TaskVector("one", "tensor", Whole(delta.flatten()), 1.0, shape=tuple(delta.shape))
    how = of("della_linear", 0.5, epsilon=0.2, rescale=False)
    kept = whole_tensor(torch.zeros_like(delta), [given], how) != 0
    by_rank = kept.gather(1, delta.abs().argsort(1)).double().mean(0)
    torch.testing.assert_close(by_rank, torch.linspace(0.3, 0.7, 9, dtype=torch.float64), rtol=0, atol=0.04)
    # Four standard deviations of the mean; and neighbours do not depend on each other.
    both = (kept[:, :-1] & kept[:, 1:]).double().mean()
    assert float(both) == pytest.approx(0.25, abs=0.02)


def test_della_draws_from_seed_expert_and_tensor() -> None:
    delta = torch.randn(300, generator=torch.Generator().manual_seed(0))

    def kept(expert: str, tensor: str, seed: int) -> torch.Tensor:
        given = TaskVector(expert, tensor, Whole(delta), 1.0)
        return whole_tensor(torch.zeros(300), [given], of("della_linear", 0.5, seed=seed)) != 0

    first = kept("one", "tensor", 1)
    assert torch.equal(first, kept("one", "tensor", 1))
    for other in (kept("two", "tensor", 1), kept("one", "other", 1), kept("one", "tensor", 2)):
        assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "breadcrumbs", "gamma": 1.5}, "gamma is 1.5; expected a number between 0 and 1"),
        ({"method": "breadcrumbs", "gamma": {"a": -0.1}}, "gamma is -0.1; expected"),
        ({"method": "breadcrumbs_ties", "density": 2}, "density is 2.0; expected a number between 0 and 1"),
        ({"method": "della", "density": 0.5, "epsilon": 0.5}, "epsilon is 0.5 where density is 0.5; expected"),
        ({"method": "della_linear", "density": 0.1}, "epsilon is 0.15 where density is 0.1; expected 0 or more, and"),
        ({"method": "della", "epsilon": -0.1}, "epsilon is -0.1 where density is 1.0"),
        ({"method": "della", "density": {"a": 0.5, "b": 0.9}}, "epsilon is 0.15 where density is 0.9"),
        ({"method": "della", "density": {"a": 0.5, "b": 0.5}, "epsilon": {"a": 0.1, "b": 0.6}}, "epsilon is 0.6 where"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method_of(settings)


def test_dense_and_empty_della_need_no_room_for_epsilon() -> None:
    for density in (0.0, 1.0, {"a": 1.0, "b": 0.0}):
        assert method_of({"method": "della", "density": density}).name == "della"


def test_dense_dare_ties_is_dense_ties(base: torch.Tensor, deltas: list[torch.Tensor]) -> None:
    dare = whole_tensor(base, vectors(deltas, WEIGHTS), of("dare_ties", normalize=True))
    torch.testing.assert_close(dare.double(), naive_ties(base, deltas, WEIGHTS, 1.0, True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", NAMES)
def test_order_of_experts_does_not_matter(method: str, base: torch.Tensor, deltas: list[torch.Tensor]) -> None:
    given = vectors(deltas, WEIGHTS)
    first = whole_tensor(base, given, of(method, 0.5))
    for order in itertools.permutations(given):
        torch.testing.assert_close(whole_tensor(base, order, of(method, 0.5)), first, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", NAMES)
def test_one_dense_expert_is_itself(method: str, base: torch.Tensor, deltas: list[torch.Tensor]) -> None:
    merged = whole_tensor(base, vectors(deltas[:1], [1.0]), of(method))
    torch.testing.assert_close(merged, base + deltas[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("method", NAMES)
def test_methods_say_whether_the_weight_scales_what_they_add(
    method: str, normalize: bool, base: torch.Tensor, deltas: list[torch.Tensor]
) -> None:
    how = of(method, 0.5, normalize=normalize)
    once, twice = (
        whole_tensor(base, vectors(deltas, [factor * w for w in WEIGHTS]), how).double() - base for factor in (1, 2)
    )
    assert torch.allclose(twice, 2 * once, rtol=1e-5, atol=1e-5) == how.scales_with_weight()


@pytest.mark.parametrize("method", SPARSE)
def test_density_zero_is_the_base(method: str, base: torch.Tensor, deltas: list[torch.Tensor]) -> None:
    assert torch.equal(whole_tensor(base, vectors(deltas, WEIGHTS), of(method, 0.0)), base)


@pytest.mark.parametrize("method", [name for name in NAMES if name != "linear"])
@pytest.mark.parametrize("normalize", [False, True])
def test_weights_that_cancel_divide_by_one(
    method: str, normalize: bool, base: torch.Tensor, deltas: list[torch.Tensor]
) -> None:
    # Equal task vectors with weights +1 and −1: their sum is zero everywhere, and so is the sum of all weights.
    merged = whole_tensor(base, vectors([deltas[0], deltas[0]], [1.0, -1.0]), of(method, normalize=normalize))
    if of(method).consensus:
        # A sum of zero counts as positive: of +δ and −δ the positive one stays, divided by its own weight.
        sign = deltas[0].sign() if normalize else torch.ones_like(base)
        torch.testing.assert_close(merged, base + sign * deltas[0].abs(), rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(merged, base)


def test_consensus_with_agreeing_weights_that_cancel_divides_by_one(base: torch.Tensor) -> None:
    # w·δ is +2 and +3 with w = 1 and −1: both agree, their weights sum to zero.
    given = vectors([torch.full_like(base, 2.0), torch.full_like(base, -3.0)], [1.0, -1.0])
    torch.testing.assert_close(whole_tensor(base, given, of("ties")), base + 5)


@pytest.mark.parametrize("method", SPARSE)
def test_rescale_restores_the_l1_norm(method: str, deltas: list[torch.Tensor]) -> None:
    zero = torch.zeros_like(deltas[0])
    for rescale in (True, False):
        given = vectors(deltas[:1], [1.0])
        task_vector = whole_tensor(zero, given, of(method, 0.3, rescale=rescale, normalize=False))
        kept = task_vector != 0
        l1 = (deltas[0] if rescale else deltas[0][kept]).abs().sum()
        torch.testing.assert_close(task_vector.abs().sum(), l1)
        assert 0 < kept.sum() < kept.numel()
        # All that is kept has one common factor.
        factor = task_vector[kept] / deltas[0][kept]
        torch.testing.assert_close(factor, factor[:1].expand_as(factor))


def test_tiny_norms_are_not_rescaled() -> None:
    assert norm_ratio(9e-8, 6e-8) == norm_ratio(3.0, 0.0) == norm_ratio(0.0, 0.0) == 1
    assert norm_ratio(3.0, 1.5) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("method", NAMES)
def test_size_of_chunks_changes_no_bit(
    method: str, rescale: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    numel = 5 * BLOCK + 77
    base = torch.randn(numel, generator=generator).to(dtype)
    # Rounding to half precision leaves many differences of equal magnitude.
    experts = [(base.float() + 0.05 * torch.randn(numel, generator=generator)).to(dtype) for _ in range(3)]
    given = [
        TaskVector(f"expert{k}", "tensor", Difference(expert), weight)
        for k, (expert, weight) in enumerate(zip(experts, WEIGHTS, strict=True))
    ]
    how = of(method, 0.37, **({"rescale": rescale} if method in SPARSE else {}))
    found = []
    for size in (BLOCK, 2 * BLOCK, 8 * BLOCK):
        monkeypatch.setattr(delta_module, "CHUNK", size)
        found.append(joined(how.merged_pieces(base, given), base.shape))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    deltas = [expert.float() - base.float() for expert in experts]
    torch.testing.assert_close(found[0], whole_tensor(base.float(), vectors(deltas, WEIGHTS), how), rtol=0, atol=0)


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3, 4)])
def test_any_shape(method: str, shape: tuple[int, ...]) -> None:
    ones = torch.ones(shape)
    merged = whole_tensor(ones, vectors([ones, ones * 2], [0.5, 0.5]), of(method, 0.5))
    assert merged.shape == shape
    assert merged.dtype == torch.float32


def test_inputs_are_left_alone(base: torch.Tensor, deltas: list[torch.Tensor]) -> None:
    before = [tensor.clone() for tensor in (base, *deltas)]
    for method in NAMES:
        whole_tensor(base, vectors(deltas, WEIGHTS), of(method, 0.5, normalize=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (base, *deltas), strict=True))


@pytest.mark.parametrize("method", NAMES)
def test_large_tensors_are_merged_in_chunks(method: str) -> None:
    """Row by row gives the same as all at once: nothing but trimming and dropping looks at other elements."""
    generator = torch.Generator().manual_seed(0)
    rows, width = 5, CHUNK // 3
    base, *deltas = (torch.randn(rows, width, generator=generator) for _ in range(4))
    transposed = [deltas[0].T.contiguous().T, *deltas[1:]]
    merged = whole_tensor(base.T.contiguous().T, vectors(transposed, WEIGHTS), of(method))
    for row in range(rows):
        alone = whole_tensor(base[row], vectors([delta[row] for delta in deltas], WEIGHTS), of(method))
        assert torch.equal(merged[row], alone)


# What each expert adds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lambda_", [1.0, 0.6])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("weights", [WEIGHTS, [1.0, -0.5, 0.2], [0.0, 1.0, 0.3]])
@pytest.mark.parametrize(
    ("method", "density"), [("ties", 1.0), ("ties", 0.4), ("dare_ties", 0.5), ("breadcrumbs_ties", 0.5), ("della", 0.5)]
)
def test_agreed_contributions_sum_to_the_merge(
    method: str,
    density: float,
    weights: list[float],
    normalize: bool,
    lambda_: float,
    base: torch.Tensor,
    deltas: list[torch.Tensor],
) -> None:
    how = of(method, density, normalize=normalize, **{"lambda": lambda_})
    given = vectors(deltas, weights)
    before = [delta.clone() for delta in deltas]
    parts = agreed_contributions(base, given, how)
    torch.testing.assert_close(base + sum(parts), whole_tensor(base, given, how), rtol=0, atol=1e-6)
    # What an expert adds is in the direction that was elected: no two of them have opposite signs.
    assert all((one * other >= 0).all() for one, other in itertools.combinations(parts, 2))
    assert all(torch.equal(*pair) for pair in zip(before, deltas, strict=True))


def test_agreed_contributions_by_hand() -> None:
    # Weighted: 1, −4, 6 → positive, of weights 1 + 3; −2, −2, 3 → negative, of weights 1 + 2.
    given = [torch.tensor([1.0, -2.0]), torch.tensor([-2.0, -1.0]), torch.tensor([2.0, 1.0])]
    parts = agreed_contributions(torch.zeros(2), vectors(given, [1.0, 2.0, 3.0]), of("ties"))
    expected = torch.tensor([[1 / 4, -2 / 3], [0.0, -2 / 3], [6 / 4, 0.0]])
    torch.testing.assert_close(torch.stack(parts), expected)


@pytest.mark.parametrize("lambda_", [1.0, 0.6])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("weights", [WEIGHTS, [1.0, -0.5, 0.2], [0.5, -0.5, 0.0]])
@pytest.mark.parametrize("method", ["task_arithmetic", "dare_linear", "breadcrumbs", "della_linear"])
def test_contributions_sum_to_the_merge(
    method: str,
    weights: list[float],
    normalize: bool,
    lambda_: float,
    base: torch.Tensor,
    deltas: list[torch.Tensor],
) -> None:
    how = of(method, 0.5, normalize=normalize, **{"lambda": lambda_})
    given = vectors(deltas, weights)
    parts = [contribution(base, one, share, how) for one, share in zip(given, how.shares(weights), strict=True)]
    torch.testing.assert_close(base + sum(parts), whole_tensor(base, given, how), rtol=0, atol=2e-6)


def test_contributions_of_normalised_linear_sum_to_the_merge(base: torch.Tensor, deltas: list[torch.Tensor]) -> None:
    how = of("linear")
    given = vectors(deltas, WEIGHTS)
    parts = [contribution(base, one, share, how) for one, share in zip(given, how.shares(WEIGHTS), strict=True)]
    torch.testing.assert_close(base + sum(parts), whole_tensor(base, given, how), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (of("task_arithmetic"), 0.4),
        (of("task_arithmetic", **{"lambda": 0.5}), 0.2),
        (of("task_arithmetic", normalize=True), 1 / 3),
        (of("ties"), 1 / 3),
        (of("ties", normalize=False), 0.4),
        (of("ties", **{"lambda": 1.5}), 0.5),
        (of("dare_ties"), 0.4),
        (of("dare_linear"), 0.4),
        (of("linear"), 1 / 3),
    ],
)
def test_static_coefficient_is_what_uniform_weights_give_each_expert(how: Additive, expected: float) -> None:
    assert how.static_coefficient(0.4, 3) == pytest.approx(expected)
    # Task vectors that do not overlap: in each element a merge without consensus adds that much of one expert.
    if not how.consensus:
        merged = whole_tensor(torch.zeros(3), vectors(list(torch.eye(3)), [0.4] * 3), how)
        torch.testing.assert_close(merged, torch.full((3,), expected))


@pytest.mark.parametrize(
    ("method", "density", "consensus", "low_rank"),
    [
        ("linear", 1.0, False, True),
        ("task_arithmetic", 1.0, False, True),
        ("dare_linear", 1.0, False, True),
        ("dare_linear", 0.9, False, False),
        ("ties", 1.0, True, False),
        ("ties", 0.3, True, False),
        ("dare_ties", 0.3, True, False),
        ("breadcrumbs", 1.0, False, True),
        ("breadcrumbs", 0.9, False, False),
        ("della", 1.0, True, False),
    ],
)
def test_which_methods_leave_factors_alone(method: str, density: float, consensus: bool, low_rank: bool) -> None:
    how = of(method, density)
    assert how.consensus == consensus
    assert how.keeps_whole("any") == low_rank


SETTINGS: list[dict[str, Any]] = [
    {},
    {"normalize": True, "lambda": 0.7},
    {"normalize": False, "rescale": True},
    {"normalize": True, "rescale": False},
]


def settings_of(method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Those that a method has."""
    unknown = {"linear": ("rescale", "lambda"), "task_arithmetic": ("rescale",)}.get(method, ())
    return {key: value for key, value in settings.items() if key not in unknown}


def bits_of_merge(how: Additive, weights: list[float], dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """The bits of a merge of as many experts as weights, with equal magnitudes, zeros and −0 among the elements."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(3 * BLOCK + 7, generator=generator).to(dtype)
    base[:64] = -0.0
    experts = [(base.float() + 0.05 * torch.randn(len(base), generator=generator)).to(dtype) for _ in weights]
    for one in experts:
        one[32:5000] = base[32:5000]
    given = [
        TaskVector(f"{k}", "tensor", Difference(one.to(device)), weight)
        for k, (one, weight) in enumerate(zip(experts, weights, strict=True))
    ]
    return joined(how.merged_pieces(base.to(device), given), base.shape).cpu().view(torch.int32)


@pytest.mark.parametrize("weights", [[0.4, 0.3, -0.2], [0.1, 0.7, 0.3, 0.9, 0.45]])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("method", NAMES)
def test_operations_of_any_device_give_the_bits_of_the_loops(
    method: str, settings: dict[str, Any], weights: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    how = of(method, 0.3, **settings_of(method, settings))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        expected = bits_of_merge(how, weights, dtype)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cpu", property(lambda _: False), raising=False)
            assert torch.equal(bits_of_merge(how, weights, dtype), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("method", [name for name in NAMES if "cuda" in METHODS[name].devices])
def test_a_gpu_gives_the_same_bits(method: str, settings: dict[str, Any]) -> None:
    how = of(method, 0.3, **settings_of(method, settings))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        expected, found = (bits_of_merge(how, WEIGHTS, dtype, device) for device in how.devices)
        assert torch.equal(found, expected)
