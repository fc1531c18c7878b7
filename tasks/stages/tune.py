"""Stage tune: settings of a variant, chosen by the tasks' own metrics on rows that nothing else is computed from.

Every candidate is scored as reports score models: each task's main metric ÷ that of the task's own expert on the same
rows, averaged over the tasks. Mean losses and divergences from the experts are not looked at: they follow how confident
answers are more than how many are right.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from sensmerge.tasks.artifacts import Artifact, read_json, write_json
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.identity import For, Local
from sensmerge.tasks.kinds.kind import RowSet
from sensmerge.tasks.kinds.scores import Metric, Record, Score, mean_normalised, normalised_difference
from sensmerge.tasks.methods.settings import Values, beyond, combinations
from sensmerge.tasks.stages.candidates import Candidates
from sensmerge.tasks.stages.evaluate import EvaluateJob
from sensmerge.tasks.stages.variant import TUNE, VariantJob

_Records = Mapping[str, list[Record]]
"""of one model, by task"""


@dataclass(frozen=True)
class TuningScoresJob(EvaluateJob):
    """Scores an expert on the rows that its task tunes variants on: what candidates are measured against."""

    stage = "tune"


@dataclass(frozen=True)
class Tried:
    """A candidate and its scores."""

    values: Values
    records: _Records
    """by task"""
    mean: Score
    """over tasks, each divided by its own expert's score"""
    tasks: Mapping[str, Score]
    """the same of each task alone"""


@dataclass(frozen=True, kw_only=True)
class TuneJob(VariantJob):
    """Chooses settings of a variant."""

    stage = "tune"
    version = 2

    shard_size: Local[int] = 0
    grid: Mapping[str, Sequence[float]]
    """values to try, ascending, by the key of the setting"""
    default: Values | None
    """values that stay unless others are better beyond chance; None where the best ones win, however narrowly"""
    tuning: Annotated[Mapping[str, RowSet], For("evaluation")]
    """the rows of every expert's task"""
    unanswered: Sequence[str]
    """tasks whose rows leave open what is right: there, what their own experts answer is"""
    metrics: Mapping[str, str]
    """main metric of each task"""
    depends: Mapping[str, Mapping[str, Any]]
    """what the scores of each depend on beside all this, see `Task.depends_on`"""
    own: Mapping[str, Artifact]
    """the scores of each task's own expert (`TuningScoresJob`)"""
    dtype: str
    """torch name of the networks' dtype"""
    device: Local[str]
    """torch device"""

    def parts(self) -> Sequence[int]:
        """Return none: candidates are tried one after the other, in one network."""
        return ()

    def finish(self, out: Path) -> dict[str, Any]:
        """Try all candidates, and more where the best one is at the end of the grid.

        Args:
            out: folder for `tune.json`: what was tried with its scores, what was chosen, and what there is to say of
                the grid. Scores of tasks are divided by their own expert's, as their mean is.

        Returns:
            `chosen`: the values; `tried`: how many candidates.

        Raises:
            InputError: an expert that gets nothing right on its rows; weights or logits that are not finite.
        """
        answers = {name: read_json(one.folder / "records.json") for name, one in self.own.items()}
        own = self._answered(answers, answers)
        metrics = {name: self._metric(name, records) for name, records in own.items()}
        asked = combinations(self.grid, self.default)
        with TemporaryDirectory(prefix="sensmerge-") as scratch:
            self.write_heads(Path(scratch))
            candidates = Candidates(self, self.tuning, self.dtype, self.device, Path(scratch))
            tried = scored(self._records(candidates, asked, answers), asked, metrics, own)
            first = best_of(tried)
            wider = self._beyond(first, tried)
            more = [dict(first.values) | {key: value} for key, values in wider.items() for value in values]
            tried += scored(self._records(candidates, more, answers), more, metrics, own)
        tried.sort(key=_place)
        best = best_of(tried)
        behind = [difference(best, one, metrics, own) for one in tried]
        chosen = choose(tried, first, self.default, metrics, own)
        report = {
            "chosen": chosen.values,
            "default": self.default,
            "best": best.values,
            "metrics": self.metrics,
            "notes": [_widened(key, first, values) for key, values in wider.items()]
            + [_at_end(key, best, values) for key, values in self._beyond(best, tried).items()],
            "tried": [
                {
                    "values": one.values,
                    "mean": asdict(one.mean),
                    "behind": asdict(distance),
                    "tasks": {name: asdict(score) for name, score in one.tasks.items()},
                }
                for one, distance in zip(tried, behind, strict=True)
            ],
        }
        write_json(out / TUNE, report)
        return {"chosen": chosen.values, "tried": len(tried)}

    def _records(
        self, candidates: Candidates, values: Sequence[Values], answers: _Records
    ) -> list[dict[str, list[Record]]]:
        return [self._answered(found, answers) for found in candidates.records(values)]

    def _answered(self, records: _Records, answers: _Records) -> dict[str, list[Record]]:
        """Return records as if the answers of each task's own expert were right, where rows leave that open."""
        return {
            name: [
                self.tuning[name].task.agreement(one, own) if name in self.unanswered else one
                for one, own in zip(found, answers[name], strict=True)
            ]
            for name, found in records.items()
        }

    def _metric(self, name: str, records: list[Record]) -> Metric:
        """Return the main metric of a task.

        Raises:
            InputError: by it, the task's own expert has no score that others could be divided by.
        """
        task = self.tuning[name].task
        metric, score = task.metric_of(self.metrics[name], records), task.score_of(self.metrics[name], records)
        assert metric is not None
        assert score is not None
        if score.value <= 0:
            raise InputError(
                f"tasks.{name}: its own expert has {self.metrics[name]} {score.value:g} on the {len(records)} rows to "
                "tune on, so candidates cannot be compared; give it more rows, or another metric"
            )
        return metric

    def _beyond(self, best: Tried, tried: Sequence[Tried]) -> dict[str, list[float]]:
        """Return further candidates for each setting of which the best value is the least or the largest tried."""
        found = {}
        for key in self.grid:
            values = sorted({value for one in tried if isinstance(value := one.values[key], int | float)})
            if best.values[key] in values:
                found[key] = beyond(self.settings, values, best.values[key], key)
        return {key: values for key, values in found.items() if values}


