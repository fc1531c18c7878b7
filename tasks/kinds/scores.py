"""Scores and their 95 % intervals from the raw outcomes of single samples.

An evaluation leaves one record per sample; every score, interval and comparison is computed from these records alone.
What a record holds, and which metrics it allows, is a matter of the kind of task.

A proportion has a Wilson interval. Other scores have a percentile bootstrap over samples, not over tokens: tokens of
one sample are not independent. Records that name a `task` of their own (those of lm-eval) are strata by it, resampled
apart; a score is then the mean over the strata.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field

Record = dict[str, Any]
Columns = NDArray[np.float64]
"""Fields of samples, (..., samples, columns): of all of them, or of several resamples at once."""
Values = Any
"""A score, or those of several resamples, of the leading shape of `Columns`."""

RESAMPLES = 1000
AT_ONCE = 2**17
"""How many numbers of resamples are looked at together, at most: they stay in the processor's cache."""
LEVEL = 0.95
QUANTILE = 1.959963984540054
"""Of the normal distribution, which is above it with probability (1 − LEVEL) ÷ 2."""


@dataclass(frozen=True)
class Score:
    """A score with its 95 % interval."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # reports are read back

    value: Annotated[float, Field(description="the metric")]
    n: Annotated[int, Field(description="samples it was measured on")]
    low: Annotated[float, Field(description="lower end of the 95 % interval")]
    high: Annotated[float, Field(description="upper end of the 95 % interval")]

    def __str__(self) -> str:
        """Say it as all that people read has it."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}], n = {self.n}"


@dataclass(frozen=True)
class Metric:
    """How a score comes from records."""

    columns: tuple[str, ...]
    """Fields of a record that it reads."""
    value: Callable[[Columns], Values]
    """From those fields of all samples, shape (..., samples, columns), to the score, shape (...)."""
    is_proportion: bool = False
    """Whether it is the share of independent samples that are right."""
    higher_is_better: bool = True


def mean(columns: Columns) -> Values:
    """Mean of the first column."""
    return columns[..., 0].mean(-1)


def ratio(columns: Columns) -> Values:
    """Sum of the first column ÷ sum of the second."""
    total = columns.sum(axis=-2)
    return total[..., 0] / total[..., 1]


def perplexity(columns: Columns) -> Values:
    """Exp of the mean −ln p per token; at most e⁷⁰⁰, so that the worst of models has a number too."""
    return np.exp(np.minimum(ratio(columns), 700.0))


def agreement(columns: Columns) -> Values:
    """Share of samples whose two columns are equal."""
    return (columns[..., 0] == columns[..., 1]).mean(-1)


def confusion(columns: Columns) -> NDArray[np.float64]:
    """Confusion matrix C of columns (label, prediction): C[..., i, j] counts samples of class i that were called j."""
    *leading, _, _ = columns.shape
    pairs = columns.astype(np.int64)
    classes = int(columns.max()) + 1
    several = np.arange(math.prod(leading)).reshape(*leading, 1) * classes**2
    places = several + pairs[..., 0] * classes + pairs[..., 1]
    counts = np.bincount(places.ravel(), minlength=math.prod(leading) * classes**2)
    return counts.reshape(*leading, classes, classes).astype(np.float64)


