"""Rows of messages as samples: what a recipe may say of them, what is scored, and what is refused."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.identity import identity
from sensmerge.tasks.kinds.chat import ChatSample, ChatTask
from sensmerge.tasks.rows.files import read_rows
from sensmerge.tasks.rows.source import rows_text
from sensmerge.tasks.rows.stored import StoredRows
from sensmerge.tasks.stages.evaluate import evaluate_network
from tests.conftest import make_llama
from tests.tasks.networks.chat_templates import FORMS, chat_tokenizer
from tests.tasks.networks.test_chats import CALLS, CHAT, TOKENIZERS, TOOLS

KEY = "tasks.talk.evaluation"
ROW = {"messages": CHAT}
USER = {"role": "user", "content": "how many?"}


def chat_task(**settings: Any) -> ChatTask:
    return ChatTask.model_validate({"kind": "chat", **settings})


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return chat_tokenizer(FORMS["chatml"])


def sample_of(task: ChatTask, row: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> ChatSample:
    task.check_rows([row], KEY)
    sample = task.sample(row, tokenizer, "row 7")
    assert isinstance(sample, ChatSample)
    return sample


def said(sample: ChatSample, tokenizer: PreTrainedTokenizerFast) -> str:
    return str(tokenizer.decode([sample.input_ids[place] for place in sample.scored]))


def test_the_last_turn_is_scored_and_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    sample = sample_of(chat_task(), ROW, tokenizer)
    assert sample.input_ids == tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert said(sample, tokenizer) == "ANSWER: 15 ñ\n\nfifteen<|im_end|>"
    assert sample.prompt["input_ids"] == sample.input_ids[: sample.prompt_tokens]
    assert tokenizer.decode(sample.prompt["input_ids"]).endswith("<|im_start|>assistant\n")
    assert sample.has_prompt


@pytest.mark.parametrize(
    ("loss_on", "text"),
    [
        ("last", "ANSWER: 15 ñ\n\nfifteen<|im_end|>"),
        ("all", "seven and 7<|im_end|>ANSWER: 15 ñ\n\nfifteen<|im_end|>"),
    ],
)
def test_calibration_labels_token_by_token(loss_on: str, text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    task = chat_task(loss_on=loss_on)
    batch = task.calibration_batch(ROW, tokenizer, "row 7")
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert tokenizer.decode(labels[labels != -100]) == text
    assert torch.equal(ids[labels != -100], labels[labels != -100])
    network = make_llama(vocab_size=len(tokenizer), max_position_embeddings=512).double()
    log_p = network(ids[None]).logits[0].log_softmax(-1)
    counted = [place for place in range(len(ids)) if labels[place] != -100]
    expected = -torch.stack([log_p[place - 1, ids[place]] for place in counted]).mean()
    torch.testing.assert_close(network(**batch).loss.double(), expected)
    (record,) = evaluate_network(network.eval(), tokenizer, task, [ROW], KEY)
    last = counted[-len(task.sample(ROW, tokenizer, "").scored) :]
    assert record["tokens"] == len(last)
    assert record["nll"] == pytest.approx(-float(sum(log_p[place - 1, ids[place]] for place in last)), rel=1e-5)


def test_too_long_a_conversation_loses_its_beginning(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = sample_of(chat_task(), ROW, tokenizer)
    scored = len(whole.scored)
    after = len(whole.input_ids) - whole.scored[-1] - 1
    for length in (len(whole.input_ids) - 1, scored + after + 1, 4):
        cut = sample_of(chat_task(max_length=length), ROW, tokenizer)
        assert cut.input_ids == whole.input_ids[-length:]
        assert cut.prompt["input_ids"] == whole.prompt["input_ids"][-length:]
        assert "ANSWER: 15 ñ\n\nfifteen<|im_end|>".endswith(said(cut, tokenizer))
        assert 0 not in cut.scored
    both = chat_task(loss_on="all", max_length=len(whole.input_ids) - 2).calibration_batch(ROW, tokenizer, "row 7")
    labels = both["labels"][0]
    assert tokenizer.decode(labels[labels != -100]) == "seven and 7<|im_end|>ANSWER: 15 ñ\n\nfifteen<|im_end|>"


def test_an_answer_in_a_field_of_its_own(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"messages": CHAT[:-1], "final": 72}
    sample = sample_of(chat_task(completion="It is {final}."), row, tokenizer)
    whole = [*CHAT[:-1], {"role": "assistant", "content": "It is 72."}]
    assert sample == sample_of(chat_task(), {"messages": whole}, tokenizer)
    started = {"messages": [*CHAT[:-1], {"role": "assistant", "content": "It is"}], "final": 72}
    task = chat_task(completion=" {final}.", continue_final_message=True, generate=4, compare="number")
    continued = sample_of(task, started, tokenizer)
    assert continued.input_ids == sample.input_ids
    assert said(continued, tokenizer) == " 72.<|im_end|>"
    expected = tokenizer.apply_chat_template(started["messages"], continue_final_message=True, return_dict=False)
    assert continued.prompt["input_ids"] == expected
    assert task.prompt_text(started).splitlines()[-1] == "assistant: It is"
    assert (task.expected(started), task.answer_record(started, "$72.0")["exact"]) == (" 72.", 1)


def test_messages_that_the_recipe_says(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "{question}?"},
        {"role": "assistant", "content": "{answer}"},
    ]
    row = {"question": "how many", "answer": "{7}"}
    said_by_row = [{**one, "content": one["content"].format(**row)} for one in messages]
    task = chat_task(messages=messages)
    assert sample_of(task, row, tokenizer) == sample_of(chat_task(), {"messages": said_by_row}, tokenizer)
    assert identity(task)["messages"] == messages
    assert task.prompt_text(row) == "system: Be brief.\nuser: how many?"
    with pytest.raises(InputError, match=r"tasks\.talk\.messages\[1\]\.content names field 'question', row 0 of"):
        task.check_rows([{"answer": "7"}], KEY)
    wrong = chat_task(messages=[{"role": "user", "content": "{a.b}"}])
    with pytest.raises(InputError, match=r"^tasks\.talk\.messages\[0\]\.content: template '\{a\.b\}'"):
        wrong.check_rows([row], KEY)


def test_variables_of_the_template() -> None:
    tokenizer = chat_tokenizer(FORMS["qwen-3"])
    silent = sample_of(chat_task(chat_template_kwargs={"enable_thinking": False}), ROW, tokenizer)
    loud = sample_of(chat_task(), ROW, tokenizer)
    assert said(loud, tokenizer).removeprefix("<think>\n\n</think>\n\n") == said(silent, tokenizer)
    assert tokenizer.decode(silent.prompt["input_ids"]).endswith("<think>\n\n</think>\n\n")
    with pytest.raises(InputError, match=r"^tasks\.talk\.chat_template_kwargs: tools is no variable of a template"):
        chat_task(chat_template_kwargs={"tools": 1}).check_rows([ROW], KEY)


def test_tools_keep_the_order_and_the_numbers_of_the_file(tmp_path: Path) -> None:
    """As the model has them in training: by way of the file of rows that workers read, too."""
    tokenizer = chat_tokenizer(FORMS["qwen-2.5"])
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"tools": TOOLS, "messages": CALLS, "id": 1}) + "\n")
    ((row, _),) = read_rows(file, "json")
    rows = StoredRows.of([row], tmp_path)
    rows.write([row])
    (kept,) = rows.read()
    expected = tokenizer.apply_chat_template(CALLS, tools=TOOLS, return_dict=False)
    call = {"function": {"name": "add", "arguments": '{"b": 2, "a": 1}'}}
    called = {"role": "assistant", "content": None, "tool_calls": [call]}
    as_text = {"messages": [CALLS[0], called, *CALLS[2:]], "tools": json.dumps(TOOLS)}
    csv = {"messages": json.dumps(CALLS), "tools": json.dumps(TOOLS)}
    for one in (row, kept, as_text, csv):
        assert sample_of(chat_task(), one, tokenizer).input_ids == expected
    assert '"parameters": {"b": 1.5, "a": "x"}' in tokenizer.decode(expected)
    without = tokenizer.apply_chat_template(CALLS, return_dict=False)
    for none in ({}, {"tools": None}, {"tools": []}, {"tools": ""}):
        assert sample_of(chat_task(), {"messages": CALLS, **none}, tokenizer).input_ids == without
    asked = chat_task().prompt_text(as_text).splitlines()
    assert asked[1] == 'assistant: {"function": {"name": "add", "arguments": {"b": 2, "a": 1}}}'
    with pytest.raises(InputError, match=r"^tasks\.talk\.tools names field 'functions', which no row of"):
        chat_task(tools="functions").check_rows([row], KEY)


def test_rows_without_objects_are_stored_as_before() -> None:
    rows = [{"b": 1, "a": ["x", None], "é": True}, {"c": "2024-01-15"}]
    assert rows_text(rows) == json.dumps(rows, sort_keys=True, separators=(",", ":"))


def message(**changes: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", "content": "7", **changes}]}


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({}, "tasks.talk.messages names field 'messages', row 0 of tasks.talk.evaluation has no field"),
        ({"messages": None}, "tasks.talk.messages names field 'messages', which is null in row 0"),
        ({"messages": "how many?"}, "row 0 of tasks.talk.evaluation: messages is 'how many?', expected a list of mess"),
        ({"messages": []}, "messages is [], expected a list of messages: [{role: user, content: …}, …]"),
        ({"messages": [USER, "7"]}, "messages[1] is '7', expected an object with role and content"),
        ({"messages": [{"from": "human", "value": "?"}]}, "messages[0] has 'from', 'value'; expected role and content"),
        (message(role=None), "messages[1].role is None, expected a text: system, user, assistant, tool, …"),
        (message(role=3), "messages[1].role is 3, expected a text"),
        (message(content=None), "messages[1].content is None, expected a text"),
        (message(content=7), "messages[1].content is 7, expected a text"),
        (message(content=[{"type": "text", "text": "7"}]), "messages[1].content is [{'type': 'text', "),
        (message(content="\ud800"), "messages[1] has half a surrogate pair"),
        (message(tool_calls={"name": "add"}), "messages[1].tool_calls is {'name': 'add'}, expected a list of calls"),
        (message(tool_calls=[{"id": 1}]), "messages[1].tool_calls[0] is {'id': 1}, expected an object with a function"),
        (message(tool_calls=[{"name": "f", "arguments": "7"}]), "tool_calls[0]: arguments are '7', expected an"),
        (message(role="user"), "messages[1].role is 'user', expected assistant, whose answer it is; set completion"),
        ({"messages": [{"role": "assistant", "content": "7"}]}, "messages has no message but the assistant's"),
        (message() | {"tools": [3]}, "row 0 of tasks.talk.evaluation: tools is [3], expected a list of JSON schemas"),
        (message(content=" "), "messages[1] has no content, expected a text that answers are compared with; set gener"),
        (message(content="seven"), "tasks.talk.compare is number, found none in the answer 'seven' of row 0"),
    ],
)
def test_what_a_row_has_and_should_have(row: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError) as error:
        chat_task(generate=3, compare="number").check_rows([row], KEY)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("settings", "row", "text"),
    [
        ({"continue_final_message": True}, ROW, "tasks.talk.continue_final_message is true, set tasks.talk.completion"),
        (
            {"continue_final_message": True, "completion": "7"},
            {"messages": [USER]},
            "expected assistant, whose message",
        ),
        (
            {"continue_final_message": True, "completion": "7"},
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f"}]}]},
            "messages[1] has no content, expected a text that the model continues",
        ),
        ({"completion": "{x}"}, ROW, "tasks.talk.completion names field 'x', row 0 of"),
        ({"completion": "{"}, ROW, "tasks.talk.completion: template '{'"),
        ({"metric": "exact_match"}, ROW, "tasks.talk.metric is exact_match, set tasks.talk.generate"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], row: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError) as error:
        chat_task(**settings).check_rows([row], KEY)
    assert text in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "name", "arguments"]), inner, max_size=4)
    ),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system"]) | JSON, "content": st.text(max_size=5) | JSON},
    optional={"tool_calls": JSON, "reasoning_content": JSON, "name": JSON},
)


@pytest.mark.parametrize("name", ["chatml", "llama-3.1", "mistral-tools", "qwen-2.5", "qwen-3"])
@given(messages=st.lists(MESSAGE | JSON, max_size=4) | JSON, tools=JSON)
def test_any_row_is_read_or_refused(name: str, messages: Any, tools: Any) -> None:
    task, row = chat_task(loss_on="all"), {"messages": messages, "tools": tools}
    with contextlib.suppress(InputError):
        task.check_rows([row], KEY)
        batch = task.calibration_batch(row, TOKENIZERS[name], "row 7")
        assert (batch["labels"] != -100).any()


def test_nothing_to_score() -> None:
    tokenizer = chat_tokenizer(FORMS["headers-only"])
    row = {"messages": [USER, {"role": "assistant", "content": ""}]}
    with pytest.raises(InputError, match="row 7: what the assistant says has no token to score"):
        chat_task(max_length=2).sample(row, tokenizer, "row 7")
