"""Programs that models write: which of an answer is run, what rows have to say, and what is scored."""

import math
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.identity import identity
from sensmerge.tasks.kinds.code import CodeTask
from sensmerge.tasks.kinds.completion import CompletionTask
from sensmerge.tasks.sandbox.programs import program_of
from sensmerge.tasks.sandbox.sandbox import missing_isolation
from sensmerge.tasks.stages.evaluate import evaluate_network

KEY = "tasks.code.evaluation"
isolated = pytest.mark.skipif(missing_isolation() is not None, reason="the machine isolates no processes")
MBPP = {"prompt": "add", "completion": "def f(x): return x + 1", "tests": ["assert f(1) == 2"], "setup": ""}
HUMAN = {
    "prompt": 'def f(x):\n    """Add one."""\n',
    "completion": "    return x + 1\n",
    "test": "def check(candidate):\n    assert candidate(1) == 2\n",
    "name": "f",
}


def code_task(**settings: Any) -> CodeTask:
    return CodeTask(kind="code", **{"run_untrusted_code": True, **settings})


def mbpp_task(**settings: Any) -> CodeTask:
    return code_task(test_list="tests", test_setup="setup", **settings)


def human_task(**settings: Any) -> CodeTask:
    return code_task(test="test", entry_point="name", context="{prompt}", **settings)


# Programs in answers

STUB = "from math import *\ndef f(x):\n    'Double.'\n"


@pytest.mark.parametrize(
    ("context", "answer", "expected"),
    [
        (STUB, "    return 2 * x\n", STUB + "    return 2 * x\n"),
        (STUB, "    return 2 * x\n\nSo it doubles.", STUB + "    return 2 * x\n\n"),
        (STUB, "    return 2 * x\n```\nThis doubles.\n", STUB + "    return 2 * x\n"),
        (STUB, "Sure:\n```python\ndef f(x):\n    return 2\n```\nDone.", f"{STUB}\ndef f(x):\n    return 2\n"),
        (STUB, "```\n    return 2 * x\n```", STUB + "    return 2 * x\n"),
        (STUB, "```py\nprint(1)\n```\nand\n```py\ndef f(x): return 2\n```", f"{STUB}\ndef f(x): return 2\n"),
        (STUB, "", STUB),
        ("def f(x):", "\n```python\ndef f(x): return 2\n```", "def f(x): return 2\n"),
        ("", "\ndef f(x): return 2\nThat is it.", "def f(x): return 2\n"),
        ("", "Here:\n```python\nimport re\n\ndef f(x):\n    return 2", "\nimport re\n\ndef f(x):\n    return 2"),
        ("", "I cannot do that.", ""),
        ("", "```python\ndef f(x) return\n```", "def f(x) return\n"),
        (
            "",
            "<think>```py\ndef f(x): return 1\n```\n</think>\n```py\ndef f(x): return 2\n```",
            "\ndef f(x): return 2\n",
        ),
        (STUB, "<think>Twice.</think>    return 2 * x\n", STUB + "    return 2 * x\n"),
    ],
)
def test_the_program_in_an_answer(context: str, answer: str, expected: str) -> None:
    assert program_of(context, answer, "f") == expected


