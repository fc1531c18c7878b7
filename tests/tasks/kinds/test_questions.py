"""What a merged model is asked: the tokens that evaluation asks, whatever it is told of the answer."""

import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.chat import ChatTask
from sensmerge.tasks.kinds.classification import ClassificationTask
from sensmerge.tasks.kinds.code import CodeTask
from sensmerge.tasks.kinds.completion import CompletionTask
from sensmerge.tasks.kinds.kind import KINDS, RowTask
from sensmerge.tasks.kinds.multiple_choice import MultipleChoiceTask
from sensmerge.tasks.kinds.questions import check_question, is_plain, kept_settings, plain, prompts_of, read_questions
from sensmerge.tasks.kinds.regression import RegressionTask
from sensmerge.tasks.kinds.seq2seq import Seq2SeqTask
from tests.conftest import make_llama
from tests.tasks.kinds.test_samples import bpe_tokenizer
from tests.tasks.networks.chat_templates import FORMS, chat_tokenizer
from tests.tasks.networks.test_chats import CHAT, TOOLS

LABELS = {"no": 0, "yes": 1}
ASKED = {"question": "how many are seven and eight?", "n": 7}
TALK: dict[str, Any] = {"messages": CHAT[:-1]}
STARTED = {"messages": [*CHAT[:-1], {"role": "assistant", "content": "It is"}]}
TEMPLATES = [{"role": "system", "content": "Add {n}."}, {"role": "user", "content": "{question}"}]
CASES: dict[str, tuple[RowTask, dict[str, Any], dict[str, Any]]] = {
    # task, what is asked, and what evaluation has beside it
    "completion": (
        CompletionTask(kind="completion", prompt="Question: {question}\nAnswer:", completion=" {answer}", generate=8),
        ASKED,
        {"answer": "fifteen"},
    ),
    "completion from its end": (
        CompletionTask(kind="completion", prompt="{question}", completion="{answer}", end_token=False, max_length=14),
        ASKED,
        {"answer": "8"},
    ),
    "code": (CodeTask(kind="code", prompt="# {question}\n", test_list="tests"), ASKED, {"completion": "x = 1"}),
    "classification": (
        ClassificationTask(kind="classification", prompt="{n}: {question}", max_length=9),
        ASKED,
        {"label": "yes"},
    ),
    "regression": (RegressionTask(kind="regression", prompt="{question}"), ASKED, {"label": 0.5}),
    "regression of pairs": (
        RegressionTask(kind="regression", prompt="{question}", pair="{n}", max_length=12),
        ASKED,
        {"label": 0.5},
    ),
    "seq2seq": (
        Seq2SeqTask(kind="seq2seq", source="say: {question}", target="{answer}"),
        ASKED,
        {"answer": "fifteen"},
    ),
    "chat": (ChatTask(kind="chat"), TALK, {"messages": CHAT}),
    "chat with tools": (ChatTask(kind="chat"), TALK | {"tools": TOOLS}, {"messages": CHAT}),
    "chat with an answer": (ChatTask(kind="chat", completion="{final}"), TALK, {"final": 15}),
    "chat that is continued": (
        ChatTask(kind="chat", completion=" {final}", continue_final_message=True),
        STARTED,
        {"final": 15},
    ),
    "chat in templates": (
        ChatTask.model_validate({"kind": "chat", "messages": TEMPLATES, "completion": "{final}"}),
        ASKED,
        {"final": 15},
    ),
    "chat from its end": (ChatTask(kind="chat", max_length=30), TALK, {"messages": CHAT}),
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return chat_tokenizer(FORMS["chatml"])


def kept(task: RowTask) -> RowTask:
    """A task as a merged model keeps it, by way of a file."""
    return prompts_of(json.loads(json.dumps(kept_settings({"t": task}))), "dynamic.json")["t"]


@pytest.mark.parametrize("case", CASES)
def test_what_is_asked_are_the_tokens_of_evaluation(case: str, tokenizer: PreTrainedTokenizerFast) -> None:
    task, row, more = CASES[case]
    if isinstance(task, Seq2SeqTask):
        tokenizer = bpe_tokenizer("<s> $A </s>")
    expected = task.sample(row | more, tokenizer, "row 0", LABELS).prompt
    assert expected["input_ids"]
    again = kept(task)
    for asked in (row, row | more):
        again.check_question(asked, "tasks.t", "row 0")
        assert again.question(asked, tokenizer, "row 0") == expected


def test_every_kind_that_says_what_it_asks_is_tried() -> None:
    assert {type(task) for task, _, _ in CASES.values()} == {
        one for one in KINDS.values() if issubclass(one, RowTask) and one.asks
    }


def test_a_kind_that_cannot_be_asked_is_not_kept() -> None:
    assert kept_settings({"a": MultipleChoiceTask(kind="multiple_choice")}) == {}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "nothing"}, "f: task t is of kind 'nothing', which has no prompt format here"),
        ({"kind": ["chat"]}, r"f: task t is of kind \['chat'\], which has no prompt format here"),
        ({"kind": "lm_eval"}, "f: task t is of kind 'lm_eval', which has no prompt format here"),
        ({"kind": "sts"}, "f: task t is of kind 'sts', which has no prompt format here"),
        ({"kind": "completion", "max_length": 0}, "f: task t: .*; copy the folder again"),
        (
            {"kind": "completion", "prompt": "{a.b}"},
            "f: task t.prompt: template .* only plain .*; copy",
        ),
    ],
    ids=range(6),
)
def test_settings_that_are_none(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=f"^{said}"):
        prompts_of({"t": settings}, "f")


