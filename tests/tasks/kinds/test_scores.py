import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import f1_score, matthews_corrcoef

from sensmerge.tasks.kinds.classification import ClassificationTask
from sensmerge.tasks.kinds.completion import CompletionTask
from sensmerge.tasks.kinds.kind import KINDS, Task
from sensmerge.tasks.kinds.lm_eval import LmEvalTask
from sensmerge.tasks.kinds.scores import (
    RESAMPLES,
    Metric,
    Record,
    Score,
    agreement,
    halves,
    macro_f1,
    matthews,
    mean,
    mean_normalised,
    mean_ratio,
    mean_score,
    paired_difference,
    perplexity,
    ratio,
    strata,
    value_of,
    wilson,
)
from sensmerge.tasks.kinds.scores import score as score_of_records

COMPLETION = CompletionTask(kind="completion")
CLASSIFICATION = ClassificationTask(kind="classification")


def score_records(kind: str, records: list[Record]) -> dict[str, Score]:
    return KINDS[kind].scores(records)


def normalised(
    model: dict[str, list[Record]], experts: dict[str, list[Record]], tasks: Mapping[str, Task]
) -> Score | None:
    """By the main metrics of the tasks."""
    metrics = {name: task.metric_of(task.metric, experts[name]) for name, task in tasks.items()}
    return mean_normalised({name: metric for name, metric in metrics.items() if metric}, model, experts)


def classified(pairs: list[tuple[int, int]]) -> list[Record]:
    return [{"label": label, "prediction": prediction} for label, prediction in pairs]


def completed(generator: np.random.Generator, n: int, accuracy: float = 0.5) -> list[Record]:
    tokens = generator.integers(1, 30, size=n)
    return [
        {"nll": float(generator.gamma(t)), "correct": int(generator.binomial(t, accuracy)), "tokens": int(t)}
        for t in tokens
    ]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_accuracy_has_the_wilson_interval(right: list[bool]) -> None:
    score = score_records("classification", classified([(1, int(r)) for r in right]))["accuracy"]
    n, p, z = len(right), sum(right) / len(right), 1.959963984540054
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert score.value == pytest.approx(p)
    assert score.n == n
    assert score.low == pytest.approx(centre - half, abs=1e-9)
    assert score.high == pytest.approx(centre + half, abs=1e-9)
    assert -1e-12 <= score.low <= score.value + 1e-12 <= score.high + 2e-12 <= 1 + 3e-12


def test_completion_scores_are_ratios_of_sums() -> None:
    records: list[Record] = [{"nll": 2.0, "correct": 1, "tokens": 4}, {"nll": 1.0, "correct": 2, "tokens": 2}]
    scores = score_records("completion", records)
    assert scores.keys() == {"token_accuracy", "perplexity"}
    assert scores["token_accuracy"].value == pytest.approx(3 / 6)
    assert scores["perplexity"].value == pytest.approx(math.exp(3 / 6))
    assert scores["token_accuracy"].n == 2
    exact = score_records("completion", [record | {"exact": i} for i, record in enumerate(records)])["exact_match"]
    assert exact.value == 0.5


def test_perplexity_of_the_worst_model_is_a_number() -> None:
    assert math.isfinite(score_records("completion", [{"nll": 1e6, "correct": 0, "tokens": 2}])["perplexity"].high)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=60))
@pytest.mark.filterwarnings("ignore")
def test_f1_and_matthews_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    scores = score_records("classification", classified(pairs))
    labels, predictions = zip(*pairs, strict=True)
    assert scores["macro_f1"].value == pytest.approx(f1_score(labels, predictions, average="macro"), abs=1e-12)
    assert scores["matthews"].value == pytest.approx(matthews_corrcoef(labels, predictions), abs=1e-12)


def test_multiple_choice_has_accuracy_only() -> None:
    assert score_records("multiple_choice", classified([(0, 0), (1, 2)])).keys() == {"accuracy"}


def test_bootstrap_is_deterministic_and_holds_the_value() -> None:
    records = completed(np.random.default_rng(0), 200)
    scores = score_records("completion", records)
    assert scores == score_records("completion", records)
    for score in scores.values():
        assert score.low < score.value < score.high


def test_bootstrap_interval_has_the_width_of_the_normal_one() -> None:
    # With one token per sample the score is a mean of independent draws: its standard error is known.
    values = np.random.default_rng(1).gamma(2.0, size=1000)
    records: list[Record] = [{"task": "a", "score": float(value)} for value in values]
    score = score_records("lm_eval", records)["score"]
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert score.value == pytest.approx(values.mean())
    assert score.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert score.high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_bootstrap_covers_the_truth_about_95_times_in_100() -> None:
    generator = np.random.default_rng(2)
    covered = 0
    for _ in range(100):
        records = [{"correct": r["correct"], "tokens": r["tokens"]} for r in completed(generator, 80, accuracy=0.3)]
        score = score_records("completion", records)["token_accuracy"]
        covered += score.low <= 0.3 <= score.high
    # Binomial(100, 0.95) is below 85 once in 10⁵.
    assert covered >= 85


