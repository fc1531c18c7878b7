"""Kind code: the model writes a program, which is judged by running tests on it.

The loss is that of a reference solution, as of kind completion. A record is its `likelihood` and, if the rows are
scored, whether the generated program `passed` (0 or 1), the `outcome` in words, and the `answer`.
"""

import ast
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from sensmerge.tasks.errors import InputError, shown
from sensmerge.tasks.identity import Local, Only
from sensmerge.tasks.kinds.checks import NamedField, check_fields, is_unicode
from sensmerge.tasks.kinds.completion import CompletionTask
from sensmerge.tasks.kinds.kind import KINDS, Labels, RowTask
from sensmerge.tasks.kinds.sample import Sample
from sensmerge.tasks.kinds.scores import Metric, Record, mean
from sensmerge.tasks.kinds.templates import render
from sensmerge.tasks.networks.tokens import Inputs
from sensmerge.tasks.rows.source import Row
from sensmerge.tasks.sandbox.programs import RULES
from sensmerge.tasks.sandbox.sandbox import (
    PASSED,
    GeneratedProgram,
    Limits,
    NoSandboxError,
    ProgramTests,
    missing_isolation,
    run_tests,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@KINDS.register("code")
class CodeTask(RowTask):
    """The model writes a program, and is scored by running tests on it.

    Rows have their tests in one text that defines `check` (`test` and `entry_point`, as HumanEval's), or in a list of
    statements (`test_list`, as MBPP's).
    """

    templates: ClassVar[tuple[str, ...]] = ("prompt", "completion", "context")
    asks: ClassVar[tuple[str, ...]] = ("prompt", "max_length")
    metrics: ClassVar[Mapping[str, Metric]] = {
        "pass_at_1": Metric(("passed",), mean, is_proportion=True),
        **{name: CompletionTask.metrics[name] for name in ("token_accuracy", "perplexity")},
    }

    kind: Literal["code"]
    run_untrusted_code: Local[bool] = Field(
        False,
        description="whether programs that models wrote may be run on your machines; else none are",
    )
    isolation: Local[Literal["required", "if_possible"]] = Field(
        "required",
        description="what to do where a machine cannot keep a program from network, files and other processes. "
        "required: refuse; if_possible: run it with limits alone",
    )
    prompt: str = Field("{prompt}", description="template of the prompt; {field} is a field of the row")
    completion: str = Field("{completion}", description="template of the reference solution, of which losses are taken")
    context: Annotated[str, Only("evaluation")] = Field(
        "",
        description="template of the code that an answer continues or repeats ({prompt} for HumanEval); empty: an "
        "answer stands for itself",
    )
    test: Annotated[str | None, Only("evaluation")] = Field(
        None, description="field with tests that define check(candidate)"
    )
    entry_point: Annotated[str | None, Only("evaluation")] = Field(
        None, description="field with the name of the function that check is called with"
    )
    test_list: Annotated[str | None, Only("evaluation")] = Field(
        None, description="field with a list of tests, each of them Python statements"
    )
    test_setup: Annotated[str | None, Only("evaluation")] = Field(
        None, description="field with code that runs before the tests (test_setup_code of MBPP)"
    )
    generate: Annotated[int, Only("evaluation")] = Field(
        512, ge=1, description="how many tokens to generate greedily, at most"
    )
    timeout: Annotated[int, Only("evaluation")] = Field(
        10, ge=1, le=3600, description="seconds of CPU time that a program has, and three times as many of the clock"
    )
    memory: Annotated[int, Only("evaluation")] = Field(1024, ge=64, description="MiB of memory that a program has")
    end_token: bool = Field(True, description="append the tokenizer's end token to the reference solution")
    loss_on: Annotated[Literal["completion", "all"], Only("calibration")] = Field(
        "completion", description="tokens that count in calibration losses"
    )
    metric: Local[Literal["pass_at_1", "token_accuracy", "perplexity"]] = Field("pass_at_1", description="main metric")

    @property
    def answer_tokens(self) -> int:
        """See `Task`."""
        return self.generate

    def for_tuning(self) -> Self:
        """See `RowTask`: by token accuracy, which runs no program, unless rows to tune on are to be passed."""
        changed = {"metric": "token_accuracy", "generate": 0}
        return self if self.has_tuning and self.metric == "pass_at_1" else self.model_copy(update=changed)

    def depends_on(self) -> Mapping[str, Any]:
        """See `Task`: the version of Python that runs the programs, and of the rules by which they are found."""
        return {"python": list(sys.version_info[:2]), "rules": RULES}

    @property
    def _runs(self) -> bool:
        """Whether programs are run at all."""
        return self.is_scored or (self.has_tuning and self.metric == "pass_at_1")

    def check_installed(self, key: str) -> None:
        """Raise InputError if programs are to be run and may not be, or this machine cannot isolate them."""
        if not self._runs:
            return
        if not self.run_untrusted_code:
            raise InputError(
                f"{key}.run_untrusted_code is false, and kind code runs programs that models wrote, which nobody has "
                "read; set it to true to run them in a sandbox, or leave out the evaluation rows"
            )
        missing = missing_isolation()
        if missing and self.isolation == "required":
            raise InputError(_refusal(f"{key}.isolation", missing))
        if missing and (limits := missing_isolation(False)):
            raise InputError(f"{key}: programs cannot even run with limits alone: {limits}; use another user")

    def notes(self, key: str, tokenizer: "PreTrainedTokenizerBase", expert: Path) -> list[str]:
        """See `Task`: how this machine isolates programs."""
        if not self._runs:
            return []
        missing = missing_isolation()
        if missing:
            return [
                f"{key}: programs run with limits of time and memory alone, as a user with network and files: "
                f"this machine isolates none ({missing})"
            ]
        return [f"{key}: programs run without network, files and other processes (namespaces), within limits"]

    def check_rows(
        self, rows: Sequence[Row], key: str, labels: Labels | None = None, places: Sequence[str] | None = None
    ) -> None:
        """See `RowTask`; rows that are scored have tests, which have to be Python."""
        super().check_rows(rows, key, labels, places)
        settings, _, split = key.rpartition(".")
        if split == "calibration":
            return
        fields = self._test_fields(settings)
        for number, row in enumerate(rows):
            where = places[number] if places else f"row {number} of {key}"
            check_fields(fields, row, settings, where)
            self._check_tests(row, settings, where)

    def _test_fields(self, settings: str) -> list[NamedField]:
        """Return the fields that the task names for its tests; these are named in one of two ways."""
        if (self.test is None) == (self.test_list is None):
            found = "neither" if self.test is None else "both"
            raise InputError(f"{settings}: found {found} of test and test_list, expected one of them")
        if (self.test is None) != (self.entry_point is None):
            raise InputError(f"{settings}: test and entry_point go together; set both, or use test_list")
        settings_of = ("test", "entry_point", "test_list", "test_setup")
        given = [(getattr(self, name), name) for name in settings_of]
        return [NamedField(one, name, name != "test_list") for one, name in given if one is not None]

    def _check_tests(self, row: Row, settings: str, where: str) -> None:
        """Check that a row's tests can be run."""
        if self.test_list is not None:
            tests = row[self.test_list]
            if not (isinstance(tests, list) and tests and all(isinstance(one, str) for one in tests)):
                raise InputError(
                    f"{settings}.test_list names field {self.test_list!r}, which is {shown(tests)} in {where}; "
                    "expected a list of texts"
                )
        key = f"{settings}.{'test_list' if self.test is None else 'test'}"
        tests = self._tests(row)
        for text in tests.texts:
            _check_python(text, key, where)
        if tests.entry_point is not None and not _defines_check(tests.texts[-1]):
            raise InputError(f"{key}: the tests define no function check in {where}")

    def sample(
        self, row: Row, tokenizer: "PreTrainedTokenizerBase", where: str, labels: Labels | None = None
    ) -> Sample:
        """See `RowTask`: prompt and reference solution, as those of kind completion."""
        return self._reference.sample(row, tokenizer, where, labels)

    def calibration_sample(
        self, row: Row, tokenizer: "PreTrainedTokenizerBase", where: str, labels: Labels | None = None
    ) -> Sample:
        """See `RowTask`: as that of kind completion."""
        return self._reference.calibration_sample(row, tokenizer, where, labels)

    def question(self, row: Row, tokenizer: "PreTrainedTokenizerBase", where: str) -> Inputs:
        """See `RowTask`: as that of kind completion."""
        return self._reference.question(row, tokenizer, where)

    def judge(self, sample: Sample, logits: "Tensor") -> Any:
        """See `RowTask`: the likelihood of the reference solution."""
        return self._reference.judge(sample, logits)

    def answer_record(self, row: Row, text: str) -> Record:
        """Return whether the program in a text passes the row's tests, what became of it, and the text.

        Raises:
            InputError: the recipe does not allow that it is run, or not without the isolation that this machine lacks.
        """
        if not self.run_untrusted_code:
            raise InputError("run_untrusted_code is false, and a program is to be run; set it to true")
        entry_point = None if self.entry_point is None else str(row[self.entry_point])
        program = GeneratedProgram(render(self.context, row), text, entry_point)
        isolate = self.isolation == "required" or missing_isolation() is None
        try:
            outcome = run_tests(program, self._tests(row), Limits(self.timeout, self.memory), isolate)
        except NoSandboxError as error:
            if isolate:
                raise InputError(_refusal("isolation", str(error))) from None
            raise InputError(f"isolation: no sandbox there, not even with limits alone: {error}") from None
        return {"passed": int(outcome == PASSED), "outcome": outcome, "answer": text}

    def table_row(self, row: Row, record: Record, labels: Labels | None = None) -> Mapping[str, Any]:
        """See `RowTask`."""
        texts = {"prompt": render(self.prompt, row), "expected": render(self.completion, row)}
        return {**texts, "answer": record["answer"], "right": bool(record["passed"]), "outcome": record["outcome"]}

    @property
    def _reference(self) -> CompletionTask:
        """The task of writing the reference solution."""
        shared = {name: getattr(self, name) for name in ("prompt", "completion", "end_token", "loss_on", "max_length")}
        return CompletionTask(kind="completion", **shared)

    def _tests(self, row: Row) -> ProgramTests:
        setup = [] if self.test_setup is None else [str(row[self.test_setup])]
        if self.test is not None and self.entry_point is not None:
            return ProgramTests((*setup, str(row[self.test])), str(row[self.entry_point]))
        return ProgramTests((*setup, *row[str(self.test_list)]))


def _refusal(key: str, missing: str) -> str:
    return (
        f"{key} is required, and the machine cannot keep programs from network, files and other processes ({missing}); "
        "allow user namespaces there, or set isolation: if_possible to run them with limits alone"
    )


def _check_python(text: str, key: str, where: str) -> None:
    if not is_unicode(text):
        raise InputError(f"{key}: half a surrogate pair in {where}; repair the text, or leave the row out")
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"{key}: {shown(text)} is no Python in {where}: {error}") from None


def _defines_check(text: str) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in ast.parse(text).body)