# Rows


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        (code_task(), MBPP, "tasks.code: found neither of test and test_list, expected one of them"),
        (code_task(test="test", test_list="tests"), MBPP, "tasks.code: found both of test and test_list"),
        (code_task(test="test"), HUMAN, "tasks.code: test and entry_point go together"),
        (mbpp_task(), HUMAN, "tasks.code.test_list names field 'tests', row 0 of tasks.code.evaluation has 'prompt'"),
        (mbpp_task(), MBPP | {"tests": "assert f(1)"}, "tests', which is 'assert .* expected a list of texts"),
        (mbpp_task(), MBPP | {"tests": []}, "'tests', which is .. in row 0 .* expected a list of texts"),
        (mbpp_task(), MBPP | {"tests": ["assert f(1"]}, "tasks.code.test_list: 'assert f.1' is no Python in row 0 of"),
        (mbpp_task(), MBPP | {"setup": None}, "tasks.code.test_setup names field 'setup', which is null in row 0"),
        (human_task(), HUMAN | {"test": "x = 1"}, "tasks.code.test: the tests define no function check in row 0 of"),
        (human_task(), HUMAN | {"name": ["f"]}, "tasks.code.entry_point names field 'name', which is a list in row 0"),
        (human_task(), HUMAN | {"prompt": None}, "tasks.code.prompt names field 'prompt', which is null in row 0"),
    ],
)
def test_rows_that_cannot_be_judged_are_refused(task: CodeTask, row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        task.check_rows([row], KEY)


def test_calibration_needs_no_tests() -> None:
    row = {"prompt": "a", "completion": "b"}
    mbpp_task().check_rows([row], "tasks.code.calibration")
    for key in (KEY, "tasks.code.tuning"):
        with pytest.raises(InputError, match="test_list"):
            mbpp_task().check_rows([row], key)


SOURCE = {"path": "json", "data_files": "rows.jsonl"}


def test_nothing_runs_unless_the_recipe_says_so() -> None:
    task = CodeTask.model_validate({"kind": "code", "test_list": "tests", "evaluation": SOURCE})
    with pytest.raises(InputError, match=r"^tasks\.code\.run_untrusted_code is false, and kind code runs programs"):
        task.check_installed("tasks.code")
    with pytest.raises(InputError, match=r"^run_untrusted_code is false"):
        task.answer_record(MBPP, MBPP["completion"])
    only_losses = CodeTask.model_validate({"kind": "code", "calibration": SOURCE})
    only_losses.check_installed("tasks.code")


def test_what_is_refused_without_isolation_and_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(isolate: bool = True) -> str | None:
        return "unshare: Operation not permitted" if isolate else None

    monkeypatch.setattr("sensmerge.tasks.kinds.code.missing_isolation", missing)
    task = mbpp_task(evaluation=SOURCE)
    with pytest.raises(InputError, match=r"^tasks\.code\.isolation is required, and the machine cannot .*unshare"):
        task.check_installed("tasks.code")
    lax = mbpp_task(evaluation=SOURCE, isolation="if_possible")
    lax.check_installed("tasks.code")
    (note,) = lax.notes("tasks.code", None, None)  # type: ignore[arg-type]
    assert "limits of time and memory alone" in note
    assert "unshare: Operation not permitted" in note
    monkeypatch.setattr("sensmerge.tasks.kinds.code.missing_isolation", lambda isolate=True: None)
    (note,) = task.notes("tasks.code", None, None)  # type: ignore[arg-type]
    assert "without network, files and other processes" in note


def test_what_changes_scores_is_in_the_identity() -> None:
    plain = identity(mbpp_task(), "evaluation")
    for changed in ({"timeout": 11}, {"memory": 512}, {"generate": 7}, {"context": "{prompt}"}, {"prompt": "{x}"}):
        assert identity(mbpp_task(**changed), "evaluation") != plain
    assert identity(code_task(test_list="other", test_setup="setup"), "evaluation") != plain
    for same in ({"isolation": "if_possible"}, {"run_untrusted_code": False}, {"batch_size": 1}, {"loss_on": "all"}):
        assert identity(mbpp_task(**same), "evaluation") == plain
    assert identity(mbpp_task(timeout=11), "calibration") == identity(mbpp_task(), "calibration")
    assert set(mbpp_task().depends_on()) == {"python", "rules"}


def test_tuning_runs_programs_on_rows_of_its_own_alone() -> None:
    assert mbpp_task().for_tuning().answer_tokens == 0
    assert mbpp_task(tuning=SOURCE).for_tuning().answer_tokens == 512
    assert mbpp_task(tuning=SOURCE, metric="perplexity").for_tuning().metric == "token_accuracy"


# Answers


@isolated
def test_answers_are_judged_by_their_tests() -> None:
    right = mbpp_task().answer_record(MBPP, "Sure:\n```python\ndef f(x):\n    return x + 1\n```")
    assert (right["passed"], right["outcome"]) == (1, "passed")
    assert mbpp_task().answer_record(MBPP, "def f(x): return x")["outcome"] == "wrong"
    assert mbpp_task(timeout=1).answer_record(MBPP, "def f(x):\n    while True: pass")["outcome"] == "timeout"
    assert human_task().answer_record(HUMAN, HUMAN["completion"])["outcome"] == "passed"
    assert human_task().answer_record(HUMAN | {"name": "g"}, HUMAN["completion"])["outcome"] == "undefined"
    with_setup = MBPP | {"setup": "one = f(0)", "tests": ["assert f(one) == 2"]}
    assert mbpp_task().answer_record(with_setup, MBPP["completion"])["outcome"] == "passed"


WORDS = ["<s>", "add", "def f(x):", "return x + 1", "sub", "def f(x): ", "return x - 1", "loop", "while", "True: pass"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Every word a token, and some tokens several words."""
    one = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*WORDS, "</s>"])}, unk_token="<s>"))
    one.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=one, eos_token="</s>", pad_token="</s>", unk_token="<s>")


@pytest.fixture(scope="module")
def network(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A network without context, which says of its tokens the next."""
    n = len(tokenizer)
    config = LlamaConfig(vocab_size=n, hidden_size=n + n % 2, num_hidden_layers=1, num_attention_heads=1)
    config.eos_token_id = tokenizer.eos_token_id
    network = LlamaForCausalLM(config)
    with torch.no_grad():
        network.model.layers[0].self_attn.o_proj.weight.zero_()
        network.model.layers[0].mlp.down_proj.weight.zero_()
        network.model.embed_tokens.weight.copy_(torch.eye(n, config.hidden_size))
        shifted = torch.eye(n, config.hidden_size).roll(1, dims=0)
        network.lm_head.weight.copy_(shifted * 10 / math.sqrt(config.hidden_size))
    return network


@isolated
def test_a_model_is_scored_by_the_programs_that_it_writes(
    network: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [MBPP | {"prompt": prompt} for prompt in ("add", "sub", "loop")]
    task = mbpp_task(generate=2, timeout=1, metric="pass_at_1")
    task.check_rows(rows, KEY)
    records = evaluate_network(network, tokenizer, task, rows, KEY)
    assert records == evaluate_network(network, tokenizer, task, rows, KEY)
    assert [one["answer"] for one in records] == [
        "def f(x): return x + 1",
        "def f(x):  return x - 1",
        "while True: pass",
    ]
    assert [(one["passed"], one["outcome"]) for one in records] == [(1, "passed"), (0, "wrong"), (0, "timeout")]
    scores = task.scores(records)
    assert (scores["pass_at_1"].value, scores["pass_at_1"].n) == (pytest.approx(1 / 3), 3)
    assert 0 < scores["pass_at_1"].low < 1 / 3 < scores["pass_at_1"].high < 1
    plain = CompletionTask(kind="completion")
    losses = evaluate_network(network, tokenizer, plain, rows, KEY)
    assert [{name: one[name] for name in losses[0]} for one in records] == losses
    batches = [one.calibration_batch(MBPP, tokenizer, "row 0") for one in (task, plain)]
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in ("input_ids", "labels"))
