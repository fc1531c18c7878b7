"""Scores and their 95 % intervals from the raw outcomes of single samples.

An evaluation leaves one record per sample; every score, interval and comparison is computed from these records alone.

| kind | fields of a record |
| --- | --- |
| completion | `nll` (−Σ ln p over the completion's tokens), `correct`, `tokens`; `exact` (0 or 1) if it generated |
| classification, multiple_choice | `prediction`, `label` (class or choice numbers) |
| classification by a dynamic model | also `routed` (0 or 1): whether the head that it chose itself is right |
| lm_eval | `task` (its lm-eval name), each metric of that task: one number, or the two that its aggregation divides |

A proportion has a Wilson interval. Other scores have a percentile bootstrap over samples, not over tokens: tokens of
one sample are not independent. The lm-eval tasks of one lm_eval task are strata, resampled apart.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensmerge.tasks.kinds.datasets import Task

Record = dict[str, Any]
Columns = NDArray[np.float64]

RESAMPLES = 1000
LEVEL = 0.95
LOWER_IS_BETTER = {"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter"}


@dataclass(frozen=True)
class Score:
    """A score with its 95 % interval."""

    value: float
    n: int
    """Samples it was computed from."""
    low: float
    high: float


@dataclass(frozen=True)
class Metric:
    """How a score comes from records."""

    kinds: tuple[str, ...]
    """Kinds of task that have it."""
    columns: tuple[str, ...]
    """Fields of a record that it reads."""
    value: Callable[[Columns], float]
    """From those fields of all samples, shape (samples, columns), to the score."""
    is_proportion: bool = False
    """Whether it is the share of independent samples that are right."""


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
    return _score(Metric((), ("value",), mean, is_proportion), [np.array(values, np.float64).reshape(-1, 1)])


METRICS = {
    "token_accuracy": Metric(("completion",), ("correct", "tokens"), ratio),
    "perplexity": Metric(("completion",), ("nll", "tokens"), perplexity),
    "exact_match": Metric(("completion",), ("exact",), mean, is_proportion=True),
    "accuracy": Metric(("classification", "multiple_choice"), ("label", "prediction"), agreement, is_proportion=True),
    "routed_accuracy": Metric(("classification",), ("routed",), mean, is_proportion=True),
    "macro_f1": Metric(("classification",), ("label", "prediction"), macro_f1),
    "matthews": Metric(("classification",), ("label", "prediction"), matthews),
}

# How lm-eval aggregates where it is not the mean; per sample it gives ln p, or ln p and the number of words or bytes.
LM_EVAL_AGGREGATION: dict[str, Callable[[Columns], float]] = {
    "perplexity": lambda columns: float(np.exp(-mean(columns))),
    "word_perplexity": lambda columns: float(np.exp(-ratio(columns))),
    "byte_perplexity": lambda columns: float(np.exp(-ratio(columns))),
    "bits_per_byte": lambda columns: -ratio(columns) / float(np.log(2)),
}


def higher_is_better(metric: str) -> bool:
    """Whether a larger value of a metric is better. Unknown names, which come from lm-eval, are taken to be."""
    return _plain(metric) not in LOWER_IS_BETTER


def score_records(kind: str, records: list[Record]) -> dict[str, Score]:
    """Every metric of a kind of task that the records (at least one) allow.

    For lm_eval the names are `NAME/METRIC` for each lm-eval task, and `METRIC` for its mean over the lm-eval tasks if
    all of them report it. The bootstrap has a fixed seed: the same records give the same interval.
    """
    assert records, "no records to score"
    if kind != "lm_eval":
        return {
            name: _score(metric, _strata(metric, records))
            for name, metric in METRICS.items()
            if kind in metric.kinds and set(metric.columns) <= records[0].keys()
        }
    scores = {}
    groups = _by_name(records)
    for name in sorted(set().union(*records) - {"task"}):
        having = [group for group in groups if name in group[0]]
        if len(having) == len(groups):
            metric = _lm_eval_metric(name, records)
            scores[name] = _score(metric, _strata(metric, records))
        for group in having:
            metric = _lm_eval_metric(name, group)
            scores[f"{group[0]['task']}/{name}"] = _score(metric, _strata(metric, group))
    return scores


def score_of(kind: str, metric: str, records: list[Record]) -> Score | None:
    """One of the scores of `score_records`, without the work for the others; None where the records have none."""
    if kind == "lm_eval":
        return score_records(kind, records).get(metric)
    found = METRICS.get(metric)
    if found is None or kind not in found.kinds or not set(found.columns) <= records[0].keys():
        return None
    return _score(found, _strata(found, records))


def halves(records: list[Record]) -> tuple[list[Record], list[Record]]:
    """Split records in two at random, each lm-eval task by itself; the same way for every model on the same rows.

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
    model: Mapping[str, list[Record]], experts: Mapping[str, list[Record]], tasks: Mapping[str, Task]
) -> Score | None:
    """Mean over tasks of a model's main metric ÷ that of the task's own expert; the inverse where lower is better.

    `model[task]` and `experts[task]` are records of the same rows in the same order; `n` is their number over all
    tasks. The interval is a paired bootstrap: each resample takes the same rows for model and expert, so what is hard
    about a row cancels. Resamples in which an expert scores 0 have no ratio and are left out.

    None where a denominator is not positive (an expert that gets nothing right, or a Matthews correlation ≤ 0): the
    ratio has no meaning then, and a mean over the other tasks would hide that.
    """
    comparisons = []
    for name, task in tasks.items():
        metric = _lm_eval_metric(task.metric, experts[name]) if task.kind == "lm_eval" else METRICS[task.metric]
        mine, own = _strata(metric, model[name]), _strata(metric, experts[name])
        assert [len(rows) for rows in mine] == [len(rows) for rows in own], f"{name}: model and expert differ in rows"
        comparisons.append((metric, *((mine, own) if higher_is_better(task.metric) else (own, mine))))
    return _mean_ratio(comparisons)


