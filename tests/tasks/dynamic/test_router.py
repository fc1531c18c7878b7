"""The router's mathematics, on numbers small enough to check by hand."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.spatial.distance import cdist
from torch import Tensor

from sensmerge.tasks.dynamic import router as routing
from sensmerge.tasks.dynamic.application import ScoreName, SeApplication
from sensmerge.tasks.dynamic.router import (
    POOLS,
    SCORES,
    SEARCHED_LAYERS,
    Candidate,
    Features,
    RouterSettings,
    Rule,
    Statistics,
    affinities,
    candidates,
    choose,
    discriminants,
    distance,
    fit,
    identified,
    judge,
    pooled,
    searched_layers,
    shrunk_covariance,
    trust,
)


def coefficients(affinity: Tensor, temperature: float, mass: float, static: float, follow: float) -> Tensor:
    settings = RouterSettings(temperature=temperature, mass=mass, static=static, trust=follow)
    return routing.coefficients(affinity, settings)


def rule(score: ScoreName, layer: int = 1, metric: Any = "l2") -> Rule:
    return Rule(score, layer, "mean", metric)


def random_features(seed: int, samples: int = 9, experts: int = 3, width: int = 5) -> Features:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((samples, width), (samples, width), (samples, experts, width))
    return Features(*(torch.randn(shape, generator=generator) for shape in shapes))


def clustered(owners: Tensor, experts: int, spread: float = 0.1) -> Features:
    """Features in which every sample is near its own expert by all scores."""
    generator = torch.Generator().manual_seed(0)
    count = len(owners)
    axes = 4 * torch.eye(experts)
    base = axes[owners] + spread * torch.randn(count, experts, generator=generator)
    moved = torch.ones(count, experts)  # an expert moves its own samples three times as far, and as the merge does
    moved[torch.arange(count), owners] = 3.0
    directions = torch.eye(experts).expand(count, experts, experts)
    each = base[:, None] + moved[:, :, None] * directions
    each = each + spread * torch.randn(each.shape, generator=generator)
    merged = base + 3 * torch.eye(experts)[owners]
    return Features(base, merged, each)


# Pooling and distances ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_sees_the_real_tokens_only(side: str) -> None:
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randn(length, 3, generator=generator) for length in (4, 1, 2)]
    hidden, mask = torch.full((3, 4, 3), 1e6), torch.zeros(3, 4, dtype=torch.int64)
    for row, text in enumerate(texts):
        place = slice(4 - len(text), 4) if side == "left" else slice(len(text))
        hidden[row, place], mask[row, place] = text, 1
    expected = {"cls": [t[0] for t in texts], "mean": [t.mean(0) for t in texts], "last": [t[-1] for t in texts]}
    for pool in POOLS:
        torch.testing.assert_close(pooled(hidden, mask, pool), torch.stack(expected[pool]))


def test_pooling_is_in_float32() -> None:
    hidden = torch.tensor([[[256.0], [1.0], [1.0]]], dtype=torch.bfloat16)  # 258 has no bfloat16
    mean = pooled(hidden, torch.ones(1, 3, dtype=torch.int64), "mean")
    assert mean.dtype == torch.float32
    assert mean.item() == 86.0


def test_distances_are_those_of_scipy() -> None:
    a, b = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).split(2)
    for metric, theirs in (("l2", "euclidean"), ("cosine", "cosine")):
        expected = torch.tensor(cdist(a.double().numpy(), b.double().numpy(), theirs)).float()
        torch.testing.assert_close(distance(a[:, None], b, metric), expected)  # type: ignore[arg-type]


# Scores ---------------------------------------------------------------------------------------------------------------

# Two samples, two experts, two dimensions.
BASE = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
MERGED = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
EXPERTS = torch.tensor([[[1.0, 3.0], [2.0, 0.0]], [[1.0, 4.0], [7.0, 8.0]]])
FEATURES = Features(BASE, MERGED, EXPERTS)
OWNERS = torch.tensor([0, 1])


def test_nearest_is_minus_the_distance_over_its_mean() -> None:
    # Distances 3 and 1; 2 and √(36 + 36).
    far = math.sqrt(72)
    expected = torch.tensor([[-3 / 2, -1 / 2], [-2 / ((2 + far) / 2), -far / ((2 + far) / 2)]])
    torch.testing.assert_close(affinities(rule("nearest"), FEATURES, Statistics()), expected)
    assert fit(rule("nearest"), FEATURES, OWNERS, 2).tensors() == {}


def test_shift_is_a_z_score_of_the_distance_from_the_base() -> None:
    # Shifts: √10, 2; 4, 10. Expert 0 owns rows 0 and 1 here, expert 1 rows 2 and 3, which repeat them.
    twice = Features(*(torch.cat([each, each]) for each in (BASE, MERGED, EXPERTS)))
    statistics = fit(rule("shift"), twice, torch.tensor([0, 0, 1, 1]), 2)
    first = math.sqrt(10)
    mean = torch.tensor([(first + 4) / 2, 6.0])
    std = torch.tensor([(4 - first) / 2, 4.0])
    torch.testing.assert_close(statistics.tensors(), {"mean": mean, "std": std})
    torch.testing.assert_close(
        affinities(rule("shift"), FEATURES, statistics), torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    )


def test_alignment_is_a_z_score_of_the_cosine_of_two_shifts() -> None:
    # merged − base is (1, 0) and (0, 2); experts − base is (1, 3), (2, 0) and (0, 4), (6, 8).
    raw = torch.tensor([[1 / math.sqrt(10), 1.0], [1.0, 0.8]])
    statistics = Statistics(mean=torch.tensor([0.5, 0.6]), std=torch.tensor([0.25, 0.2]))
    expected = (raw - torch.tensor([0.5, 0.6])) / torch.tensor([0.25, 0.2])
    torch.testing.assert_close(affinities(rule("alignment"), FEATURES, statistics), expected)
    # One calibration sample each: its own cosine, and no spread to divide by.
    fitted = fit(rule("alignment"), FEATURES, OWNERS, 2)
    torch.testing.assert_close(fitted.tensors(), {"mean": torch.tensor([raw[0, 0], raw[1, 1]]), "std": torch.ones(2)})


def test_centroid_is_minus_the_distance_from_the_mean_of_the_calibration_set() -> None:
    base = torch.tensor([[0.0, 0.0], [2.0, 0.0], [10.0, 0.0]])
    statistics = fit(rule("centroid"), Features(base, None, None), torch.tensor([0, 0, 1]), 2)
    torch.testing.assert_close(statistics.tensors(), {"centroids": torch.tensor([[1.0, 0.0], [10.0, 0.0]])})
    found = affinities(rule("centroid"), Features(torch.tensor([[4.0, 0.0]]), None, None), statistics)
    torch.testing.assert_close(found, torch.tensor([[-3 / 4.5, -6 / 4.5]]))


def correlated(seed: int, sizes: tuple[int, ...], width: int) -> list[Tensor]:
    """Sets whose features are correlated, differ in scale, and vary more along than across the way to other sets."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator).double() @ torch.logspace(-1, 1, width).double().diag()
    offsets = 0.7 * torch.randn(len(sizes), width, generator=generator).double()
    return [(torch.randn(n, width, generator=generator).double() + offsets[k]) @ mixing for k, n in enumerate(sizes)]


