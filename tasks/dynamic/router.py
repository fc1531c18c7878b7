"""The router of SE-Merging: from hidden states to every sample's own coefficients (arXiv 2506.18135).

A rule turns a sample's pooled hidden states into one affinity per expert, the larger the better. The states come from
probes: forward passes of the base, of the static merge and of each expert up to one block.

| score | affinity of expert k | probes |
| --- | --- | --- |
| nearest | − d(h_merged, h_k) ÷ mean over experts (the paper's) | merge, experts |
| shift | d(h_base, h_k), as a z-score of its values on k's calibration set | base, experts |
| alignment | cosine of h_merged − h_base and h_k − h_base, as such a z-score | base, merge, experts |
| centroid | − d(h_base, mean h_base of k's calibration set) ÷ mean over experts | base |
| discriminant | the same, Euclidean, in the space of Fisher's linear discriminants of the calibration sets | base |

λ_k = mass · softmax_k(affinity ÷ temperature). What a rule is worth is seen on the calibration sets, whose tasks are
known: statistics from one half of them, judged on the other.

Where task vectors start from the static merge (`origin: static`), "base" above is that merge, and a sample that
resembles all experts alike must stay there: λ_k = mass · max(0, (K · softmax_k − 1) / (K − 1)).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from sensmerge.tasks.dynamic.application import MetricName, OriginName, PoolName, ScoreName, SeApplication

SCORES: tuple[ScoreName, ...] = ("centroid", "discriminant", "nearest", "shift", "alignment")
FROM_STATIC: tuple[ScoreName, ...] = ("centroid", "discriminant")
"""Those that `auto` looks at where the origin is a static merge. It may be made of the calibration sets: then it is
nearer to the experts on these samples than on others, and what compares the two is worth less than it seems there.
(Nearest, on seven encoders: right for 0.94 of held-out calibration samples and 0.72 of test samples.)"""
POOLS: tuple[PoolName, ...] = ("cls", "mean", "last")
LEAST_SHRINKAGE = 1e-6
"""Of a covariance, so that it can be inverted whatever its points."""
NEGLIGIBLE = 1e-3
"""Part of a sample's largest share below which a share counts as 0; ours, for speed."""
SEARCHED_LAYERS = 6
"""How many layers `layer: auto` looks at, evenly spread: a deep model's neighbouring blocks tell the same."""


@dataclass(frozen=True)
class Rule:
    """One way to tell which expert a sample belongs to."""

    score: ScoreName
    layer: int
    pool: PoolName
    metric: MetricName

    @property
    def needs_base(self) -> bool:
        """Whether the base is probed."""
        return self.score != "nearest"

    @property
    def needs_merged(self) -> bool:
        """Whether the static merge is probed."""
        return self.score in ("nearest", "alignment")

    @property
    def needs_experts(self) -> bool:
        """Whether every expert is probed."""
        return self.score not in ("centroid", "discriminant")

    def passes(self, experts: int, blocks: int) -> float:
        """Return what the probes of one sample cost, in whole forward passes of the plain model."""
        probes = self.needs_base + self.needs_merged + self.needs_experts * experts
        return probes * self.layer / blocks


class RouterSettings(BaseModel):
    """How affinities become coefficients."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    temperature: float = Field(gt=0)
    mass: float
    """sum of a sample's coefficients under full trust; from the origin static, coefficient of an expert alone"""
    static: float
    """every expert's coefficient in the static merge; 0 if that is the origin"""
    trust: float = Field(ge=0, le=1)
    """how far the route is followed, 0 to 1"""
    origin: OriginName = "base"
    """weights that task vectors start from"""


@dataclass(frozen=True)
class Features:
    """Pooled hidden states of N samples, float32; what a rule does not need may be left out."""

    base: Tensor | None
    """(N, width)"""
    merged: Tensor | None
    """(N, width), of the static merge"""
    experts: Tensor | None
    """(N, K, width)"""

    def rows(self, chosen: Tensor) -> "Features":
        """Return the features of some of the samples (indices or mask)."""
        picked = (None if each is None else each[chosen] for each in (self.base, self.merged, self.experts))
        return Features(*picked)


