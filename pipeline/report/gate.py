"""Whether a challenger may replace the champion: paired differences on the same samples, judged by their intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from rich.table import Table

from sensmerge.pipeline.recipe.gate import MEAN_NORMALISED, Gate
from sensmerge.pipeline.report.report import Report, cell
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.kind import KINDS
from sensmerge.tasks.kinds.scores import Score, halves, paired_difference


class Outcomes(BaseModel):
    """What a model did with each evaluation sample of a task."""

    model_config = ConfigDict(extra="forbid")

    kind: str = Field(description="kind of the task")
    metric: str = Field(description="main metric of the task")
    samples: str = Field(description="digest of the samples and of how they are scored")
    records: list[dict[str, Any]] = Field(description="one per sample, as its kind makes them")


@dataclass(frozen=True)
class Verdict:
    """What the gate says of one task."""

    task: str
    metric: str
    old: Score | None
    """of the champion; None where it was not scored"""
    new: Score | None
    """of the challenger"""
    difference: Score | None
    """new − old on the same samples, with its paired interval; None where their samples differ"""
    passed: bool
    why: str = ""
    """what the difference was held against"""

    def __str__(self) -> str:
        """Say it in a line."""
        word = "passed" if self.passed else "failed"
        if self.difference is None or self.old is None or self.new is None:
            return f"{self.metric}: {word}, because champion and challenger were not scored on the same samples"
        d = self.difference
        return (
            f"{self.metric} {self.old.value:.3f} → {self.new.value:.3f}, "
            f"difference {d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}], n = {d.n}: {word} ({self.why})"
        )


def candidates(report: Report, gate: Gate) -> list[str]:
    """Return the variants that may become champion: those that the gate names, else the static ones.

    A static variant is a checkpoint, which any server loads. What serves a dynamic one has to be made for it, so the
    recipe has to name it.
    """
    return gate.variants or [name for name in report.variants if name not in report.routes]


def best_variant(report: Report, gate: Gate) -> str:
    """Return the name of the candidate that scores best by the gate's metric; of equal ones the first.

    It is chosen by one half of the evaluation samples, so that the other half can show what it is worth: the largest of
    several scores is larger than it would be on other samples.

    Raises:
        InputError: no candidate has that metric.
    """
    task, _, metric = gate.metric.rpartition("/")
    scores = report.first_half or _scores(report, gate)
    values = {name: scores[name].value for name in candidates(report, gate) if name in scores}
    if not values:
        raise InputError(
            f"gate.metric: no variant that may become champion has {gate.metric}; expected {MEAN_NORMALISED} (where "
            f"every expert scores on its own task) or one of {', '.join(sorted(_keys(report))) or '(none)'}"
        )
    sign = -1 if task and KINDS[report.kinds[task]].lower_is_better(metric) else 1
    return max(values, key=lambda name: sign * values[name])


@dataclass(frozen=True)
class Best:
    """The variant that the gate chooses."""

    name: str
    held_out: Score | None = None
    """by the gate's metric, on the samples that it was not chosen by; None where there are none"""
    said: str | None = None
    """see `choice`"""


def best_of(report: Report, gate: Gate) -> Best | None:
    """Return `best_variant` and what it is worth, or None where no candidate has the gate's metric."""
    try:
        name = best_variant(report, gate)
    except InputError:
        return None
    return Best(name, report.second_half[name] if is_held_out(report, gate) else None, choice(report, gate))


def _scores(report: Report, gate: Gate) -> Mapping[str, Score]:
    """Return the gate's metric of every model on all samples."""
    task, _, metric = gate.metric.rpartition("/")
    if not task:
        return report.mean_normalised
    return {name: found[task][metric] for name, found in report.scores.items() if metric in found.get(task, {})}


def is_held_out(report: Report, gate: Gate) -> bool:
    """Return whether the best variant was chosen among several, by one half of the samples."""
    return len([name for name in candidates(report, gate) if name in report.second_half]) > 1


def worth(report: Report, gate: Gate, name: str) -> str:
    """Say what a variant scores by the gate's metric; where the best one was chosen by a half, on the other."""
    held_out = is_held_out(report, gate)
    score = report.second_half[name] if held_out else _scores(report, gate)[name]
    return f"{gate.metric} {score}{' on the held-out half' if held_out else ''}"