@pytest.mark.parametrize(("sizes", "width"), [((40, 40, 40), 6), ((64, 7, 20), 30), ((5, 5, 5, 5), 50)])
@pytest.mark.parametrize("solver", ["lsqr", "eigen"])
def test_discriminant_is_the_linear_discriminant_analysis_of_scikit_learn(
    sizes: tuple[int, ...], width: int, solver: str
) -> None:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    sets, others = correlated(0, sizes, width), torch.cat(correlated(1, (50,) * len(sizes), width))
    owners = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    known = LinearDiscriminantAnalysis(solver=solver, shrinkage="auto", priors=[1 / len(sizes)] * len(sizes))
    known.fit(torch.cat(sets).numpy(), owners.numpy())
    statistics = fit(rule("discriminant"), Features(torch.cat(sets), None, None), owners, len(sizes))
    assert {name: value.shape for name, value in statistics.tensors().items()} == {
        "centroids": (len(sizes), len(sizes) - 1),
        "discriminants": (width, len(sizes) - 1),
    }
    found = affinities(rule("discriminant"), Features(others, None, None), statistics)
    assert found.argmax(1).tolist() == known.predict(others.numpy()).tolist()
    # The distances too: half their squares are the logarithms of its posteriors, up to a constant per sample.
    assert statistics.discriminants is not None
    projected = others @ statistics.discriminants
    half = -distance(projected[:, None], statistics.centroids, "l2").square() / 2
    posterior = torch.tensor(known.predict_proba(others.numpy()))
    torch.testing.assert_close(torch.softmax(half, 1), posterior, rtol=1e-6, atol=1e-9)


