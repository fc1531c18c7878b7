"""Stage tune: settings of a variant, chosen by the tasks' own metrics on rows that nothing else is computed from.

Every candidate is scored as reports score models: each task's main metric ÷ that of the task's own expert on the same
rows, averaged over the tasks. Mean losses and divergences from the experts are not looked at: they punish confident
answers, right ones too, and prefer weights that are far too small.
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
from sensmerge.tasks.stages.candidates import Trial
from sensmerge.tasks.stages.evaluate import EvaluateJob
from sensmerge.tasks.stages.variant import TUNE, VariantJob


@dataclass(frozen=True)
class TuningScoresJob(EvaluateJob):
    """Scores an expert on the rows that its task tunes variants on: what candidates are measured against."""

    stage = "tune"


@dataclass(frozen=True)
class Tried:
    """A candidate and its scores."""

    values: Values
    records: Mapping[str, list[Record]]
    """by task"""
    mean: Score
    """over tasks, each divided by its own expert's score"""


@dataclass(frozen=True, kw_only=True)
class TuneJob(VariantJob):
    """Chooses settings of a variant. What its fields say of them is the default, which stands unless one is better."""

    stage = "tune"
    version = 1

    shard_size: Local[int] = 0
    grid: Mapping[str, Sequence[float]]
    """values to try, ascending, by the key of the setting"""
    tuning: Annotated[Mapping[str, RowSet], For("evaluation")]
    """the rows of every expert's task"""
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
            out: folder for `tune.json`: what was tried with its scores, what was chosen and why. Scores of tasks are
                divided by their own expert's, as their mean is.

        Returns:
            `chosen` and `default`: the values of both; `tried`: how many candidates.

        Raises:
            InputError: an expert that gets nothing right on its rows; weights or logits that are not finite.
        """
        own = {name: read_json(one.folder / "records.json") for name, one in self.own.items()}
        metrics = {name: self._metric(name, records) for name, records in own.items()}
        settings = self.settings
        default = {key: settings.value(key) for key in self.grid}
        asked = combinations(self.grid)
        asked += [] if default in asked else [default]
        with TemporaryDirectory(prefix="sensmerge-") as scratch:
            self.write_heads(Path(scratch))
            trial = Trial(self, self.tuning, self.dtype, self.device, Path(scratch))
            tried = scored(trial.records(asked), asked, metrics, own)
            best = max(tried, key=lambda one: one.mean.value)
            wider = self._beyond(best.values, tried)
            more = [dict(best.values) | {key: value} for key, values in wider.items() for value in values]
            tried = sorted((*tried, *scored(trial.records(more), more, metrics, own)), key=_place)
        choice = choose(tried, default, metrics, own)
        notes = [_widened(key, best.values[key], values) for key, values in wider.items() if values]
        edges = {key: values for key, values in self._beyond(choice.best.values, tried).items() if values}
        notes += [
            f"{key} {choice.best.values[key]:g} is the best tried and still at the end of the grid; try others beyond "
            f"it, such as {', '.join(f'{value:g}' for value in values)}"
            for key, values in edges.items()
        ]
        report = {
            "chosen": choice.chosen.values,
            "default": default,
            "best": choice.best.values,
            "gain": asdict(choice.gain),
            "metrics": self.metrics,
            "notes": notes,
            "tried": [
                {"values": one.values, "mean": asdict(one.mean), "tasks": _by_task(one, metrics, own)} for one in tried
            ],
        }
        write_json(out / TUNE, report)
        return {"chosen": choice.chosen.values, "default": default, "tried": len(tried)}

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

    def _beyond(self, best: Values, tried: Sequence[Tried]) -> dict[str, list[float]]:
        """Return further candidates for each setting of which the best value is the least or the largest tried."""
        found = {}
        for key in self.grid:
            others = {one.values[key] for one in tried if isinstance(one.values[key], int | float)}
            values = sorted(others)
            found[key] = beyond(self.settings, values, best[key], key) if best[key] in others else []
        return found


@dataclass(frozen=True)
class Choice:
    """The outcome."""

    best: Tried
    chosen: Tried
    gain: Score
    """the best one's mean − the default's, with a paired interval"""


def scored(
    records: Sequence[Mapping[str, list[Record]]],
    candidates: Sequence[Values],
    metrics: Mapping[str, Metric],
    own: Mapping[str, list[Record]],
) -> list[Tried]:
    """Return candidates with their means over tasks, from their records and those of the tasks' own experts."""
    found = []
    for values, by_task in zip(candidates, records, strict=True):
        mean = mean_normalised(metrics, by_task, own)
        assert mean is not None, "every expert gets something right"
        found.append(Tried(values, by_task, mean))
    return found


def choose(
    tried: Sequence[Tried], default: Values, metrics: Mapping[str, Metric], own: Mapping[str, list[Record]]
) -> Choice:
    """Choose the best candidate if it is better than the default beyond the interval of their difference.

    Args:
        tried: the candidates, the default among them.
        default: its values.
        metrics: of each task.
        own: records of each task's own expert.
    """
    best = max(tried, key=lambda one: one.mean.value)
    usual = next(one for one in tried if one.values == default)
    gain = normalised_difference(metrics, best.records, usual.records, own)
    assert gain is not None, "every expert gets something right"
    return Choice(best, best if gain.low > 0 else usual, gain)


def _place(one: Tried) -> list[float]:
    """Return what candidates are sorted by: their values; what is no number, as a density for each expert, is first."""
    return [value if isinstance(value, int | float) else -math.inf for value in one.values.values()]


def _by_task(one: Tried, metrics: Mapping[str, Metric], own: Mapping[str, list[Record]]) -> dict[str, Any]:
    """Return a candidate's score on each task, divided by that of the task's own expert."""
    found = {}
    for name, metric in metrics.items():
        score = mean_normalised({name: metric}, one.records, own)
        assert score is not None
        found[name] = asdict(score)
    return found


def _widened(key: str, best: float, values: Sequence[float]) -> str:
    more = " and ".join(f"{value:g}" for value in values)
    return f"{key} {best:g} was the best tried and at the end of the grid, so {more} came into it too"
