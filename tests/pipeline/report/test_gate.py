import math
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import norm

from sensmerge.pipeline.recipe.gate import Gate
from sensmerge.pipeline.report.gate import (
    Best,
    Outcomes,
    best_of,
    best_variant,
    candidates,
    choice,
    comparison_table,
    is_held_out,
    judge,
    passes,
)
from sensmerge.pipeline.report.report import Report, RouteInfo
from sensmerge.pipeline.report.results import halved
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds import scores
from sensmerge.tasks.kinds.classification import ClassificationTask
from sensmerge.tasks.kinds.kind import KINDS
from sensmerge.tasks.kinds.scores import Metric, Score, agreement
from tests.conftest import known
from tests.pipeline.tracking.test_record import make_report

Flags = list[bool]


def outcomes(right: Flags, samples: str = "s", metric: str = "accuracy") -> Outcomes:
    """Of a task with two classes: which samples were right."""
    records = [{"label": 1, "prediction": int(one)} for one in right]
    return Outcomes(kind="classification", metric=metric, samples=samples, records=records)


def completions(nll: list[float], metric: str = "perplexity") -> Outcomes:
    records: list[dict[str, Any]] = [{"nll": one, "correct": 1, "tokens": 2} for one in nll]
    return Outcomes(kind="completion", metric=metric, samples="s", records=records)


def test_a_champion_of_an_unknown_kind_is_not_compared() -> None:
    """That of a package that is no longer there."""
    unknown = outcomes([True] * 9).model_copy(update={"kind": "gone"})
    (verdict,) = judge({"math": outcomes([True] * 9)}, {"math": unknown}, 1.0)
    assert (verdict.old, verdict.difference, verdict.passed) == (None, None, False)


@settings(max_examples=10)  # each takes two bootstraps
@given(right=st.lists(st.booleans(), min_size=1, max_size=30), tolerance=st.floats(0, 1))
def test_a_model_that_answers_alike_passes_whatever_the_tolerance(right: Flags, tolerance: float) -> None:
    (verdict,) = judge({"math": outcomes(right)}, {"math": outcomes(right)}, tolerance)
    assert verdict.passed
    assert verdict.difference == Score(value=0, n=len(right), low=0, high=0)


def test_the_interval_is_that_of_paired_differences() -> None:
    """Of n samples b are lost and c won: the difference has the standard error √(b + c − (b − c)²/n) ÷ n."""
    n, lost, won = 400, 20, 30
    old = [True] * lost + [False] * won + [True] * (n - lost - won)
    new = [False] * lost + [True] * won + [True] * (n - lost - won)
    (verdict,) = judge({"math": outcomes(new)}, {"math": outcomes(old)}, 0.02)
    error = norm.ppf(0.975) * math.sqrt(lost + won - (won - lost) ** 2 / n) / n
    assert verdict.difference is not None
    assert verdict.difference.value == pytest.approx((won - lost) / n)
    assert verdict.difference.low == pytest.approx((won - lost) / n - error, abs=error / 5)
    assert verdict.difference.high == pytest.approx((won - lost) / n + error, abs=error / 5)
    assert verdict.difference.n == n


def test_what_counts_is_the_worse_end_of_the_interval() -> None:
    """Equal scores from different answers: passed only if the tolerance covers the interval."""
    old, new = [True] * 10 + [False] * 10 + [True] * 80, [False] * 10 + [True] * 10 + [True] * 80
    low = judge({"math": outcomes(new)}, {"math": outcomes(old)}, 0.0)[0].difference
    assert low is not None
    share = -low.low / 0.9  # tolerance is a share of the champion's score
    for tolerance, passed in ((0.0, False), (share * 0.99, False), (share * 1.01, True)):
        assert passes(judge({"math": outcomes(new)}, {"math": outcomes(old)}, tolerance)) == passed


def test_one_task_that_got_worse_is_enough_to_fail() -> None:
    good, bad = outcomes([True] * 50), outcomes([False] * 50)
    verdicts = judge({"math": good, "code": bad}, {"math": bad, "code": good}, 0.1)
    assert {verdict.task: verdict.passed for verdict in verdicts} == {"math": True, "code": False}
    assert not passes(verdicts)


def test_lower_is_better_for_perplexity() -> None:
    worse, better = completions([4.0] * 20), completions([1.0] * 20)
    assert passes(judge({"math": better}, {"math": worse}, 0.0))
    (verdict,) = judge({"math": worse}, {"math": better}, 0.5)
    assert not verdict.passed
    assert verdict.difference is not None
    assert verdict.difference.value == pytest.approx(math.exp(2) - math.exp(0.5))