def test_discriminant_does_not_see_the_direction_in_which_all_sets_vary() -> None:
    # The second feature tells the sets apart, the first is a hundred times as wide.
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(40, 2, generator=generator) * torch.tensor([100.0, 0.1])
    owners = torch.arange(40) % 2
    features = Features(noise + torch.stack([torch.zeros(40), owners.float()], 1), None, None)
    assert torch.equal(identified(rule("discriminant"), features, owners, 2), owners)
    assert (identified(rule("centroid"), features, owners, 2) == owners).double().mean() < 0.8


@pytest.mark.parametrize("count", [1, 2, 3, 20, 400])
def test_a_shrunken_covariance_is_that_of_scikit_learn_and_can_be_inverted(count: int) -> None:
    from sklearn.covariance import ledoit_wolf

    points = correlated(count, (count,), 12)[0]
    found = shrunk_covariance(points)
    if count == 1:
        assert not found.any()
        return
    scale = points.std(0, correction=0)
    known, _ = ledoit_wolf(((points - points.mean(0)) / scale).numpy())
    expected = torch.outer(scale, scale) * (torch.tensor(known) if count > 2 else torch.eye(12))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert torch.linalg.eigvalsh(found).min() > 0


@pytest.mark.parametrize("rows", [[[0.0, 1.0]], [[1.0, 1.0], [-1.0, -1.0]] * 4, [[2.0, 3.0]] * 5])
def test_discriminants_of_sets_without_much_spread(rows: list[list[float]]) -> None:
    sets = [torch.tensor(rows).double() + 5 * k for k in range(3)]
    axes = discriminants(sets)
    assert axes.shape == (2, 2)
    assert axes.isfinite().all()
    means = torch.stack([points.mean(0) @ axes for points in sets])
    assert torch.cdist(means, means).fill_diagonal_(1).min() > 1e-3


def test_a_single_expert_has_no_discriminants() -> None:
    features, owners = random_features(0, experts=1), torch.zeros(9, dtype=torch.long)
    statistics = fit(rule("discriminant"), features, owners, 1)
    found = coefficients(affinities(rule("discriminant"), features, statistics), 0.05, 0.7, 0.3, 1.0)
    assert torch.equal(found, torch.full((9, 1), 0.7))


def test_a_sample_that_is_equally_near_to_all_gets_numbers() -> None:
    same = Features(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 3, 2))
    found = affinities(rule("nearest"), same, Statistics())
    assert torch.equal(coefficients(found, 0.1, 1.5, 0.3, 1.0), torch.full((1, 3), 0.5))


@given(
    order=st.permutations(range(3)),
    score=st.sampled_from(SCORES),
    metric=st.sampled_from(["l2", "cosine"]),
    seed=st.integers(0, 9),
)
def test_permuting_experts_permutes_affinities_and_coefficients(
    order: list[int], score: ScoreName, metric: str, seed: int
) -> None:
    features, owners = random_features(seed), torch.arange(9) % 3
    assert features.experts is not None
    permuted = Features(features.base, features.merged, features.experts[:, order])
    moved = torch.tensor([order.index(int(owner)) for owner in owners])
    one = rule(score, metric=metric)
    plain = affinities(one, features, fit(one, features, owners, 3))
    other = affinities(one, permuted, fit(one, permuted, moved, 3))
    torch.testing.assert_close(other, plain[:, order])
    settings = (0.5, 1.2, 0.4, 0.7)
    torch.testing.assert_close(coefficients(other, *settings), coefficients(plain, *settings)[:, order])
    assert torch.equal(torch.tensor(order)[identified(one, permuted, moved, 3)], identified(one, features, owners, 3))


