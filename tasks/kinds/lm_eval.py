"""Scores that lm-eval computes: one record per document of its tasks. An extra, imported only where it is used."""

import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sensmerge.tasks.artifacts import sha256_file
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.datasets import LmEvalTask
from sensmerge.tasks.kinds.metrics import Record, lm_eval_value


def check_lm_eval(task: LmEvalTask, key: str) -> None:
    """Raise InputError if lm-eval is not installed or does not know a name; `key` (`tasks.science`) names the task."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(f"{key}: kind lm_eval needs the extra: pip install 'sensmerge[lm-eval]'") from error
    manager = TaskManager()
    for name in task.names:
        if not manager.match_tasks([name]) and not Path(name).is_file():
            raise InputError(f"{key}.names: lm-eval has no task {name!r}; `lm-eval ls tasks` lists them")


def lm_eval_settings(task: LmEvalTask) -> dict[str, Any]:
    """Return what lm-eval's scores depend on beside the task's settings: its version, and task files' content."""
    files = {name: sha256_file(Path(name)) for name in task.names if Path(name).is_file()}
    return {"lm_eval": version("lm_eval"), "files": files, "metric": task.metric}


def evaluate_lm_eval(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: LmEvalTask, key: str
) -> list[Record]:
    """Run lm-eval's tasks on a loaded network and return one record per document, with the lm-eval task it is of.

    A group of lm-eval (`mmlu`) gives records of its members. A metric of another filter than lm-eval's `none` is named
    `METRIC.FILTER` (`exact_match.strict-match`). Metrics that `tasks.kinds.metrics` cannot compute from single
    documents to the same value as lm-eval (F1, BLEU, …) are left out, for they would have no interval.

    `key` (`tasks.science`) names the task in messages. Raises InputError if lm-eval is not installed, does not know a
    name, or a task does not report the main metric.
    """
    check_lm_eval(task, key)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    report = simple_evaluate(
        model=HFLM(pretrained=network, tokenizer=tokenizer, batch_size=task.batch_size),
        tasks=list(task.names),
        limit=task.limit,
        bootstrap_iters=0,  # intervals are ours
    )
    records: list[Record] = []
    for name, samples in report["samples"].items():
        documents = _documents(name, samples)
        usable = {
            metric: value
            for metric, value in _reported(report["results"][name]).items()
            if metric in documents[0] and _agrees(metric, documents, value)
        }
        if task.metric not in usable:
            raise InputError(f"{key}.metric is {task.metric!r}, {name} reports {', '.join(sorted(usable)) or 'none'}")
        for document in documents:
            values = {metric: np.asarray(document[metric], float).tolist() for metric in sorted(usable)}
            records.append({"task": name, **values})
    return records


def _metric_name(metric: str, filter_name: str) -> str:
    return metric if filter_name == "none" else f"{metric}.{filter_name}"


def _documents(name: str, samples: list[dict[str, Any]]) -> list[Record]:
    """One record per document of an lm-eval task; its samples hold a document once per filter."""
    documents: dict[int, Record] = {}
    for sample in samples:
        document = documents.setdefault(sample["doc_id"], {"task": name})
        document |= {_metric_name(metric, sample["filter"]): sample[metric] for metric in sample["metrics"]}
    return list(documents.values())


def _reported(results: dict[str, Any]) -> dict[str, Any]:
    """What lm-eval reports of a task, whose keys are `metric,filter`."""
    keys = [tuple(key.split(",", 1)) for key in results if "," in key]
    return {_metric_name(*key): results[",".join(key)] for key in keys}


def _agrees(metric: str, documents: list[Record], reported: Any) -> bool:
    try:
        return math.isclose(lm_eval_value(metric, documents), reported, rel_tol=1e-6, abs_tol=1e-9)
    except (TypeError, ValueError):  # outcomes of single documents that are no numbers
        return False