def test_only_what_is_asked_is_taken_of_settings() -> None:
    (one,) = prompts_of({"t": {"kind": "code", "prompt": "{a}", "run_untrusted_code": True}}, "f").values()
    assert isinstance(one, CodeTask)
    assert not one.run_untrusted_code


def test_a_row_says_how_it_is_read(tokenizer: PreTrainedTokenizerFast) -> None:
    network = make_llama(vocab_size=len(tokenizer), max_position_embeddings=512)
    prompts = {"add": CompletionTask(kind="completion", prompt="Q: {question}")}
    questions = [
        "Q: seven",
        {"text": "Q: seven", "id": 1},
        {"task": "add", "question": "seven", "text": "other", "messages": CHAT},
        {"task": None, "messages": CHAT[:-1], "text": "other"},
    ]
    found = read_questions(questions, prompts, tokenizer, network, 4, ["a", "b", "c", "d"])
    assert found[0] == found[1] == found[2] == {"input_ids": tokenizer("Q: seven")["input_ids"]}
    assert found[3] == ChatTask(kind="chat").sample({"messages": CHAT}, tokenizer, "").prompt
    assert [is_plain(one) for one in questions] == [True, True, False, False]
    assert [plain(one) for one in questions] == ["Q: seven", "Q: seven", "other", "other"]
    with pytest.raises(InputError, match=r"^b has 601 tokens; the model takes 1 to 508"):
        read_questions([{"task": "add", "question": "x" * 598}], _longer(prompts), tokenizer, network, 4, ["b"])


def _longer(prompts: dict[str, CompletionTask]) -> dict[str, CompletionTask]:
    return {name: one.model_copy(update={"max_length": 1000}) for name, one in prompts.items()}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, "line 2: has no field; expected a text in 'text', 'messages', or a 'task' and its fields"),
        ({"id": 1}, "line 2: has 'id'; expected a text"),
        ({"text": 3}, "line 2: field 'text' is 3; expected a text"),
        ({"task": "sub", "text": "a"}, "line 2: task is 'sub'; expected one of add, talk"),
        ({"task": ["add"]}, r"line 2: task is \['add'\]; expected one of add, talk"),
        ({"task": "add"}, "tasks.add.prompt names field 'question', line 2 has 'task'"),
        ({"task": "add", "question": 1.5}, "tasks.add.prompt names field 'question', which is the number 1.5"),
        ({"task": "talk", "messages": CHAT[2:3]}, "line 2: messages has no message but the assistant's"),
        ({"task": "more", "messages": CHAT[:1]}, "line 2: the last of messages is no text of the assistant's"),
        ({"messages": "hello"}, "line 2: messages is 'hello', expected a list of messages"),
        ({"messages": CHAT}, "line 2: the last of messages is the assistant's, expected one that is answered"),
    ],
    ids=range(11),
)
def test_rows_that_cannot_be_asked(row: dict[str, Any], said: str) -> None:
    prompts: dict[str, RowTask] = {
        "add": CompletionTask(kind="completion", prompt="{question}"),
        "talk": ChatTask(kind="chat"),
    }
    if row.get("task") == "more":
        prompts["more"] = CASES["chat that is continued"][0]
    with pytest.raises(InputError, match=f"^{said}"):
        check_question(row, prompts, "line 2")


def test_no_prompts_and_no_chat_template() -> None:
    with pytest.raises(InputError, match="task is 'add'; expected none, for the model keeps no prompts"):
        check_question({"task": "add"}, {}, "line 2")
    tokenizer = bpe_tokenizer("<s> $A")
    network = make_llama(vocab_size=320)
    with pytest.raises(InputError, match="line 2: the tokenizer of merged models has no chat template"):
        read_questions([{"messages": CHAT[:1]}], {}, tokenizer, network, 4, ["line 2"])