@dataclass(frozen=True)
class Statistics:
    """What a rule learns from the calibration sets; empty for `nearest`."""

    centroids: Tensor | None = None
    """(K, width), for `discriminant` (K, D), float64, in the space of the discriminants"""
    discriminants: Tensor | None = None
    """(width, D), float64: h @ discriminants lies in their space"""
    mean: Tensor | None = None
    """(K,), of the raw score of each expert on its own calibration set"""
    std: Tensor | None = None
    """(K,)"""

    def tensors(self) -> dict[str, Tensor]:
        """Return what there is, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


def pooled(hidden: Tensor, mask: Tensor, pool: PoolName) -> Tensor:
    """Pool hidden states (B, T, width) over the tokens that the mask (B, T) marks with 1 → (B, width), float32.

    `cls` is the first such token, `last` the last: padding may stand on either side.
    """
    hidden = hidden.float()
    weights = mask.to(hidden.dtype)
    if pool == "mean":
        return (hidden * weights[:, :, None]).sum(1) / weights.sum(1, keepdim=True)
    positions = torch.arange(mask.shape[1], device=mask.device)
    place = (weights * (positions + 1 if pool == "last" else len(positions) - positions)).argmax(1)
    chosen: Tensor = hidden[torch.arange(len(hidden), device=hidden.device), place]
    return chosen


def distance(a: Tensor, b: Tensor, metric: MetricName) -> Tensor:
    """Return the Euclidean distance or 1 − cosine along the last dimension; shapes broadcast."""
    if metric == "l2":
        return (a - b).square().sum(-1).sqrt()
    return 1 - torch.nn.functional.cosine_similarity(a, b, dim=-1)


def fit(rule: Rule, features: Features, owners: Tensor, experts: int) -> Statistics:
    """Return a rule's statistics from calibration samples, whose expert is `owners` (N,); every expert has some."""
    if rule.score == "nearest":
        return Statistics()
    own = [(owners == k).nonzero().flatten() for k in range(experts)]
    if rule.score == "centroid":
        assert features.base is not None
        return Statistics(centroids=torch.stack([features.base[rows].mean(0) for rows in own]))
    if rule.score == "discriminant":
        assert features.base is not None
        states = features.base.double()
        axes = discriminants([states[rows] for rows in own])
        return Statistics(torch.stack([(states[rows] @ axes).mean(0) for rows in own]), axes)
    raw = _raw(rule, features, Statistics())
    values = [raw[rows, k] for k, rows in enumerate(own)]
    # A single calibration sample has no spread; it then counts as it is.
    spread = [float(value.std(correction=0)) or 1.0 for value in values]
    return Statistics(mean=torch.stack([value.mean() for value in values]), std=raw.new_tensor(spread))


def discriminants(sets: Sequence[Tensor]) -> Tensor:
    """Return Fisher's linear discriminants: the directions in which sets differ most beside their spread.

    In their space a point's nearest mean is the prediction of linear discriminant analysis with equal priors (Hastie,
    Tibshirani & Friedman, The Elements of Statistical Learning, §4.3).

    Args:
        sets: K times (samples, width), float64, finite.

    Returns:
        (width, D), D = min(K − 1, width): within a set, points times it have the covariance 1.
    """
    width = sets[0].shape[1]
    within = torch.zeros(width, width, dtype=sets[0].dtype, device=sets[0].device)
    for points in sets:
        within += shrunk_covariance(points) / len(sets)
    if not within.any():  # a single sample each: all directions count alike
        within.fill_diagonal_(1.0)
    factor = torch.linalg.cholesky(within)
    means = torch.stack([points.mean(0) for points in sets])
    white = torch.linalg.solve_triangular(factor, (means - means.mean(0)).T, upper=False)
    axes = torch.linalg.svd(white, full_matrices=False).U[:, : len(sets) - 1]
    found: Tensor = torch.linalg.solve_triangular(factor.T, axes, upper=True).contiguous()  # safetensors needs it
    return found


def shrunk_covariance(points: Tensor) -> Tensor:
    """Return the covariance of points (n, width), float64, shrunk as much as their number asks for → (width, width).

    Ledoit & Wolf (2004): (1 − a)·S + a·(trace S ÷ width)·1, a in closed form; on standardised features, which the
    result then scales back. One or two points, which leave no error to estimate, are shrunk entirely, to the variances
    alone; points without any spread give 0.
    """
    count, width = points.shape
    centred = points - points.mean(0)
    scale = centred.square().mean(0).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    standard = centred / scale
    sample = standard.T @ standard / count
    target = torch.eye(width, dtype=points.dtype, device=points.device) * sample.trace() / width
    error = (standard.square().sum(1).square().mean() - sample.square().sum()) / count
    room = (sample - target).square().sum()
    share = (error / room).clamp(LEAST_SHRINKAGE, 1.0) if count > 2 and room > 0 else 1.0
    return torch.outer(scale, scale) * ((1 - share) * sample + share * target)


def affinities(rule: Rule, features: Features, statistics: Statistics) -> Tensor:
    """Return how much each sample resembles each expert, (N, K); comparable within a sample only."""
    raw = _raw(rule, features, statistics)
    if statistics.mean is not None and statistics.std is not None:
        return (raw - statistics.mean) / statistics.std
    return -raw / raw.mean(dim=1, keepdim=True).clamp_min(torch.finfo(raw.dtype).tiny)


def _raw(rule: Rule, features: Features, statistics: Statistics) -> Tensor:
    """Return a rule's distances or cosines, (N, K)."""
    base, merged, experts = features.base, features.merged, features.experts
    if rule.score == "centroid":
        assert base is not None
        assert statistics.centroids is not None
        return distance(base[:, None], statistics.centroids, rule.metric)
    if rule.score == "discriminant":
        assert base is not None
        assert statistics.centroids is not None
        assert statistics.discriminants is not None
        projected = base.double() @ statistics.discriminants
        return distance(projected[:, None], statistics.centroids, "l2").to(base.dtype)
    assert experts is not None
    if rule.score == "nearest":
        assert merged is not None
        return distance(merged[:, None], experts, rule.metric)
    assert base is not None
    if rule.score == "shift":
        return distance(base[:, None], experts, rule.metric)
    assert merged is not None
    return torch.nn.functional.cosine_similarity((merged - base)[:, None], experts - base[:, None], dim=-1)