def choice(report: Report, gate: Gate) -> str | None:
    """Say in a line which variant was chosen, by which score, and what it scores where it was not chosen by it.

    It is the only one that anything calls the best. None where there was nothing to choose.
    """
    scores = _scores(report, gate)
    names = [name for name in candidates(report, gate) if name in scores]
    if len(names) < 2:
        return None
    best = best_variant(report, gate)
    static = "static " if report.routes and not gate.variants else ""
    said = f"best of {len(names)} {static}variants: {best}, chosen by {gate.metric}"
    if not is_held_out(report, gate):
        return f"{said} on all samples, {scores[best]}: too few to hold some out, so this is optimistic"
    first, second = report.first_half[best], report.second_half[best]
    said = f"{said} on half of the samples: {first}; on the held-out half: {second}"
    leader = max(names, key=lambda name: scores[name].value) if gate.metric == MEAN_NORMALISED else best
    if leader == best:
        return said
    return (
        f"{said}. This is the one that counts: the table goes by all samples, where {leader}, chosen and scored by the "
        "same ones, looks better than it is"
    )


def _keys(report: Report) -> set[str]:
    return {
        f"{task}/{metric}"
        for name in report.variants
        for task, found in report.scores.get(name, {}).items()
        for metric in found
    }


def judge(
    challenger: Mapping[str, Outcomes], champion: Mapping[str, Outcomes], tolerance: float, held_out: bool = False
) -> list[Verdict]:
    """Compare two models on every task that either was scored on, by the challenger's main metric.

    With `held_out` only the half of the samples counts that the challenger was not chosen by.

    A challenger passes a task if the worse end of the 95 % interval of its difference from the champion is no further
    on the bad side than `tolerance` · |champion's score|: it is shown not to be worse (non-inferiority), so few
    samples, which leave the interval wide, ask for a large tolerance. A task on which the two cannot be compared is
    not passed.
    """
    verdicts = []
    for task in dict.fromkeys((*challenger, *champion)):
        new, old = (_part(models.get(task), held_out) for models in (challenger, champion))
        metric = (new or champion[task]).metric
        before, after = _score(old, metric), _score(new, metric)
        if new is None or old is None or before is None or after is None or new.samples != old.samples:
            verdicts.append(Verdict(task, metric, before, after, None, False))
            continue
        compared = KINDS[new.kind].metric_of(metric, old.records)
        assert compared is not None, "both have the score"
        found = paired_difference(compared, new.records, old.records)
        sign, room = 1 if compared.higher_is_better else -1, tolerance * abs(before.value)
        worse = found.low if compared.higher_is_better else found.high
        why = (
            f"the interval's worse end, {worse:+.3f}, must not be {'below' if sign > 0 else 'above'} "
            f"{0 - sign * room:+.3f}: tolerance {tolerance:g} × {abs(before.value):.3f}"
        )
        verdicts.append(Verdict(task, metric, before, after, found, sign * worse >= -room, why))
    return verdicts


def _part(one: Outcomes | None, held_out: bool) -> Outcomes | None:
    if one is None or not held_out:
        return one
    return one.model_copy(update={"records": halves(one.records)[1]})


def _score(one: Outcomes | None, metric: str) -> Score | None:
    kind = None if one is None else KINDS.get(one.kind)  # that of a champion may be of a package that is gone
    return None if one is None or kind is None else kind.score_of(metric, one.records)


def passes(verdicts: Sequence[Verdict]) -> bool:
    """Return whether a challenger may become champion."""
    return all(verdict.passed for verdict in verdicts)


def comparison_table(names: Sequence[str], means: Sequence[Score | None], verdicts: Sequence[Verdict]) -> Table:
    """Return the scores of two models, A and B, and their difference: a row per task and one for the mean.

    Args:
        names: of both.
        means: `mean_normalised` of both, of which the difference is not known; None where there is none.
        verdicts: what `judge` says of B against A.
    """
    first, second = names
    table = Table(title=f"A: {first}\nB: {second}", title_justify="left", show_lines=True)
    table.add_column("task", overflow="fold")
    for column in ("A", "B", "B − A"):
        table.add_column(column, justify="right", overflow="fold")
    for one in verdicts:
        d = one.difference
        difference = "other samples" if d is None else f"{d.value:+.3f}\n[{d.low:+.3f}, {d.high:+.3f}]\nn = {d.n}"
        table.add_row(f"{one.task}\n{one.metric}", cell(one.old), cell(one.new), difference)
    if any(means):
        table.add_row("mean of score ÷\nown expert's", *map(cell, means), "–")
    return table
