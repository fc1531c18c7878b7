"""Kind lm_eval: what EleutherAI's lm-evaluation-harness scores. An extra, imported only where it is used.

It has rows of its own. A record is that of one document: `task`, its lm-eval name, and each metric of that task: one
number, or the two that its aggregation divides.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from sensmerge.tasks.artifacts import sha256_file
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.identity import Local
from sensmerge.tasks.kinds.kind import KINDS, Task
from sensmerge.tasks.kinds.scores import Columns, Metric, Record, Score, Values, mean, ratio, score, strata, value_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# How lm-eval aggregates where it is not the mean; per sample it gives ln p, or ln p and the number of words or bytes.
AGGREGATIONS: dict[str, Callable[[Columns], Values]] = {
    "perplexity": lambda columns: np.exp(-mean(columns)),
    "word_perplexity": lambda columns: np.exp(-ratio(columns)),
    "byte_perplexity": lambda columns: np.exp(-ratio(columns)),
    "bits_per_byte": lambda columns: -ratio(columns) / float(np.log(2)),
}
LOWER_IS_BETTER = {*AGGREGATIONS, "brier_score", "ter"}


@KINDS.register("lm_eval")
class LmEvalTask(Task):
    """Tasks of EleutherAI's lm-evaluation-harness (needs the extra `lm-eval`)."""

    kind: Literal["lm_eval"]
    names: list[str] = Field(min_length=1, description="task names as lm-eval lists them")
    limit: int | None = Field(None, ge=1, description="samples per lm-eval task; all if left out")
    num_fewshot: int | None = Field(
        None, ge=0, description="examples before each question; if left out, as many as each task says"
    )
    apply_chat_template: bool | str = Field(
        False,
        description="whether prompts are written in the chat template of merged models; or the name of one, where it "
        "has several",
    )
    fewshot_as_multiturn: bool = Field(
        True, description="whether examples are turns of the conversation (with apply_chat_template), or one text"
    )
    system_instruction: str | None = Field(None, description="text that every prompt begins with, as the system's turn")
    run_untrusted_code: Local[bool] = Field(
        False,
        description="whether tasks may run programs that models wrote (humaneval, mbpp). lm-eval runs them in no "
        "sandbox: kind code does",
    )
    metric: str = Field("acc", description="main metric; the named tasks must report it")

    @property
    def _files(self) -> list[str]:
        """Names that are files of tasks."""
        return [name for name in self.names if Path(name).is_file()]

    def check_installed(self, key: str) -> None:
        """Raise InputError if lm-eval is not installed or does not know a name; `key` (`tasks.science`) names it."""
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise InputError(f"{key}: kind lm_eval needs the extra: pip install 'sensmerge[lm-eval]'") from error
        manager = TaskManager(include_path=sorted({str(Path(one).absolute().parent) for one in self._files}))
        for name in self.names:
            if name not in self._files and not manager.match_tasks([name]):
                raise InputError(f"{key}.names: lm-eval has no task {name!r}; `lm-eval ls tasks` lists them")
            if not self.run_untrusted_code and (unsafe := _runs_code(name, manager.task_index)):
                raise InputError(
                    f"{key}.names: {unsafe} runs programs that models wrote, which nobody has read, and lm-eval has no "
                    "sandbox; use kind code, or set run_untrusted_code to true"
                )

    def depends_on(self) -> Mapping[str, Any]:
        """Return lm-eval's version, and the content of task files."""
        files = {name: sha256_file(Path(name)) for name in self._files}
        return {"lm_eval": version("lm_eval"), "files": files}

    def evaluate(self, network: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", key: str) -> list[Record]:
        """Run lm-eval's tasks on a loaded network and return one record per document, with the lm-eval task it is of.

        A group of lm-eval (`mmlu`) gives records of its members. A metric of another filter than lm-eval's `none` is
        named `METRIC.FILTER` (`exact_match.strict-match`). Metrics that cannot be computed from single documents to the
        same value as lm-eval's (F1, BLEU, …) are left out, for they would have no interval.

        `key` (`tasks.science`) names the task in messages. Raises InputError if lm-eval is not installed, does not know
        a name, or a task does not report the main metric.
        """
        self.check_installed(key)
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        with _code_allowed(self.run_untrusted_code):
            report = simple_evaluate(
                model=HFLM(pretrained=network, tokenizer=tokenizer, batch_size=self.batch_size),
                tasks=list(self.names),
                limit=self.limit,
                num_fewshot=self.num_fewshot,
                apply_chat_template=self.apply_chat_template,
                fewshot_as_multiturn=self.fewshot_as_multiturn,
                system_instruction=self.system_instruction,
                confirm_run_unsafe_code=self.run_untrusted_code,
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
            if self.metric not in usable:
                raise InputError(
                    f"{key}.metric is {self.metric!r}, {name} reports {', '.join(sorted(usable)) or 'none'}"
                )
            for document in documents:
                values = {metric: np.asarray(document[metric], float).tolist() for metric in sorted(usable)}
                records.append({"task": name, **values})
        return records

    @classmethod
    def metric_of(cls, name: str, records: Sequence[Record]) -> Metric | None:
        """See `Task`: a mean, but for the few that lm-eval aggregates in another way."""
        if not all(name in record for record in records):
            return None
        value = AGGREGATIONS.get(_plain(name), mean)
        is_proportion = value is mean and all(record[name] in (0, 1) for record in records)
        return Metric((name,), value, is_proportion, not cls.lower_is_better(name))

    @classmethod
    def lower_is_better(cls, name: str) -> bool:
        """See `Task`."""
        return _plain(name) in LOWER_IS_BETTER

    @classmethod
    def scores(cls, records: Sequence[Record]) -> dict[str, Score]:
        """Return `NAME/METRIC` for each lm-eval task, and `METRIC`, its mean over them, if all of them report it."""
        found = {}
        groups = strata(records)
        for name in sorted(set().union(*records) - {"task"}):
            metric = cls.metric_of(name, records)
            if metric is not None:
                found[name] = score(metric, records)
            for group in groups:
                metric = cls.metric_of(name, group)
                if metric is not None:
                    found[f"{group[0]['task']}/{name}"] = score(metric, group)
        return found

    @classmethod
    def score_of(cls, name: str, records: Sequence[Record]) -> Score | None:
        """See `Task`."""
        return cls.scores(records).get(name)


@contextmanager
def _code_allowed(allowed: bool) -> Iterator[None]:
    """Let the metric `code_eval` run programs within the block, if it is allowed: it asks the environment."""
    before = os.environ.get("HF_ALLOW_CODE_EVAL")
    if allowed:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    try:
        yield
    finally:
        if allowed and before is None:
            del os.environ["HF_ALLOW_CODE_EVAL"]
        elif allowed and before is not None:
            os.environ["HF_ALLOW_CODE_EVAL"] = before


def _runs_code(name: str, index: Mapping[str, Any]) -> str | None:
    """Return the task of an lm-eval task, group, tag or file that is marked as one that runs code; None if none is.

    Args:
        name: as a recipe has it.
        index: what lm-eval knows: name → entry with `cfg`, `yaml_path` and, of a tag, its members in `tags`.
    """
    if name not in index:
        path = str(Path(name).resolve())
        name = next((one for one, entry in index.items() if str(entry.yaml_path) == path), name)
    return _marked(name, index, frozenset())


def _marked(member: Any, index: Mapping[str, Any], seen: frozenset[str]) -> str | None:
    """Return the task of a member of a group that is marked; `seen` are the groups that it is in."""
    if isinstance(member, str):
        entry = None if member in seen else index.get(member)
        if entry is None:
            return None
        seen |= {member}
        config, members = entry.cfg or {}, sorted(entry.tags) if entry.cfg is None else []
    else:  # a task or a group that is written where it is named
        config, members = dict(member), []
    if config.get("unsafe_code"):
        return str(config.get("task", member))
    listed = config.get("task", [])
    members += listed if isinstance(listed, list) else [listed]
    found = (_marked(one, index, seen) for one in members)
    return next((one for one in found if one is not None), None)


def _plain(metric: str) -> str:
    """A metric's own name, without the lm-eval task before it and the lm-eval filter after it."""
    return metric.rpartition("/")[2].partition(".")[0]


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
        found = LmEvalTask.metric_of(metric, documents)
        return found is not None and math.isclose(value_of(found, documents), reported, rel_tol=1e-6, abs_tol=1e-9)
    except (TypeError, ValueError):  # outcomes of single documents that are no numbers
        return False