def test_tokens_of_one_sample_are_not_counted_as_independent() -> None:
    # All tokens of a sample are right or all wrong: the interval is that of 50 samples, not of 5000 tokens.
    records: list[Record] = [{"nll": 1.0, "correct": 100 * (i % 2), "tokens": 100} for i in range(50)]
    score = score_records("completion", records)["token_accuracy"]
    assert score.high - score.low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(50), rel=0.15)


# lm-eval


def test_lm_eval_scores_of_names_and_their_mean() -> None:
    records: list[Record] = [{"task": "a", "acc": 1.0, "acc_norm": 0.0}] * 3 + [
        {"task": "a", "acc": 0.0, "acc_norm": 0.0}
    ]
    records += [{"task": "b", "acc": 0.0}, {"task": "b", "acc": 1.0}]
    scores = score_records("lm_eval", records)
    assert scores.keys() == {"acc", "a/acc", "b/acc", "a/acc_norm"}
    assert {name: score.value for name, score in scores.items()} == {
        "a/acc": 0.75,
        "b/acc": 0.5,
        "acc": 0.625,
        "a/acc_norm": 0.0,
    }
    assert (scores["a/acc"].n, scores["b/acc"].n, scores["acc"].n) == (4, 2, 6)
    wilson = score_records("classification", classified([(1, 1), (1, 1), (1, 1), (1, 0)]))["accuracy"]
    assert scores["a/acc"] == wilson


def test_lm_eval_strata_are_resampled_apart() -> None:
    # Within each name all documents agree: the mean over names has no variance.
    records: list[Record] = [{"task": "a", "f": 0.25}] * 5 + [{"task": "b", "f": 0.75}] * 2
    assert score_records("lm_eval", records)["f"] == Score(0.5, 7, 0.5, 0.5)


def lm_eval_value(name: str, records: list[Record]) -> float:
    metric = LmEvalTask.metric_of(name, records)
    assert metric is not None
    return value_of(metric, records)


def test_lm_eval_perplexities() -> None:
    pairs: list[Record] = [{"word_perplexity": [-6.0, 2]}, {"word_perplexity": [-2.0, 2]}]
    assert lm_eval_value("word_perplexity", pairs) == pytest.approx(math.exp(8 / 4))
    assert lm_eval_value("bits_per_byte", [{"bits_per_byte": [-4.0, 2]}]) == pytest.approx(2 / math.log(2))
    assert lm_eval_value("perplexity", [{"perplexity": -1.0}, {"perplexity": -3.0}]) == pytest.approx(math.exp(2))
    with pytest.raises((TypeError, ValueError)):
        lm_eval_value("f", [{"f": "text"}])


def test_direction() -> None:
    assert not KINDS["classification"].lower_is_better("accuracy")
    assert not KINDS["lm_eval"].lower_is_better("arc_easy/acc")
    assert not KINDS["lm_eval"].lower_is_better("some_new_metric")
    assert KINDS["completion"].lower_is_better("perplexity")
    assert KINDS["lm_eval"].lower_is_better("wikitext/word_perplexity")
    assert KINDS["lm_eval"].lower_is_better("word_perplexity.none-other")


# Normalised


def only(score: Score | None) -> Score:
    assert score is not None
    return score


def test_an_expert_normalised_by_itself_is_one() -> None:
    generator = np.random.default_rng(3)
    records = {
        "text": completed(generator, 60),
        "classes": classified([(1, 1)] * 30 + [(0, 1)] * 10),
        "science": [{"task": "ab"[i % 2], "acc": float(i % 3 == 0)} for i in range(60)],
    }
    tasks = {"text": COMPLETION, "classes": CLASSIFICATION, "science": LmEvalTask(kind="lm_eval", names=["a", "b"])}
    assert only(normalised(records, records, tasks)) == Score(1.0, 160, 1.0, 1.0)


def test_normalised_is_the_mean_of_ratios() -> None:
    model = {"a": classified([(0, 0), (0, 1)]), "b": classified([(0, 0), (0, 0), (0, 1), (0, 1)])}
    experts = {"a": classified([(0, 0), (0, 0)]), "b": classified([(0, 0), (0, 1), (0, 1), (0, 1)])}
    score = only(normalised(model, experts, {"a": CLASSIFICATION, "b": CLASSIFICATION}))
    assert score.value == pytest.approx((0.5 / 1 + 0.5 / 0.25) / 2)
    assert score.n == 6
    assert score.low < score.value < score.high