@pytest.mark.parametrize("score", SCORES)
def test_a_sample_is_routed_as_if_it_were_alone(score: ScoreName) -> None:
    features, owners = random_features(0), torch.arange(9) % 3
    statistics = fit(rule(score), features, owners, 3)
    together = affinities(rule(score), features, statistics)
    apart = [affinities(rule(score), features.rows(torch.tensor([row])), statistics) for row in range(9)]
    torch.testing.assert_close(torch.cat(apart), together)


# Coefficients ---------------------------------------------------------------------------------------------------------

AFFINITY = torch.tensor([[-1.2, -0.3, -1.5], [4.0, 2.0, -1.0]])


def test_coefficients_are_a_rescaled_softmax() -> None:
    weights = [[math.exp(value / 0.8) for value in row] for row in AFFINITY.tolist()]
    expected = torch.tensor([[0.9 * w / sum(row) for w in row] for row in weights])
    torch.testing.assert_close(coefficients(AFFINITY, 0.8, 0.9, 0.3, 1.0), expected)


def test_negligible_shares_are_nothing_and_the_others_sum_to_the_mass() -> None:
    # Shares of 1 : 1.1e-3 : 0.9e-3.
    affinity = torch.tensor([[0.0, math.log(1.1e-3), math.log(0.9e-3)]])
    expected = torch.tensor([[0.9 / 1.0011, 0.9 * 1.1e-3 / 1.0011, 0.0]])
    torch.testing.assert_close(coefficients(affinity, 1.0, 0.9, 0.3, 1.0), expected, rtol=1e-5, atol=0)


def test_equal_shares_are_not_negligible_however_many() -> None:
    assert torch.equal(coefficients(torch.zeros(1, 4096), 0.05, 4096.0, 1.0, 1.0), torch.ones(1, 4096))


def test_a_large_temperature_is_the_static_merge() -> None:
    found = coefficients(AFFINITY, 1e9, 3 * 0.3, 0.3, 1.0)
    torch.testing.assert_close(found, torch.full((2, 3), 0.3))


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-60])
def test_a_small_temperature_with_mass_one_is_the_likeliest_expert(temperature: float) -> None:
    expected = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert torch.equal(coefficients(AFFINITY, temperature, 1.0, 0.3, 1.0), expected)


@given(temperature=st.floats(1e-3, 1e6), mass=st.floats(0.1, 10), follow=st.floats(0, 1), static=st.floats(0.05, 2))
def test_coefficients_sum_to_the_mass(temperature: float, mass: float, follow: float, static: float) -> None:
    total = coefficients(AFFINITY, temperature, mass, static, follow).sum(1)
    expected = follow * mass + (1 - follow) * 3 * static
    torch.testing.assert_close(total, torch.full((2,), expected), rtol=1e-5, atol=1e-6)


def test_trust_draws_coefficients_towards_the_static_ones() -> None:
    routed = coefficients(AFFINITY, 0.5, 0.9, 0.3, 1.0)
    assert torch.equal(coefficients(AFFINITY, 0.5, 0.9, 0.3, 0.0), torch.full((2, 3), 0.3))
    torch.testing.assert_close(coefficients(AFFINITY, 0.5, 0.9, 0.3, 0.25), 0.25 * routed + 0.75 * 0.3)


@pytest.mark.parametrize(
    ("accuracy", "fallback", "expected"),
    [
        (0.8, 0.8, 1.0),
        (0.95, 0.8, 1.0),
        (0.25, 0.8, 0.0),
        (0.1, 0.8, 0.0),
        (0.525, 0.8, 0.5),
        (0.0, 0.0, 1.0),  # 0: never
        (0.05, 0.1, 0.0),  # a threshold below chance
        (0.15, 0.1, 1.0),
        (1.0, 1.0, 1.0),
        (0.625, 1.0, 0.5),
    ],
)
def test_trust_is_linear_between_chance_and_the_threshold(accuracy: float, fallback: float, expected: float) -> None:
    assert trust(accuracy, 4, fallback) == pytest.approx(expected)


