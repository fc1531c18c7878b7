"""Scores and their 95 % intervals from the raw outcomes of single samples.

An evaluation leaves one record per sample; every score, interval and comparison is computed from these records alone.
What a record holds, and which metrics it allows, is a matter of the kind of task.

A proportion has a Wilson interval. Other scores have a percentile bootstrap over samples, not over tokens: tokens of
one sample are not independent. Records that name a `task` of their own (those of lm-eval) are strata by it, resampled
apart; a score is then the mean over the strata.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field

Record = dict[str, Any]
Columns = NDArray[np.float64]

RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Score:
    """A score with its 95 % interval."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # reports are read back

    value: Annotated[float, Field(description="the metric")]
    n: Annotated[int, Field(description="samples it was measured on")]
    low: Annotated[float, Field(description="lower end of the 95 % interval")]
    high: Annotated[float, Field(description="upper end of the 95 % interval")]


@dataclass(frozen=True)
class Metric:
    """How a score comes from records."""

    columns: tuple[str, ...]
    """Fields of a record that it reads."""
    value: Callable[[Columns], float]
    """From those fields of all samples, shape (samples, columns), to the score."""
    is_proportion: bool = False
    """Whether it is the share of independent samples that are right."""
    higher_is_better: bool = True


def mean(columns: Columns) -> float:
    """Mean of the first column."""
    return float(columns[:, 0].mean())


def ratio(columns: Columns) -> float:
    """Sum of the first column ÷ sum of the second."""
    total = columns.sum(axis=0)
    return float(total[0] / total[1])


def perplexity(columns: Columns) -> float:
    """Exp of the mean −ln p per token; at most e⁷⁰⁰, so that the worst of models has a number too."""
    return float(np.exp(min(ratio(columns), 700.0)))


def agreement(columns: Columns) -> float:
    """Share of samples whose two columns are equal."""
    return float((columns[:, 0] == columns[:, 1]).mean())


def confusion(columns: Columns) -> NDArray[np.float64]:
    """Confusion matrix C of columns (label, prediction): C[i, j] counts samples of class i that were called j."""
    label, prediction = columns.T.astype(np.int64)
    classes = int(columns.max()) + 1
    return np.bincount(label * classes + prediction, minlength=classes**2).reshape(classes, classes).astype(np.float64)


def macro_f1(columns: Columns) -> float:
    """Mean over classes of F1 = 2·TP ÷ (labels + predictions), over classes that occur as label or prediction.

    scikit-learn's `f1_score(average="macro")`, but fast enough to bootstrap.
    """
    table = confusion(columns)
    seen = table.sum(axis=0) + table.sum(axis=1)
    return float((2 * table.diagonal()[seen > 0] / seen[seen > 0]).mean())


def matthews(columns: Columns) -> float:
    """Matthews correlation for any number of classes (Gorodkin 2004, as scikit-learn); 0 where it is undefined.

    (c·n − p·t) ÷ √((n² − p·p)(n² − t·t)), with c right samples of n, t and p the counts of labels and predictions.
    """
    table = confusion(columns)
    n, labels, predictions = table.sum(), table.sum(axis=1), table.sum(axis=0)
    scale = (n**2 - predictions @ predictions) * (n**2 - labels @ labels)
    return float((table.trace() * n - labels @ predictions) / np.sqrt(scale)) if scale > 0 else 0.0


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

    def difference(draw: Callable[[int], Any]) -> float:
        found = []
        for first, second in pairs:
            picks = [draw(len(rows)) for rows in first[2]]
            mine, other = (
                _value(metric, above, picks) / _value(metric, below, picks) for metric, above, below in (first, second)
            )
            found.append(mine - other)
        return float(np.mean(found))

    n = sum(len(rows) for (_, above, _), _ in pairs for rows in above)
    return Score(difference(_everything), n, *_bootstrap(difference))


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

    def difference(draw: Callable[[int], Any]) -> float:
        picks = [draw(len(rows)) for rows in below]
        return float(_value(metric, above, picks) - _value(metric, below, picks))

    return Score(difference(_everything), sum(map(len, below)), *_bootstrap(difference))


_Comparison = tuple[Metric, list[Columns], list[Columns]]
"""A metric, and the strata whose value is divided by that of others."""


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

    def normalised(draw: Callable[[int], Any]) -> float:
        ratios = []
        for metric, above, below in comparisons:
            picks = [draw(len(rows)) for rows in below]
            ratios.append(_value(metric, above, picks) / _value(metric, below, picks))
        return float(np.mean(ratios))

    n = sum(len(rows) for _, above, _ in comparisons for rows in above)
    return Score(normalised(_everything), n, *_bootstrap(normalised))


def _everything(n: int) -> slice:
    return slice(n)


def _bootstrap(statistic: Callable[[Callable[[int], Any]], float]) -> tuple[float, float]:
    """Percentile interval of a statistic, which is handed a function that draws n rows of n with replacement."""
    generator = np.random.default_rng(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.array([statistic(lambda n: generator.integers(n, size=n)) for _ in range(RESAMPLES)])
    low, high = np.quantile(values[np.isfinite(values)], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _score(metric: Metric, strata: list[Columns]) -> Score:
    value, n = _value(metric, strata), sum(map(len, strata))
    if metric.is_proportion and len(strata) == 1:
        from scipy.stats import binomtest  # takes half a second, which those who only plan save

        interval = binomtest(round(value * n), n).proportion_ci(LEVEL, method="wilson")
        return Score(float(value), n, float(interval.low), float(interval.high))
    low, high = _bootstrap(lambda draw: float(_value(metric, strata, [draw(len(rows)) for rows in strata])))
    return Score(float(value), n, low, high)


def _value(metric: Metric, strata: list[Columns], picks: list[Any] | None = None) -> np.float64:
    """Mean over strata of a metric, of all rows or of the picked ones."""
    chosen = strata if picks is None else [rows[pick] for rows, pick in zip(strata, picks, strict=True)]
    return np.float64(np.mean([metric.value(rows) for rows in chosen]))


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