def _sliced(metric: Callable[[Columns], Values]) -> Callable[[Columns], Values]:
    """Have a metric of confusion matrices look at so few resamples at a time that their matrices take little memory."""

    @wraps(metric)
    def sliced(columns: Columns) -> Values:
        step = max(1, AT_ONCE // (int(columns.max()) + 1) ** 2)
        if columns.ndim < 3 or len(columns) <= step:
            return metric(columns)
        return np.concatenate([metric(columns[start : start + step]) for start in range(0, len(columns), step)])

    return sliced


@_sliced
def macro_f1(columns: Columns) -> Values:
    """Mean over classes of F1 = 2·TP ÷ (labels + predictions), over classes that occur as label or prediction.

    scikit-learn's `f1_score(average="macro")`, but fast enough to bootstrap.
    """
    table = confusion(columns)
    seen = table.sum(axis=-2) + table.sum(axis=-1)
    right = 2 * table.diagonal(axis1=-2, axis2=-1)
    return np.divide(right, seen, out=np.zeros_like(seen), where=seen > 0).sum(-1) / (seen > 0).sum(-1)


@_sliced
def matthews(columns: Columns) -> Values:
    """Matthews correlation for any number of classes (Gorodkin 2004, as scikit-learn); 0 where it is undefined.

    (c·n − p·t) ÷ √((n² − p·p)(n² − t·t)), with c right samples of n, t and p the counts of labels and predictions.
    """
    table = confusion(columns)
    n, labels, predictions = table.sum((-2, -1)), table.sum(axis=-1), table.sum(axis=-2)

    def product(one: Columns, other: Columns) -> Values:
        return (one * other).sum(-1)

    scale = (n**2 - product(predictions, predictions)) * (n**2 - product(labels, labels))
    right = table.trace(axis1=-2, axis2=-1) * n - product(labels, predictions)
    return np.divide(right, np.sqrt(scale), out=np.zeros_like(n), where=scale > 0)


def mean_score(values: Sequence[float], is_proportion: bool = False) -> Score:
    """Mean of one number per sample; with `is_proportion` (every number 0 or 1) its interval is Wilson's."""
    return _score(Metric(("value",), mean, is_proportion), [np.array(values, np.float64).reshape(-1, 1)])


def score(metric: Metric, records: Sequence[Record]) -> Score:
    """Return a score of at least one record. The bootstrap has a fixed seed: equal records give equal intervals."""
    assert records, "no records to score"
    return _score(metric, _strata(metric, records))


def value_of(metric: Metric, records: Sequence[Record]) -> float:
    """Return the value of a score alone. Raises TypeError or ValueError if the fields are no numbers."""
    return float(_value(metric, _strata(metric, records)))


def halves(records: list[Record]) -> tuple[list[Record], list[Record]]:
    """Split records in two at random, each stratum by itself; the same way for every model on the same rows.

    The second has the odd one.
    """
    first: set[int] = set()
    places: dict[str | None, list[int]] = {}
    for place, record in enumerate(records):
        places.setdefault(record.get("task"), []).append(place)
    for found in places.values():
        first.update(random.Random(0).sample(found, len(found) // 2))
    return (
        [record for place, record in enumerate(records) if place in first],
        [record for place, record in enumerate(records) if place not in first],
    )


def mean_normalised(
    metrics: Mapping[str, Metric], model: Mapping[str, list[Record]], experts: Mapping[str, list[Record]]
) -> Score | None:
    """Mean over tasks of a model's main metric ÷ that of the task's own expert; the inverse where lower is better.

    `metrics[task]` is the main metric; `model[task]` and `experts[task]` are records of the same rows in the same
    order; `n` is their number over all tasks. The interval is a paired bootstrap: each resample takes the same rows for
    model and expert, so what is hard about a row cancels. Resamples in which an expert scores 0 have no ratio and are
    left out.

    None where a denominator is not positive (an expert that gets nothing right, or a Matthews correlation ≤ 0): the
    ratio has no meaning then, and a mean over the other tasks would hide that.
    """
    return _mean_ratio(_comparisons(metrics, model, experts))


def normalised_difference(
    metrics: Mapping[str, Metric],
    new: Mapping[str, list[Record]],
    old: Mapping[str, list[Record]],
    experts: Mapping[str, list[Record]],
) -> Score | None:
    """`mean_normalised` of one model − that of another; each resample takes the same rows for both and the experts."""
    pairs = list(zip(_comparisons(metrics, new, experts), _comparisons(metrics, old, experts), strict=True))
    if not pairs or any(_value(metric, below) <= 0 for pair in pairs for metric, _, below in pair):
        return None

    def difference(drawn: _Drawn | None) -> Values:
        picks = [None] * len(pairs) if drawn is None else drawn
        found = [_ratio(first, some) - _ratio(second, some) for (first, second), some in zip(pairs, picks, strict=True)]
        return np.stack(found, -1).mean(-1)

    sizes = [[len(rows) for rows in first[2]] for first, _ in pairs]
    n = sum(len(rows) for (_, above, _), _ in pairs for rows in above)
    return Score(float(difference(None)), n, *_bootstrap(difference, sizes))


def mean_ratio(above: Mapping[str, list[Record]], below: Mapping[str, list[Record]], field: str) -> Score | None:
    """Mean over tasks of the mean of a record's field in `above` ÷ that in `below`; otherwise as `mean_normalised`."""
    metric = Metric((field,), mean)
    return _mean_ratio([(metric, _strata(metric, above[task]), _strata(metric, below[task])) for task in above])


def paired_difference(metric: Metric, new: list[Record], old: list[Record]) -> Score:
    """A metric of one model − that of another on the same rows in the same order.

    The interval is a paired bootstrap, as in `mean_normalised`: models that answer alike differ by exactly 0.
    """
    above, below = _strata(metric, new), _strata(metric, old)
    assert [len(rows) for rows in above] == [len(rows) for rows in below], "the models differ in rows"

    def difference(drawn: _Drawn | None) -> Values:
        (picks,) = drawn or (None,)
        return _value(metric, above, picks) - _value(metric, below, picks)

    sizes = [len(rows) for rows in below]
    return Score(float(difference(None)), sum(sizes), *_bootstrap(difference, [sizes]))


_Comparison = tuple[Metric, list[Columns], list[Columns]]
"""A metric, and the strata whose value is divided by that of others."""
_Drawn = list[list[NDArray[np.int64]]]
"""By task and stratum, the rows of some resamples, (resamples, rows)."""


def _comparisons(
    metrics: Mapping[str, Metric], model: Mapping[str, list[Record]], experts: Mapping[str, list[Record]]
) -> list[_Comparison]:
    """Return what `mean_normalised` divides for each task: model by expert, or the inverse where lower is better."""
    found = []
    for name, metric in metrics.items():
        mine, own = _strata(metric, model[name]), _strata(metric, experts[name])
        assert [len(rows) for rows in mine] == [len(rows) for rows in own], f"{name}: model and expert differ in rows"
        found.append((metric, *((mine, own) if metric.higher_is_better else (own, mine))))
    return found


def _mean_ratio(comparisons: Sequence[_Comparison]) -> Score | None:
    if not comparisons or any(_value(metric, below) <= 0 for metric, _, below in comparisons):
        return None

    def normalised(drawn: _Drawn | None) -> Values:
        picks = [None] * len(comparisons) if drawn is None else drawn
        found = [_ratio(one, some) for one, some in zip(comparisons, picks, strict=True)]
        return np.stack(found, -1).mean(-1)

    sizes = [[len(rows) for rows in below] for _, _, below in comparisons]
    n = sum(len(rows) for _, above, _ in comparisons for rows in above)
    return Score(float(normalised(None)), n, *_bootstrap(normalised, sizes))


def _ratio(comparison: _Comparison, picks: list[NDArray[np.int64]] | None) -> Values:
    metric, above, below = comparison
    return _value(metric, above, picks) / _value(metric, below, picks)


def _bootstrap(statistic: Callable[[_Drawn], Values], sizes: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Return the percentile interval of a statistic of resamples: of n rows, n drawn with replacement.

    Args:
        statistic: given the rows that some resamples drew, returns the value of each.
        sizes: how many rows there are, by task and stratum.
    """
    generator = np.random.default_rng(0)
    flat = [n for strata in sizes for n in strata]
    ends, bounds = np.cumsum(flat), np.repeat(flat, flat)
    step = max(1, AT_ONCE // len(bounds))
    values = []
    for start in range(0, RESAMPLES, step):
        rows = generator.integers(bounds, size=(min(step, RESAMPLES - start), len(bounds)))
        parts = iter(np.split(rows, ends[:-1], axis=1))
        with np.errstate(divide="ignore", invalid="ignore"):
            found = statistic([[next(parts) for _ in strata] for strata in sizes])
        assert found.shape == rows.shape[:1], f"a metric gave {found.shape} for {len(rows)} resamples"
        values.append(found)
    every = np.concatenate(values)
    low, high = np.quantile(every[np.isfinite(every)], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _score(metric: Metric, strata: list[Columns]) -> Score:
    value, sizes = float(_value(metric, strata)), [len(rows) for rows in strata]
    n = sum(sizes)
    if metric.is_proportion and len(strata) == 1:
        return Score(value, n, *wilson(round(value * n), n))
    return Score(value, n, *_bootstrap(lambda drawn: _value(metric, strata, drawn[0]), [sizes]))


def wilson(right: int, n: int) -> tuple[float, float]:
    """Return Wilson's interval of a proportion; as scipy's `binomtest`, whose import takes longer than a refresh may.

    (2np + z² ± z √(4np(1 − p) + z²)) ÷ 2(n + z²), p = right ÷ n (Newcombe 1998).
    """
    p, scale = right / n, 2 * (n + QUANTILE**2)
    centre = (2 * n * p + QUANTILE**2) / scale
    half = QUANTILE / scale * math.sqrt(4 * n * p * (1 - p) + QUANTILE**2)
    return (0.0 if right == 0 else centre - half), (1.0 if right == n else centre + half)


def _value(metric: Metric, strata: list[Columns], picks: list[NDArray[np.int64]] | None = None) -> Values:
    """Return the mean over strata of a metric: of all rows, or, (resamples,), of those that resamples picked."""
    chosen = strata if picks is None else [rows.take(pick, axis=0) for rows, pick in zip(strata, picks, strict=True)]
    return np.stack([metric.value(rows) for rows in chosen], -1).mean(-1)


def _strata(metric: Metric, records: Sequence[Record]) -> list[Columns]:
    """The metric's fields, float64 of shape (samples, columns), for each stratum."""
    return [
        np.array([[record[field] for field in metric.columns] for record in group], np.float64).reshape(len(group), -1)
        for group in strata(records)
    ]


def strata(records: Sequence[Record]) -> list[list[Record]]:
    """Return records by the `task` that they name of their own; all in one where they name none."""
    groups: dict[str | None, list[Record]] = {}
    for record in records:
        groups.setdefault(record.get("task"), []).append(record)
    return list(groups.values())
