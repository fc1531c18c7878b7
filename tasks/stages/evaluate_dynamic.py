"""Scores of a dynamic model: the samples of all tasks, shuffled into mixed batches."""

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sensmerge.tasks.artifacts import write_json
from sensmerge.tasks.dynamic.model import DynamicModel, Routes
from sensmerge.tasks.kinds.datasets import CompletionTask, MultipleChoiceTask, RowSet, Sample, encode, encode_choices
from sensmerge.tasks.kinds.metrics import Record, mean_score, score_records
from sensmerge.tasks.networks.networks import finite
from sensmerge.tasks.stages.evaluate import choose, is_exact, likelihood

VERSION = 2


@dataclass(frozen=True)
class _Item:
    """One row: what the model reads, and what only the scoring knows."""

    prompt: list[int]
    """what it is routed by"""
    samples: list[Sample]
    """one, or one per choice"""
    task: str
    row: int


def evaluate_dynamic(model: Path, evaluation: Mapping[str, RowSet], device: str, out: Path) -> dict[str, Any]:
    """Score a dynamic model on all tasks at once; it is never told a sample's task.

    Scores are those of stage evaluate, by task. Classification has two: in `accuracy` and its like the head of the
    sample's own task answers (the usual protocol), in `routed_accuracy` the head of the expert that the router chose,
    and a wrong head is a wrong answer.

    Args:
        model: folder of the dynamic model.
        evaluation: the evaluation set of every task that has one.
        device: torch device.
        out: folder for `records.json` and `scores.json`, both by task, and `routes.json`: which expert was taken for
            which, how often it was the right one, the right one's mean coefficient, forward passes and milliseconds
            per sample.

    Returns:
        What `routes.json` says.

    Raises:
        InputError: logits that are not finite.
    """
    loaded = DynamicModel.load(model, device)
    items = [item for name, one in evaluation.items() for item in _items(name, one, loaded)]
    batch_size = min(one.task.batch_size for one in evaluation.values())
    random.Random(0).shuffle(items)
    records: dict[str, dict[int, Record]] = {name: {} for name in evaluation}
    taken: dict[str, list[int]] = {name: [] for name in evaluation}
    right: list[float] = []
    seconds = 0.0
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        begin = time.perf_counter()
        routes = loaded.route([item.prompt for item in batch])
        found = _answers(loaded, batch, routes, evaluation)
        seconds += time.perf_counter() - begin
        for item, record, expert, row in zip(batch, found, routes.experts, routes.coefficients.tolist(), strict=True):
            records[item.task][item.row] = record
            taken[item.task].append(expert)
            right.append(row[loaded.experts.index(item.task)])
    ordered = {name: [by_row[i] for i in range(len(by_row))] for name, by_row in records.items()}
    scores = {
        name: {metric: asdict(score) for metric, score in score_records(evaluation[name].task.kind, one).items()}
        for name, one in ordered.items()
    }
    hits = [float(loaded.experts[expert] == name) for name, experts in taken.items() for expert in experts]
    report = {
        "confusion": {
            name: {expert: taken[name].count(i) for i, expert in enumerate(loaded.experts)} for name in evaluation
        },
        "identification": asdict(mean_score(hits, is_proportion=True)),
        "right_coefficient": asdict(mean_score(right)),
        "passes": loaded.passes + 1,
        "milliseconds": 1000 * seconds / len(items),
    }
    write_json(out / "records.json", ordered)
    write_json(out / "scores.json", scores)
    write_json(out / "routes.json", report)
    return report


def _items(name: str, one: RowSet, model: DynamicModel) -> list[_Item]:
    items = []
    for number, row in enumerate(one.rows):
        where = f"row {number} of tasks.{name}.evaluation"
        if isinstance(one.task, MultipleChoiceTask):
            samples = encode_choices(one.task, row, model.tokenizer, where)
        else:
            samples = [encode(one.task, row, model.tokenizer, where, one.label2id)]
        prompt = samples[0].input_ids[: samples[0].prompt_tokens]
        assert prompt, f"{where}: the plan refuses empty prompts"
        items.append(_Item(prompt, samples, name, number))
    return items


def _answers(
    model: DynamicModel, batch: Sequence[_Item], routes: Routes, evaluation: Mapping[str, RowSet]
) -> list[Record]:
    """Return the record of each item of a batch."""
    samples = [sample for item in batch for sample in item.samples]
    if model.classifies:
        given, routed = [item.task for item in batch], [model.experts[expert] for expert in routes.experts]
        found = model.class_logits([sample.input_ids for sample in samples], routes, given, routed)
        # With a single head, which is merged, there is none to be chosen wrongly.
        return [
            _class_record(item, own, other, head == item.task or not model.heads)
            for item, head, own, other in zip(batch, routed, *found, strict=True)
        ]
    owner = [i for i, item in enumerate(batch) for _ in item.samples]
    likely: list[Record] = []
    for start in range(0, len(samples), len(batch)):  # choices are more samples than the batch has rows
        chosen = slice(start, start + len(batch))
        logits = model.logits([sample.input_ids for sample in samples[chosen]], _of(routes, owner[chosen]))
        likely += [likelihood(sample, one) for sample, one in zip(samples[chosen], logits, strict=True)]
    parts = iter(likely)
    records: list[Record] = []
    for item in batch:
        likelihoods = [next(parts) for _ in item.samples]
        one = evaluation[item.task]
        if isinstance(one.task, MultipleChoiceTask):
            records += choose(one.task, [one.rows[item.row]], likelihoods)
        else:
            records += likelihoods
    _add_exact(model, batch, routes, evaluation, records)
    return records


def _class_record(item: _Item, given: Tensor, routed: Tensor, own_head: bool) -> Record:
    label, prediction = item.samples[0].label, int(finite(given).argmax())
    return {"prediction": prediction, "label": label, "routed": int(own_head and int(finite(routed).argmax()) == label)}


def _add_exact(
    model: DynamicModel,
    batch: Sequence[_Item],
    routes: Routes,
    evaluation: Mapping[str, RowSet],
    records: list[Record],
) -> None:
    """Generate for the items whose task asks for it, and add `exact` to their records."""
    wanted: dict[int, list[int]] = {}
    for i, item in enumerate(batch):
        task = evaluation[item.task].task
        if isinstance(task, CompletionTask) and task.generate:
            wanted.setdefault(task.generate, []).append(i)
    for length, rows in wanted.items():
        generated = model.generate([batch[i].prompt for i in rows], _of(routes, rows), length)
        for i, ids in zip(rows, generated, strict=True):
            one = evaluation[batch[i].task]
            assert isinstance(one.task, CompletionTask)
            text = model.tokenizer.decode(ids, skip_special_tokens=True)
            records[i]["exact"] = int(is_exact(one.task, text, one.rows[batch[i].row]))


def _of(routes: Routes, rows: list[int]) -> Routes:
    return Routes(routes.coefficients[rows], [routes.experts[i] for i in rows])
