"""Scores of a dynamic model on the samples of all tasks together."""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sensmerge.tasks.artifacts import Artifact, write_json
from sensmerge.tasks.dynamic.model import DynamicModel, Routes
from sensmerge.tasks.identity import For, Local
from sensmerge.tasks.kinds.kind import RowSet
from sensmerge.tasks.kinds.sample import Sample
from sensmerge.tasks.kinds.scores import Record, mean_score
from sensmerge.tasks.networks.tokens import Inputs
from sensmerge.tasks.stages.answers import Item, items_of, records_of
from sensmerge.tasks.stages.job import Job


@dataclass(frozen=True)
class EvaluateDynamicJob(Job):
    """Scores a dynamic model on all tasks at once; it is never told a sample's task.

    Scores are those of stage evaluate, by task. Classifiers have two: in `accuracy` and its like the head of the
    sample's own task answers (the usual protocol), in `routed_accuracy` the head of the expert that the router chose,
    and a wrong head is a wrong answer.
    """

    stage = "evaluate"
    version = 4

    model: Artifact
    """the dynamic model"""
    evaluation: Annotated[Mapping[str, RowSet], For("evaluation")]
    """the evaluation set of every task that has one"""
    depends: Mapping[str, Mapping[str, Any]]
    """what the scores of each depend on beside all this, see `Task.depends_on`"""
    device: Local[str]
    """torch device"""

    def finish(self, out: Path) -> dict[str, Any]:
        """Write scores and routes.

        Args:
            out: folder for `records.json` and `scores.json`, both by task, and `routes.json`: which expert was taken
                for which, how often it was the right one, the right one's mean coefficient, forward passes and
                milliseconds per sample.

        Returns:
            What `routes.json` says.

        Raises:
            InputError: logits that are not finite.
        """
        model = DynamicModel.load(self.model.folder, self.device)
        items = [item for name, one in self.evaluation.items() for item in _items(name, one, model.tokenizer)]
        random.Random(0).shuffle(items)  # nothing may depend on which samples stand together
        begin = time.perf_counter()
        size = min(one.task.batch_size for one in self.evaluation.values())
        routes = model.route([item.prompt for item in items], size)
        found = _records(model, items, routes, size)
        seconds = time.perf_counter() - begin
        records: dict[str, dict[int, Record]] = {name: {} for name in self.evaluation}
        taken: dict[str, list[int]] = {name: [] for name in self.evaluation}
        right: list[float] = []
        chosen = zip(items, found, routes.experts, routes.coefficients.tolist(), strict=True)
        for item, record, expert, coefficients in chosen:
            records[item.name][item.number] = record
            taken[item.name].append(expert)
            right.append(coefficients[model.experts.index(item.name)])
        ordered = {name: [by_row[i] for i in range(len(by_row))] for name, by_row in records.items()}
        write_json(out / "records.json", ordered)
        write_json(out / "scores.json", {name: self._scores(name, one) for name, one in ordered.items()})
        report = {
            **_identified(model.experts, taken),
            "right_coefficient": asdict(mean_score(right)),
            "passes": model.passes + 1,
            "milliseconds": 1000 * seconds / len(items),
        }
        write_json(out / "routes.json", report)
        return report

    def _scores(self, name: str, records: list[Record]) -> dict[str, Any]:
        return {metric: asdict(score) for metric, score in self.evaluation[name].task.scores(records).items()}


def _identified(experts: Sequence[str], taken: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return which expert was taken for which, by task, and how often it was the right one."""
    hits = [float(experts[expert] == name) for name, found in taken.items() for expert in found]
    return {
        "confusion": {
            name: {expert: found.count(i) for i, expert in enumerate(experts)} for name, found in taken.items()
        },
        "identification": asdict(mean_score(hits, is_proportion=True)),
    }


def _items(name: str, one: RowSet, tokenizer: PreTrainedTokenizerBase) -> list[Item]:
    items = items_of(name, one.task, one.rows.read(), tokenizer, f"tasks.{name}.evaluation", one.label2id)
    assert all(item.samples[0].has_prompt for item in items), "the plan refuses empty prompts"
    return items


def _records(model: DynamicModel, items: Sequence[Item], routes: Routes, size: int) -> list[Record]:
    """Return the record of each item."""
    routed = _RoutedModel(model, routes, [item.name for item in items], size)
    records = records_of(routed, items)
    for place, logits in routed.chosen.items():
        item = items[place]
        # With a single head, which is merged, there is none to be chosen wrongly.
        own_head = routed.heads[place] == item.name or not model.heads
        record = records[place]
        if own_head:
            record = item.task.record(item.row, [item.task.judge(item.samples[0], logits)])
        right = item.task.is_right(record)
        if right is not None:
            records[place]["routed"] = int(own_head and right)
    return records


class _RoutedModel:
    """A dynamic model that answers items whose routes are known."""

    def __init__(self, model: DynamicModel, routes: Routes, names: Sequence[str], size: int) -> None:
        """Take the routes of some items, the names of their tasks, and how many of full length make a batch."""
        self._model = model
        self._routes = routes
        self._names = names
        self._size = size
        self.heads = [model.experts[expert] for expert in routes.experts]
        """the expert of each item whose head the router chose"""
        self.chosen: dict[int, Tensor] = {}
        """logits of these heads, where experts have heads of their own; `logits` gives those of the tasks' heads"""

    def logits(self, samples: Sequence[Sample], owners: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """See `Model`."""
        model, inputs = self._model, [sample.inputs for sample in samples]
        if model.classifies:
            given, chosen = model.class_logits(inputs, self._routes, self._names, self.heads, size=self._size)
            self.chosen = dict(enumerate(chosen))
            yield from enumerate(given)
        else:
            yield from model.each_logits(inputs, self._of(owners), self._size)

    def generate(self, prompts: Sequence[Inputs], owners: Sequence[int], max_new_tokens: int) -> list[str]:
        """See `Model`."""
        found = self._model.generate(prompts, self._of(owners), max_new_tokens, self._size)
        return [self._model.tokenizer.decode(one, skip_special_tokens=True) for one in found]

    def _of(self, places: Sequence[int]) -> Routes:
        rows = list(places)
        return Routes(self._routes.coefficients[rows], [self._routes.experts[row] for row in rows])