def coefficients(affinity: Tensor, settings: RouterSettings) -> Tensor:
    """Return λ (N, K) = trust · mass · share + (1 − trust) · static; affinity (N, K).

    A sample's shares are the softmax over experts of affinity ÷ T; from the origin static, what of each lies above the
    even share 1 / K, scaled so that a single expert's is 1 (ours: no text has SE-Merging from another origin).
    Shares below `NEGLIGIBLE` of a sample's largest count as 0: the network skips what a sample takes nothing of.
    """
    # The largest first becomes 0, and the division is in float64: then no T is too small.
    exponents = (affinity - affinity.amax(1, keepdim=True)).double() / settings.temperature
    kept = exponents.masked_fill(exponents < math.log(NEGLIGIBLE), -math.inf)
    share = torch.softmax(kept, dim=1).to(affinity.dtype)
    if settings.origin == "static":
        experts = affinity.shape[1]
        share = ((experts * share - 1) / (experts - 1)).clamp_min(0)
    return settings.trust * settings.mass * share + (1 - settings.trust) * settings.static


def trust(accuracy: float, experts: int, fallback: float) -> float:
    """Return how far a route is followed: 1 from `fallback` on, 0 at chance (1 / K) and below, linear between.

    Give it the lower end of the accuracy's interval: the best of many rules on few samples is good by chance.
    """
    chance = 1 / experts
    if accuracy >= fallback:
        return 1.0
    return max(0.0, (accuracy - chance) / (fallback - chance)) if fallback > chance else 0.0


def identified(rule: Rule, features: Features, owners: Tensor, experts: int) -> Tensor:
    """Return the expert that a rule takes for the right one of each calibration sample, (N,), judged on held-out ones.

    Statistics come from every other sample of each expert, those in between are judged by them, and the other way
    round. An expert with a single sample has it in both halves.
    """
    found = torch.empty_like(owners)
    place = torch.zeros_like(owners)
    for k in range(experts):
        own = owners == k
        place[own] = torch.arange(int(own.sum()))
    alone = torch.bincount(owners, minlength=experts)[owners] == 1
    for half in (0, 1):
        judged = place % 2 == half
        seen = ~judged | alone
        statistics = fit(rule, features.rows(seen), owners[seen], experts)
        found[judged] = affinities(rule, features.rows(judged), statistics).argmax(1)
    return found


@dataclass(frozen=True)
class Candidate:
    """A rule, how often it is right on held-out calibration samples, and its price."""

    rule: Rule
    accuracy: float
    passes: float
    """forward passes of the plain model per sample"""


def candidates(application: SeApplication, blocks: int, origin: OriginName = "base") -> list[Rule]:
    """Return the rules that the settings leave open."""
    open_scores = SCORES if origin == "base" else FROM_STATIC
    scores: Sequence[ScoreName] = open_scores if application.score == "auto" else (application.score,)
    layers = searched_layers(blocks) if application.layer == "auto" else (application.layer,)
    pools: Sequence[PoolName] = POOLS if application.pool == "auto" else (application.pool,)
    return [Rule(score, layer, pool, application.metric) for score in scores for layer in layers for pool in pools]


def searched_layers(blocks: int) -> tuple[int, ...]:
    """Return the layers that `layer: auto` looks at."""
    count = min(blocks, SEARCHED_LAYERS)
    return tuple(math.ceil(blocks * (i + 1) / count) for i in range(count))


def judge(
    rules: Sequence[Rule], features: Mapping[tuple[int, PoolName], Features], owners: Tensor, experts: int, blocks: int
) -> list[Candidate]:
    """Return every rule with its held-out accuracy; features by (layer, pool)."""
    judged = []
    for rule in rules:
        right = identified(rule, features[rule.layer, rule.pool], owners, experts) == owners
        judged.append(Candidate(rule, float(right.double().mean()), rule.passes(experts, blocks)))
    return judged


def choose(judged: Sequence[Candidate], samples: int) -> Candidate:
    """Return the cheapest of the best: of those within one standard error of the best accuracy, the fewest passes.

    The one-standard-error rule of Breiman et al. (1984) for cross-validation, with the error of (hits + 1) / (n + 2),
    which is not 0 where every sample is right. Of equally cheap ones the most accurate.
    """
    best = max(candidate.accuracy for candidate in judged)
    share = (best * samples + 1) / (samples + 2)
    error = math.sqrt(share * (1 - share) / samples)
    good = [candidate for candidate in judged if candidate.accuracy >= best - error]
    return min(good, key=lambda candidate: (candidate.passes, -candidate.accuracy))