# Held-out identification ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", SCORES)
def test_clear_tasks_are_identified(score: ScoreName) -> None:
    owners = torch.tensor([2, 0, 1, 1, 0, 2, 0, 1, 2, 0, 1, 2])
    assert torch.equal(identified(rule(score), clustered(owners, 3), owners, 3), owners)


def test_a_judged_sample_is_never_part_of_its_own_statistics() -> None:
    # The two samples of expert 0 lie on either side of those of expert 1. A centroid of both would be at 0 and miss
    # them; one that held the judged sample would be closer to it than the other half's.
    base = torch.tensor([[-10.0, 0.0], [10.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    owners = torch.tensor([0, 0, 1, 1])
    found = identified(rule("centroid"), Features(base, None, None), owners, 2)
    # Each of expert 0's samples is 20 from the other and about 10 from expert 1.
    assert found.tolist() == [1, 1, 1, 1]
    own = fit(rule("centroid"), Features(base[[0, 2]], None, None), torch.tensor([0, 1]), 2)
    assert affinities(rule("centroid"), Features(base[:1], None, None), own).argmax().item() == 0


@given(seed=st.integers(0, 20), score=st.sampled_from(SCORES), row=st.integers(0, 8))
def test_what_a_sample_is_taken_for_depends_on_the_other_half_only(seed: int, score: ScoreName, row: int) -> None:
    features, owners = random_features(seed), torch.arange(9) % 3  # rows 0–2 and 6–8 are one half, 3–5 the other
    before = identified(rule(score), features, owners, 3)
    half = [0, 1, 2, 6, 7, 8] if row in (0, 1, 2, 6, 7, 8) else [3, 4, 5]
    assert features.base is not None
    assert features.experts is not None
    base, experts = features.base.clone(), features.experts.clone()
    for other in set(half) - {row}:
        base[other] += 100
        experts[other] *= -7
    after = identified(rule(score), Features(base, features.merged, experts), owners, 3)
    assert after[row] == before[row]


@pytest.mark.parametrize("score", SCORES)
def test_an_expert_with_a_single_sample(score: ScoreName) -> None:
    owners = torch.tensor([0, 0, 0, 0, 1])
    found = identified(rule(score), clustered(owners, 2), owners, 2)
    assert found.shape == owners.shape
    assert set(found.tolist()) <= {0, 1}
    if score in ("centroid", "discriminant"):
        assert found.tolist() == owners.tolist()


# The choice -----------------------------------------------------------------------------------------------------------


def test_passes_count_the_probes_by_their_share_of_the_blocks() -> None:
    expected = {"centroid": 1, "discriminant": 1, "nearest": 5, "shift": 5, "alignment": 6}
    for score, probes in expected.items():
        assert rule(score, layer=3).passes(4, 12) == pytest.approx(probes / 4)  # type: ignore[arg-type]


def candidate(accuracy: float, passes: float) -> Candidate:
    return Candidate(rule("centroid"), accuracy, passes)


def test_the_cheapest_within_one_standard_error_is_chosen() -> None:
    # 91 of 102: √(0.8922 · 0.1078 / 100) = 0.0310
    just, below = candidate(0.870, 1.0), candidate(0.868, 0.1)
    assert choose([candidate(0.9, 5.0), just, below], 100) is just
    assert choose([candidate(0.9, 5.0), below], 4) is below  # 4 samples tell little
    assert choose([candidate(1.0, 5.0), candidate(0.9975, 1.0)], 100).passes == 1.0  # all right is no certainty
    better = candidate(0.89, 1.0)
    assert choose([just, candidate(0.9, 5.0), better], 100) is better  # of equally cheap ones


@given(blocks=st.integers(1, 100))
def test_searched_layers_are_spread_evenly_up_to_the_last(blocks: int) -> None:
    layers = searched_layers(blocks)
    assert len(layers) == min(blocks, SEARCHED_LAYERS)
    assert layers[-1] == blocks
    steps = [b - a for a, b in pairwise((0, *layers))]
    assert min(steps) >= 1
    assert max(steps) - min(steps) <= 1


def test_searched_layers_of_common_depths() -> None:
    assert searched_layers(2) == (1, 2)
    assert searched_layers(6) == (1, 2, 3, 4, 5, 6)
    assert searched_layers(30) == (5, 10, 15, 20, 25, 30)


def test_candidates_are_what_the_settings_leave_open() -> None:
    assert len(candidates(SeApplication(kind="se"), 6)) == 5 * 6 * 3
    fixed = SeApplication(kind="se", score="shift", layer=2, pool="last", metric="cosine")
    assert candidates(fixed, 6) == [Rule("shift", 2, "last", "cosine")]
    some = candidates(SeApplication(kind="se", score="nearest", pool="cls"), 6)
    assert [(one.score, one.layer, one.pool) for one in some] == [("nearest", i, "cls") for i in range(1, 7)]


def test_from_the_static_merge_experts_are_not_probed_unless_asked_for() -> None:
    found = candidates(SeApplication(kind="se"), 6, "static")
    assert len(found) == 2 * 6 * 3
    assert not any(one.needs_experts for one in found)
    asked = SeApplication(kind="se", score="nearest")
    assert {one.score for one in candidates(asked, 6, "static")} == {"nearest"}


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6), st.floats(0.01, 10))
def test_from_the_static_merge_a_sample_takes_what_lies_above_its_even_share(
    values: list[float], temperature: float
) -> None:
    settings = RouterSettings(temperature=temperature, mass=0.7, static=0, trust=0.9, origin="static")
    found = routing.coefficients(torch.tensor([values], dtype=torch.float64), settings)[0]
    weights = [math.exp((value - max(values)) / temperature) for value in values]
    weights = [weight if weight >= 1e-3 else 0.0 for weight in weights]  # what is negligible counts as 0
    experts, total = len(values), sum(weights)
    expected = [0.9 * 0.7 * max(0.0, (experts * weight / total - 1) / (experts - 1)) for weight in weights]
    assert found.tolist() == pytest.approx(expected, abs=1e-9)


def test_the_static_merge_answers_what_resembles_all_experts_and_an_expert_what_resembles_it_alone() -> None:
    settings = RouterSettings(temperature=1e9, mass=1, static=0, trust=1, origin="static")
    affinity = torch.tensor([[3.0, -2.0, 1.0]])
    assert routing.coefficients(affinity, settings).tolist() == [pytest.approx([0, 0, 0], abs=1e-6)]
    alone = settings.model_copy(update={"temperature": 1e-9})
    assert routing.coefficients(affinity, alone).tolist() == [pytest.approx([1, 0, 0])]


def test_rules_are_judged_on_their_own_features() -> None:
    owners = torch.arange(12) % 3
    good = clustered(owners, 3)
    assert good.base is not None
    useless = Features(torch.zeros_like(good.base), good.merged, good.experts)
    rules = [Rule("centroid", layer, "mean", "l2") for layer in (1, 2)]
    judged = judge(rules, {(1, "mean"): useless, (2, "mean"): good}, owners, 3, 4)
    assert [(one.rule, one.passes) for one in judged] == [(rules[0], 0.25), (rules[1], 0.5)]
    assert judged[0].accuracy == pytest.approx(1 / 3)  # all are taken for the first expert
    assert judged[1].accuracy == 1.0


def test_every_rule_needs_the_features_it_reads_and_no_others() -> None:
    whole, owners = random_features(1), torch.arange(9) % 3
    for score in SCORES:
        one = rule(score)
        needed = Features(
            whole.base if one.needs_base else None,
            whole.merged if one.needs_merged else None,
            whole.experts if one.needs_experts else None,
        )
        expected = affinities(one, whole, fit(one, whole, owners, 3))
        assert torch.equal(affinities(one, needed, fit(one, needed, owners, 3)), expected)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.0}, {"temperature": -1.0}, {"mass": 0.0}, {"fallback": 1.1}, {"score": "best"}, {"pool": "max"}],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SeApplication.model_validate({"kind": "se", **settings})