def scored(
    records: Sequence[Mapping[str, list[Record]]],
    candidates: Sequence[Values],
    metrics: Mapping[str, Metric],
    own: Mapping[str, list[Record]],
) -> list[Tried]:
    """Return candidates with their scores, from their records and those of the tasks' own experts."""

    def mean(by_task: Mapping[str, list[Record]], *names: str) -> Score:
        found = mean_normalised({name: metrics[name] for name in names}, by_task, own)
        assert found is not None, "every expert gets something right"
        return found

    return [
        Tried(values, by_task, mean(by_task, *metrics), {name: mean(by_task, name) for name in metrics})
        for values, by_task in zip(candidates, records, strict=True)
    ]


def best_of(tried: Sequence[Tried]) -> Tried:
    """Return the candidate with the best mean."""
    return max(tried, key=lambda one: one.mean.value)


def difference(best: Tried, other: Tried, metrics: Mapping[str, Metric], own: Mapping[str, list[Record]]) -> Score:
    """Return the mean of one candidate − that of another, with a paired interval."""
    found = normalised_difference(metrics, best.records, other.records, own)
    assert found is not None, "every expert gets something right"
    return found


def choose(
    tried: Sequence[Tried], first: Tried, default: Values | None, metrics: Mapping[str, Metric], own: _Records
) -> Tried:
    """Return the best candidate, as far as there is reason to leave what was asked for.

    One from beyond the grid must be better than the best one in it, beyond the interval of their difference, and any
    must be so to take the place of the default. Without a default, the best one of the grid wins however narrowly: of
    settings that nobody has chosen, none has more to be said for it. (With 32 rows of each of four tasks, staying with
    a default that is given at random cost as much on average as it saved, and with 16 it cost twice as much.)

    Args:
        tried: the candidates, the default among them.
        first: the best one of the grid.
        default: the values to stay with.
        metrics: of each task.
        own: records of each task's own expert.
    """
    best = best_of(tried)
    found = best if difference(best, first, metrics, own).low > 0 else first
    usual = next((one for one in tried if one.values == default), None)
    return found if usual is None or difference(found, usual, metrics, own).low > 0 else usual


def _place(one: Tried) -> list[float]:
    """Return what candidates are sorted by: their values; what is no number, as a density for each expert, is first."""
    return [value if isinstance(value, int | float) else -math.inf for value in one.values.values()]


def _widened(key: str, best: Tried, values: Sequence[float]) -> str:
    more = " and ".join(f"{value:g}" for value in values)
    return f"{key} {best.values[key]:g} was the best and at the end of the grid, so {more} came into it too"


def _at_end(key: str, best: Tried, values: Sequence[float]) -> str:
    more = ", ".join(f"{value:g}" for value in values)
    return f"{key} {best.values[key]:g} is the best and still at the end of the grid; add candidates beyond it: {more}"