def test_lower_is_better_is_inverted() -> None:
    task = CompletionTask(kind="completion", metric="perplexity")
    model: dict[str, list[Record]] = {"a": [{"nll": 4.0, "correct": 0, "tokens": 2}]}
    expert: dict[str, list[Record]] = {"a": [{"nll": 2.0, "correct": 0, "tokens": 2}]}
    assert only(normalised(model, expert, {"a": task})).value == pytest.approx(math.exp(1) / math.exp(2))


def test_rows_are_paired() -> None:
    # The model is right exactly on half of the tokens that the expert has right, row by row: no variance is left.
    generator = np.random.default_rng(4)
    expert: list[Record] = [{"nll": 1.0, "correct": 2 * int(generator.integers(1, 9)), "tokens": 20} for _ in range(50)]
    model: list[Record] = [record | {"correct": record["correct"] // 2} for record in expert]
    score = only(normalised({"a": model}, {"a": expert}, {"a": COMPLETION}))
    assert (score.value, score.low, score.high) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("metric", ["accuracy", "matthews"])
def test_no_ratio_to_an_expert_that_scores_nothing(metric: Any) -> None:
    task = ClassificationTask(kind="classification", metric=metric)
    expert, model = classified([(0, 1), (1, 0)]), classified([(0, 0), (1, 1)])
    good = {"good": CLASSIFICATION, "bad": task}
    assert normalised({"good": model, "bad": model}, {"good": model, "bad": expert}, good) is None
    assert normalised({}, {}, {}) is None


def test_resamples_without_a_ratio_are_left_out() -> None:
    expert, model = classified([(0, 0)] + [(0, 1)] * 9), classified([(0, 0)] * 5 + [(0, 1)] * 5)
    score = only(normalised({"a": model}, {"a": expert}, {"a": CLASSIFICATION}))
    assert score.value == pytest.approx(5.0)
    assert math.isfinite(score.low)
    assert math.isfinite(score.high)


# Dynamic models


def test_routed_accuracy_is_a_proportion_of_its_own() -> None:
    records = [
        {**record, "routed": routed} for record, routed in zip(classified([(0, 0)] * 4), (1, 1, 0, 1), strict=True)
    ]
    scores = score_records("classification", records)
    assert scores.keys() == {"accuracy", "routed_accuracy", "macro_f1", "matthews"}
    assert scores["accuracy"].value == 1.0
    assert scores["routed_accuracy"] == score_records("classification", classified([(1, 1)] * 3 + [(1, 0)]))["accuracy"]
    assert "routed_accuracy" not in score_records("classification", classified([(0, 0)]))


def test_mean_score() -> None:
    values = np.random.default_rng(5).gamma(2.0, size=400)
    score = mean_score(values.tolist())
    assert (score.value, score.n) == (pytest.approx(values.mean()), 400)
    half = 1.96 * values.std() / math.sqrt(400)
    assert score.high - score.low == pytest.approx(2 * half, rel=0.15)
    right = mean_score([1.0, 0.0, 1.0, 1.0], is_proportion=True)
    assert right == score_records("classification", classified([(1, 1), (1, 0), (1, 1), (1, 1)]))["accuracy"]
    assert mean_score([0.25]) == Score(0.25, 1, 0.25, 0.25)


def fields(*values: float) -> list[Record]:
    return [{"right": value} for value in values]


def test_mean_ratio_is_the_mean_over_tasks_of_ratios_of_means() -> None:
    above, below = {"a": fields(1, 0), "b": fields(1, 1, 0, 0)}, {"a": fields(1, 1), "b": fields(1, 0, 0, 0)}
    score = only(mean_ratio(above, below, "right"))
    assert score.value == pytest.approx((0.5 / 1 + 0.5 / 0.25) / 2)
    assert score.n == 6
    assert only(mean_ratio(below, below, "right")) == Score(1.0, 6, 1.0, 1.0)


def test_mean_ratio_is_paired_and_needs_a_denominator() -> None:
    below = fields(*(float(value) for value in np.random.default_rng(6).integers(1, 9, size=30)))
    above = fields(*(record["right"] / 2 for record in below))
    score = only(mean_ratio({"a": above}, {"a": below}, "right"))
    assert (score.value, score.low, score.high) == (0.5, 0.5, 0.5)
    assert mean_ratio({"a": above, "b": fields(1)}, {"a": below, "b": fields(0)}, "right") is None
    assert mean_ratio({}, {}, "right") is None


def test_halves_split_every_lm_eval_task_and_every_model_alike() -> None:
    records = [{"task": "ab"[i % 3 == 0], "acc": i} for i in range(31)]
    first, second = halves(records)
    assert sorted(one["acc"] for one in first + second) == list(range(31))
    assert [[one["task"] for one in half].count("b") for half in (first, second)] == [5, 6]
    assert [[one["task"] for one in half].count("a") for half in (first, second)] == [10, 10]
    other = [record | {"acc": -record["acc"]} for record in records]
    assert [[-one["acc"] for one in half] for half in halves(other)] == [
        [one["acc"] for one in half] for half in (first, second)
    ]
    assert halves(records[:1]) == ([], records[:1])


@pytest.mark.parametrize(
    ("kind", "record"),
    [
        ("classification", {"label": 1, "prediction": 0}),
        ("completion", {"nll": 1.5, "correct": 1, "tokens": 2, "exact": 1}),
        ("lm_eval", {"task": "a", "acc": 1.0}),
    ],
)
def test_one_score_is_that_of_all(kind: str, record: Record) -> None:
    records = [record, record]
    for name, score in score_records(kind, records).items():
        assert KINDS[kind].score_of(name, records) == score
    assert KINDS[kind].score_of("bleu", records) is None
    assert CompletionTask.score_of("exact_match", [{"nll": 1.0, "correct": 1, "tokens": 1}]) is None


# All resamples at once against one after the other


@given(st.integers(1, 300), st.data())
def test_wilson_is_that_of_scipy(n: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, n))
    expected = binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert wilson(right, n) == (expected.low, expected.high)


METRICS = {
    "accuracy": Metric(("label", "prediction"), agreement),
    "f1": Metric(("label", "prediction"), macro_f1),
    "matthews": Metric(("label", "prediction"), matthews),
    "token_accuracy": Metric(("correct", "tokens"), ratio),
    "perplexity": Metric(("nll", "tokens"), perplexity, higher_is_better=False),
    "loss": Metric(("nll",), mean),
}


def answered(seed: int, n: int = 90) -> list[Record]:
    generator = np.random.default_rng(seed)
    records = completed(generator, n)
    for number, record in enumerate(records):
        record |= {"label": int(generator.integers(5)), "task": "abc"[number % 3] if seed % 2 else "a"}
        record["prediction"] = record["label"] if generator.random() < 0.6 else int(generator.integers(5))
    return records


def columns(metric: Metric, records: list[Record]) -> list[np.ndarray[Any, Any]]:
    return [np.array([[one[name] for name in metric.columns] for one in some], float) for some in strata(records)]


def percentiles(value: Callable[[Callable[[int], Any]], float]) -> tuple[float, float]:
    """The interval of a statistic that is handed what draws n of n rows, resample after resample."""
    generator = np.random.default_rng(0)
    values = [value(lambda n: generator.integers(n, size=n)) for _ in range(RESAMPLES)]
    low, high = np.quantile(np.array(values)[np.isfinite(values)], [0.025, 0.975])
    return float(low), float(high)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("seed", [0, 1])
def test_resamples_are_those_of_one_generator(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sensmerge.tasks.kinds.scores.AT_ONCE", 12345)  # the last ones are fewer
    metric, model, other, own = METRICS[name], answered(seed), answered(seed + 2), answered(seed + 4)
    above, others, below = (columns(metric, one) for one in (model, other, own))

    def value(parts: list[np.ndarray[Any, Any]], picks: list[Any]) -> float:
        return float(np.mean([metric.value(rows[pick]) for rows, pick in zip(parts, picks, strict=True)]))

    def alone(draw: Callable[[int], Any]) -> float:
        return value(above, [draw(len(rows)) for rows in above])

    def share(draw: Callable[[int], Any]) -> float:
        found = []
        for _ in range(2):
            picks = [draw(len(rows)) for rows in below]
            of = (above, below) if metric.higher_is_better else (below, above)
            found.append(value(of[0], picks) / value(of[1], picks))
        return float(np.mean(found))

    def gain(draw: Callable[[int], Any]) -> float:
        picks = [draw(len(rows)) for rows in above]
        return value(above, picks) - value(others, picks)

    both = {"one": metric, "two": metric}
    ratios = mean_normalised(both, dict.fromkeys(both, model), dict.fromkeys(both, own))
    assert ratios is not None
    for score, statistic in (
        (score_of_records(metric, model), alone),
        (ratios, share),
        (paired_difference(metric, model, other), gain),
    ):
        assert (score.low, score.high) == pytest.approx(percentiles(statistic), rel=1e-13, abs=1e-13)


def test_a_metric_that_does_not_look_at_resamples_apart_is_found_out() -> None:
    scalar = Metric(("nll",), lambda columns: float(columns[..., 0].mean()))
    with pytest.raises(AssertionError, match="a metric gave"):
        score_of_records(scalar, answered(0))