def test_what_cannot_be_compared_is_not_passed() -> None:
    right = [True] * 5
    for new, old in (
        ({"math": outcomes(right, "new samples")}, {"math": outcomes(right)}),
        ({"math": outcomes(right), "code": outcomes(right)}, {"math": outcomes(right)}),
        ({"math": outcomes(right)}, {"math": outcomes(right), "code": outcomes(right)}),
    ):
        verdicts = judge(new, old, 1.0)
        assert not passes(verdicts)
        (failed,) = (verdict for verdict in verdicts if not verdict.passed)
        assert "not scored on the same samples" in str(failed)
    assert passes(judge({"math": outcomes(right)}, {"math": outcomes(right, metric="macro_f1")}, 0.0))


def test_a_verdict_in_words() -> None:
    (verdict,) = judge({"math": outcomes([True, True])}, {"math": outcomes([True, False])}, 0.0)
    assert str(verdict) == (
        "accuracy 0.500 → 1.000, difference +0.500 [+0.000, +1.000], n = 2: passed (the interval's worse end, "
        "+0.000, must not be below +0.000: tolerance 0 × 0.500)"
    )
    (verdict,) = judge({"math": outcomes([True, False])}, {"math": outcomes([True, True])}, 0.02)
    assert str(verdict).endswith(
        "n = 2: failed (the interval's worse end, -1.000, must not be below -0.020: tolerance 0.02 × 1.000)"
    )


@pytest.fixture
def report(tmp_path: Any) -> Report:
    return make_report(tmp_path)


def gate(**settings: Any) -> Gate:
    return Gate.model_validate(settings)


def test_best_variant(report: Report) -> None:
    assert best_variant(report, gate()) == "ta-sens.3"
    assert best_variant(report, gate(variants=["ta"])) == "ta"
    assert best_variant(report, gate(metric="math/accuracy")) == "ta-sens.3"
    taken = {
        name: {"math": {"perplexity": Score(value=value, n=1, low=value, high=value)}}
        for name, value in (("ta", 2.0), ("ta-sens.3", 3.0))
    }
    completed = report.model_copy(update={"scores": taken, "kinds": {"math": "completion"}})
    assert best_variant(completed, gate(metric="math/perplexity")) == "ta"


def test_kinds_that_the_recipe_does_not_use_turn_nothing_round(report: Report) -> None:
    class Worse(ClassificationTask):
        metrics: ClassVar = {"accuracy": Metric(("label", "prediction"), agreement, higher_is_better=False)}

    with known(KINDS, worse=Worse):
        assert best_variant(report, gate(metric="math/accuracy")) == "ta-sens.3"
    with pytest.raises(
        InputError,
        match=r"gate.metric: no variant that may become champion has math/bleu; .*code/accuracy, code/macro_f1",
    ):
        best_variant(report, gate(metric="math/bleu"))
    with pytest.raises(InputError, match="no variant that may become champion has mean_normalised"):
        best_variant(report.model_copy(update={"mean_normalised": {}}), gate())


ROUTE = RouteInfo(
    rule={"score": "centroid", "layer": 1, "pool": "mean", "metric": "l2"},
    trust=1.0,
    calibration=Score(value=1.0, n=9, low=0.8, high=1.0),
    candidates=[],
    projection={},
    bytes=1,
    source_bytes=2,
)


def test_a_dynamic_variant_has_to_be_named(report: Report) -> None:
    dynamic = report.model_copy(update={"routes": {"ta-sens.3": ROUTE}})
    assert candidates(dynamic, gate()) == ["ta"]
    assert best_variant(dynamic, gate()) == "ta"
    assert best_variant(dynamic, gate(variants=["ta", "ta-sens.3"])) == "ta-sens.3"
    only = dynamic.model_copy(update={"routes": {"ta": ROUTE, "ta-sens.3": ROUTE}})
    assert candidates(only, gate()) == []


def classified(right: NDArray[np.bool_]) -> list[dict[str, Any]]:
    return [{"label": 1, "prediction": int(one)} for one in right]


def test_the_best_of_many_equals_is_shown_by_samples_that_did_not_choose_it() -> None:
    """Fifteen variants that are right half of the time: the best of them seems better, by samples that it won on."""
    task = ClassificationTask(kind="classification")
    variants = [f"v{i}" for i in range(15)]
    chosen, shown = [], []
    for seed in range(20):
        generator = np.random.default_rng(seed)
        records = {name: {"math": classified(generator.random(200) < 0.5)} for name in variants}
        first, second = halved(records, {"math": task}, "math/accuracy", variants)
        best = max(variants, key=lambda name: first[name].value)
        assert first[best].n == second[best].n == 100
        chosen.append(first[best].value)
        shown.append(second[best].value)
    assert np.mean(chosen) > 0.57
    assert np.mean(shown) == pytest.approx(0.5, abs=4 * 0.05 / math.sqrt(20))  # the mean of 100 coins has 0.05