def mean_ratio(above: Mapping[str, list[Record]], below: Mapping[str, list[Record]], field: str) -> Score | None:
    """Mean over tasks of the mean of a record's field in `above` ÷ that in `below`; otherwise as `mean_normalised`."""
    metric = Metric((), (field,), mean)
    return _mean_ratio([(metric, _strata(metric, above[task]), _strata(metric, below[task])) for task in above])


def paired_difference(kind: str, metric: str, new: list[Record], old: list[Record]) -> Score:
    """A metric of one model − that of another on the same rows in the same order.

    The interval is a paired bootstrap, as in `mean_normalised`: models that answer alike differ by exactly 0.
    """
    found = _lm_eval_metric(metric, old) if kind == "lm_eval" else METRICS[metric]
    above, below = _strata(found, new), _strata(found, old)
    assert [len(rows) for rows in above] == [len(rows) for rows in below], "the models differ in rows"

    def difference(draw: Callable[[int], Any]) -> float:
        picks = [draw(len(rows)) for rows in below]
        return float(_value(found, above, picks) - _value(found, below, picks))

    return Score(difference(_everything), sum(map(len, below)), *_bootstrap(difference))


def _mean_ratio(comparisons: Sequence[tuple[Metric, list[Columns], list[Columns]]]) -> Score | None:
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


def _strata(metric: Metric, records: list[Record]) -> list[Columns]:
    """The metric's fields, float64 of shape (samples, columns), for each lm-eval task; one stratum for other kinds."""
    return [
        np.array([[record[field] for field in metric.columns] for record in group], np.float64).reshape(len(group), -1)
        for group in _by_name(records)
    ]


def _by_name(records: list[Record]) -> list[list[Record]]:
    groups: dict[str | None, list[Record]] = {}
    for record in records:
        groups.setdefault(record.get("task"), []).append(record)
    return list(groups.values())


def lm_eval_value(metric: str, records: list[Record]) -> float:
    """A metric of one lm-eval task from its records. Raises TypeError or ValueError if their values are no numbers."""
    found = _lm_eval_metric(metric, records)
    return float(_value(found, _strata(found, records)))


def _lm_eval_metric(name: str, records: list[Record]) -> Metric:
    value = LM_EVAL_AGGREGATION.get(_plain(name), mean)
    is_proportion = value is mean and all(record[name] in (0, 1) for record in records)
    return Metric(("lm_eval",), (name,), value, is_proportion)


def _plain(metric: str) -> str:
    """A metric's own name, without the lm-eval task before it and the lm-eval filter after it."""
    return metric.rpartition("/")[2].partition(".")[0]