def test_halves_are_those_of_normalised_means_too() -> None:
    task = ClassificationTask(kind="classification")
    generator = np.random.default_rng(0)
    records = {name: {"math": classified(generator.random(50) < 0.7)} for name in ("math", "ta", "base")}
    for half, found in enumerate(halved(records, {"math": task}, "mean_normalised", ["ta"])):
        mine, own = (scores.halves(records[name]["math"])[half] for name in ("ta", "math"))
        score = scores.mean_normalised({"math": task.metrics[task.metric]}, {"math": mine}, {"math": own})
        assert score is not None
        assert found == {"ta": score}
    one = {name: {"math": found["math"][:1]} for name, found in records.items()}
    assert halved(one, {"math": task}, "mean_normalised", ["ta"]) == ({}, {})
    assert halved(records, {"math": task}, "code/accuracy", ["ta"]) == ({}, {})


def test_a_choice_is_said_with_what_it_is_worth(report: Report) -> None:
    def score(value: float) -> Score:
        return Score(value=value, n=9, low=value - 0.1, high=value + 0.1)

    halves = {
        "first_half": {"ta": score(0.8), "ta-sens.3": score(0.7)},
        "second_half": {"ta": score(0.5), "ta-sens.3": score(0.6)},
    }
    halved_report = report.model_copy(update=halves)
    assert best_variant(halved_report, gate()) == "ta"
    assert is_held_out(halved_report, gate())
    assert choice(halved_report, gate()) == (
        "best of 2 variants: ta, chosen by mean_normalised on half of the samples: 0.800 [0.700, 0.900], n = 9; "
        "on the held-out half: 0.500 [0.400, 0.600], n = 9. This is the one that counts: the table goes by all "
        "samples, where ta-sens.3, chosen and scored by the same ones, looks better than it is"
    )
    assert best_of(halved_report, gate()) == Best("ta", score(0.5), choice(halved_report, gate()))
    assert choice(halved_report, gate(variants=["ta"])) is None
    assert best_of(halved_report, gate(variants=["ta"])) == Best("ta")
    dynamic = halved_report.model_copy(update={"routes": {"ta-se": None}})
    assert str(choice(dynamic, gate())).startswith("best of 2 static variants: ta, ")
    assert str(choice(dynamic, gate(variants=["ta", "ta-sens.3"]))).startswith("best of 2 variants: ta, ")
    assert not is_held_out(halved_report, gate(variants=["ta"]))
    assert "ta-sens.3, chosen by mean_normalised on all samples" in str(choice(report, gate()))
    assert "too few to hold some out, so this is optimistic" in str(choice(report, gate()))
    assert choice(report, gate(metric="math/bleu")) is None


def test_a_challenger_is_judged_by_the_half_that_did_not_choose_it() -> None:
    """It wins every sample of the half that it was chosen by, and loses every other."""
    records = [{"label": 1, "prediction": 0, "number": i} for i in range(40)]
    first, second = ({one["number"] for one in half} for half in scores.halves(records))
    assert (len(first), len(second), first & second) == (20, 20, set())
    new, old = outcomes([i in first for i in range(40)]), outcomes([i in second for i in range(40)])
    (verdict,) = judge({"math": new}, {"math": old}, 0.0, held_out=True)
    assert verdict.difference is not None
    assert (verdict.difference.value, verdict.difference.n, verdict.passed) == (-1, 20, False)
    (verdict,) = judge({"math": new}, {"math": old}, 0.0)
    assert verdict.difference is not None
    assert (verdict.difference.value, verdict.difference.n) == (0, 40)


def test_comparison_table() -> None:
    verdicts = judge({"math": outcomes([True, True])}, {"math": outcomes([True, False]), "code": outcomes([True])}, 0.0)
    table = comparison_table(["a@champion, a/1 (ta)", "a/2 (ties)"], [Score(0.5, 9, 0.4, 0.6), None], verdicts)
    assert table.title == "A: a@champion, a/1 (ta)\nB: a/2 (ties)"
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["math\naccuracy", "code\naccuracy", "mean of score ÷\nown expert's"]
    assert cells[1][2] == "0.500\n[0.400, 0.600]\nn = 9"
    assert cells[2][1:] == ["–", "–"]
    assert cells[3] == ["+0.500\n[+0.000, +1.000]\nn = 2", "other samples", "–"]
