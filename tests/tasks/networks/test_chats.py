"""Conversations in tokens: those of `apply_chat_template`, and token by token what the assistant says."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks import chats, template_files
from sensmerge.tasks.networks.chats import ChatTemplate, ReadChat, dated
from sensmerge.tasks.networks.merged_ids import in_merged_ids
from tests.tasks.networks.chat_templates import CHATML, FORMS, Form, chat_tokenizer

TOKENIZERS = {name: chat_tokenizer(form) for name, form in FORMS.items()}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "how many?"},
    {"role": "assistant", "content": "seven and 7"},
    {"role": "user", "content": "seven and 7? are é you\nsure?"},
    {"role": "assistant", "content": "ANSWER: 15 ñ\n\nfifteen"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"b": 1.5, "a": "x"}}}]
CALLS = [
    {"role": "user", "content": "add"},
    {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"b": 2, "a": 1}}}],
    },
    {"role": "tool", "name": "add", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
]


def messages_of(form: Form) -> list[dict[str, Any]]:
    return CHAT if form.takes_system else CHAT[1:]


def read(name: str, messages: list[dict[str, Any]], every: bool = False, tools: Any = None, **more: Any) -> ReadChat:
    template = ChatTemplate(TOKENIZERS[name], tools, FORMS[name].variables, "row 7")
    return template.read(messages, more.get("given"), every)


def applied(name: str, messages: list[dict[str, Any]], **more: Any) -> Any:
    form = FORMS[name]
    options = {"chat_template": dated(form.template), "return_dict": False, **form.variables, **more}
    return TOKENIZERS[name].apply_chat_template(messages, **options)


def spans_of(name: str, whole: str, turns: list[str]) -> Iterator[tuple[int, int]]:
    """Where the turns of the assistant stand, each with what is said before the answer, and the token that ends it."""
    form, place = FORMS[name], 0
    for number, turn in enumerate(turns):
        lead = form.last_lead if form.last_lead and number == len(turns) - 1 else form.lead
        place = whole.index(lead + turn + form.closing, whole.index(header(name), place) + len(header(name)))
        yield place, place + len(lead + turn + form.closing)


def header(name: str) -> str:
    """What stands before each turn of the assistant, whatever it says."""
    first = messages_of(FORMS[name])[:-3]
    asked = applied(name, first, tokenize=False, add_generation_prompt=True)
    return str(asked.partition("how many?")[2].removesuffix("<think>\n\n</think>\n\n").removesuffix("<think>\n"))


def tokens_in(tokenizer: PreTrainedTokenizerFast, text: str, spans: list[tuple[int, int]]) -> list[int]:
    """The tokens from the one with the first character of each span to the one with its last."""
    found = tokenizer(text, add_special_tokens=False)
    places = []
    for start, end in spans:
        places += range(found.char_to_token(start), found.char_to_token(end - 1) + 1)
    return places


@pytest.mark.parametrize("name", FORMS)
def test_tokens_are_those_of_apply_chat_template(name: str) -> None:
    messages = messages_of(FORMS[name])
    chat = read(name, messages)
    assert chat.ids == applied(name, messages)
    assert chat.prompt == applied(name, messages[:-1], add_generation_prompt=True)
    begin = TOKENIZERS[name].bos_token_id
    if FORMS[name].begins:
        assert TOKENIZERS[name]("a")["input_ids"][0] == begin  # which it sets before other texts
        if name not in ("zephyr", "phi-3"):  # whose templates write none
            assert chat.ids[0] == begin != chat.ids[1]


@pytest.mark.parametrize("name", FORMS)
def test_what_the_assistant_says_token_by_token(name: str) -> None:
    messages = messages_of(FORMS[name])
    whole = applied(name, messages, tokenize=False)
    turns = [one["content"] for one in messages if one["role"] == "assistant"]
    spans = list(spans_of(name, whole, turns))
    chat = read(name, messages, every=True)
    assert chat.said == tokens_in(TOKENIZERS[name], whole, spans[-1:])
    assert chat.said_before == tokens_in(TOKENIZERS[name], whole, spans[:-1])
    assert not set(chat.said) & set(chat.said_before)
    alone = read(name, messages)
    assert (alone.ids, alone.said, alone.prompt) == (chat.ids, chat.said, chat.prompt)
    if name != "deepseek-r1":  # whose prompt begins a thought that no later prompt shows
        assert chat.ids[: len(chat.prompt)] == chat.prompt
        assert chat.said[0] == len(chat.prompt)


def said_texts(name: str, chat: ReadChat) -> tuple[str, str]:
    tokenizer = TOKENIZERS[name]
    return tuple(tokenizer.decode([chat.ids[one] for one in some]) for some in (chat.said_before, chat.said))  # type: ignore[return-value]


CONTENT = st.text(alphabet="aAn 7é\n.?'", max_size=12).map(lambda text: f"a{text}")
"""Begins with a letter: a template that trims, and a token over the end of the header, would show another."""


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if not form.metaspace])
@given(contents=st.lists(CONTENT, min_size=4, max_size=4))
def test_any_content(name: str, contents: list[str]) -> None:
    form = FORMS[name]
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    chat = read(name, messages, every=True)
    assert chat.ids == applied(name, messages)
    before, said = said_texts(name, chat)
    lead = form.lead if form.last_lead is None else form.last_lead
    # A token at the end may hold the next character, too, where no token of its own ends the turn.
    trimmed = said if form.closing else said.rstrip()
    answers = {contents[3], contents[3].strip()} | ({contents[3].rstrip()} if not form.closing else set())
    assert trimmed in {lead + one + form.closing for one in answers}
    trimmed = before if form.closing else before.rstrip()
    answers = {contents[1], contents[1].strip()}
    assert trimmed in {form.lead + one + form.closing for one in answers} | {(form.lead + contents[1]).rstrip()}


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("qwen-2.5", '\n<tool_call>\n{"name": "add", "arguments": {"b": 2, "a": 1}}\n</tool_call><|im_end|>'),
        ("llama-3.1", '{"name": "add", "parameters": {"b": 2, "a": 1}}<|eom_id|>'),
        ("mistral-tools", '[TOOL_CALLS] [{"name": "add", "arguments": {"b": 2, "a": 1}}]</s>'),
    ],
)
def test_tools(name: str, call: str) -> None:
    chat = read(name, CALLS, every=True, tools=TOOLS)
    assert chat.ids == applied(name, CALLS, tools=TOOLS)
    assert chat.prompt == applied(name, CALLS[:-1], tools=TOOLS, add_generation_prompt=True)
    before, last = said_texts(name, chat)
    header = "\n" if name == "qwen-2.5" else ""  # which its prompt ends with, and a call is not set after
    assert before.replace("  ", " ") == call.removeprefix(header) or before == call
    assert last.strip() == "It is 3." + FORMS[name].closing
    called = read(name, CALLS[:2], tools=TOOLS)
    assert said_texts(name, called)[1] == before


def test_thoughts_count_in_the_last_turn_alone() -> None:
    """Qwen 3 shows no earlier thoughts, and a model answers after prompts that show none."""
    thinking = [{**one} for one in CHAT]
    thinking[2]["content"], thinking[4]["reasoning_content"] = "<think>\nhm\n</think>\n\nseven", "so\nso"
    before, last = said_texts("qwen-3", read("qwen-3", thinking, every=True))
    assert before == "seven<|im_end|>"
    assert last == "<think>\nso\nso\n</think>\n\nANSWER: 15 ñ\n\nfifteen<|im_end|>"


def test_a_thought_that_is_not_shown_again() -> None:
    """DeepSeek R1's prompt begins a thought; of an answer, no thought is in the text."""
    thinking = [*CHAT[:-1], {"role": "assistant", "content": "<think>\nhm\n</think>yes"}]
    chat = read("deepseek-r1", thinking)
    assert said_texts("deepseek-r1", chat)[1] == "yes<|end_of_sentence|>"
    assert TOKENIZERS["deepseek-r1"].decode(chat.prompt).endswith("<|Assistant|><think>\n")


@pytest.mark.parametrize("name", FORMS)
def test_a_last_message_that_is_continued(name: str) -> None:
    messages = messages_of(FORMS[name])
    started = [*messages[:-1], {"role": "assistant", "content": "ANSWER:"}]
    chat = read(name, messages, every=True, given="ANSWER:")
    assert chat.ids == applied(name, messages)
    assert chat.prompt == applied(name, started, continue_final_message=True)
    said = said_texts(name, chat)[1]
    assert said.strip() == f"15 ñ\n\nfifteen{FORMS[name].closing}"


def test_a_token_over_the_end_of_the_header() -> None:
    """It is scored, for it says something, and is no part of the prompt."""
    messages = [*CHAT[:-1], {"role": "assistant", "content": "\nfifteen"}]
    chat = read("chatml", messages)
    assert chat.ids == applied("chatml", messages)
    assert said_texts("chatml", chat)[1] == "\n\nfifteen<|im_end|>"
    assert chat.prompt == applied("chatml", messages[:-1], add_generation_prompt=True)
    assert TOKENIZERS["chatml"].decode(chat.prompt).endswith("assistant\n")


def test_the_assistant_may_speak_first() -> None:
    messages = [{"role": "assistant", "content": "seven"}, *CHAT[3:]]
    chat = read("chatml", messages, every=True)
    assert said_texts("chatml", chat)[0] == "seven<|im_end|>"


def test_marks_of_the_template_count() -> None:
    messages = CHAT
    found = applied("marked", messages, return_dict=True, return_assistant_tokens_mask=True)
    chat = read("marked", messages, every=True)
    mask = [int(place in {*chat.said, *chat.said_before}) for place in range(len(chat.ids))]
    assert mask == found["assistant_masks"]
    continued = read("marked", messages, every=True, given="ANSWER:")
    assert said_texts("marked", continued) == ("seven and 7<|im_end|>", " 15 ñ\n\nfifteen<|im_end|>")


def test_it_is_always_the_same_day() -> None:
    text = TOKENIZERS["llama-3.1"].decode(read("llama-3.1", CHAT).ids)
    assert "Today Date: 26 Jul 2024\n\nBe brief." in text
    two = dated('{{ strftime_now("%Y-%m-%d") }} {{ strftime_now(\'%d\') | int - 1 }} {{ strftime_now("%Y-%m-%d") }}')
    tokenizer = chat_tokenizer(Form(two, ("<|im_end|>",), begins=False))
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "2024-07-26 25 2024-07-26"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% set form = '%d %b %Y' %}{{ strftime_now(form) }} {{ strftime_now('%Y') }}", "26 Jul 2024 2024"),
        ("\n  {{ strftime_now(format='%A %-d 100%% %%d') }}", "\n  Friday 26 100% %d"),
        ("{% if strftime_now is defined %}{{ strftime_now('%B') }}{% endif %}", "July"),
        ("{%- macro day(form) %}{{ strftime_now(form) }}{% endmacro %}a {{ day('%H:%M') }}", "a 00:00"),
    ],
)
def test_a_template_asks_for_the_date_in_any_way(template: str, text: str) -> None:
    assert TOKENIZERS["chatml"].apply_chat_template(CHAT, chat_template=dated(template), tokenize=False) == text


def changed(template: str | None, **more: Any) -> ChatTemplate:
    tokenizer = chat_tokenizer(FORMS["chatml"])
    tokenizer.chat_template = template
    return ChatTemplate(tokenizer, None, more, "row 7")


@pytest.mark.parametrize(
    ("template", "messages", "text"),
    [
        (None, CHAT, "row 7: the tokenizer of merged models has no chat template; add chat_template.jinja"),
        ("{% for", CHAT, "row 7: the chat template cannot write the messages: "),
        (FORMS["gemma"].template, CHAT, "the chat template cannot write the messages: System role not supported"),
        (FORMS["mistral"].template, CHAT[2:], "the messages: Conversation roles must alternate user/assistant"),
        (CHATML, CALLS, "row 7: the chat template cannot write the messages: "),
        ("{{ messages[0].content + 1 }}", CHAT, "the chat template cannot write the messages: "),
        ("{{ messages | length }}", CHAT, "row 7: message 4 cannot be told from the rest of what the chat template"),
        (
            "{% for m in messages %}{{ m.content if loop.last or loop.first else m.content | length }}|{% endfor %}",
            CHAT,
            "row 7: message 2 cannot be told from the rest of what the chat template writes; set loss_on: last, or",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(template: str | None, messages: list[dict[str, Any]], text: str) -> None:
    with pytest.raises(InputError) as error:
        changed(template).read(messages, None, every=True)
    assert text in str(error.value)
    assert str(error.value).count("row 7: ") == 1


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_an_endless_template_is_refused_in_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(chats, "SECONDS", 0.5)
    monkeypatch.setattr(template_files, "SECONDS", 0.5)
    with pytest.raises(InputError, match=r"row 7: the chat template has not written the messages after 0\.5 seconds"):
        changed(ENDLESS).read(CHAT, None, every=False)
    chat_tokenizer(FORMS["chatml"]).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"^tokenizer\.chat_template: has not written a message after 0\.5 seconds"):
        template_files.set_template(tmp_path, ENDLESS)


def test_templates_that_are_none_are_no_error_of_ours(tmp_path: Path) -> None:
    for stated in ([{"name": "default"}], [{"template": ["a"]}], {"default": "a"}, 3):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": stated}))
        assert len(template_files.template_texts(tmp_path)) == 1


def test_several_templates() -> None:
    tokenizer = chat_tokenizer(FORMS["qwen-2.5"])
    tokenizer.chat_template = {"default": CHATML, "tool_use": FORMS["qwen-2.5"].template}
    for tools, template in ((None, CHATML), (TOOLS, FORMS["qwen-2.5"].template)):
        chat = ChatTemplate(tokenizer, tools, {}, "row 7").read(CHAT, None, every=False)
        found = tokenizer.apply_chat_template(CHAT, tools=tools, chat_template=template, return_dict=False)
        assert chat.ids == found
    tokenizer.chat_template = {"rag": CHATML, "tool_use": CHATML}
    with pytest.raises(InputError, match=r"row 7: the tokenizer of merged models has no chat template but rag, tool_u"):
        ChatTemplate(tokenizer, None, {}, "row 7").read(CHAT, None, every=False)


def test_a_tokenizer_without_offsets() -> None:
    class Slow(PreTrainedTokenizerFast):  # type: ignore[misc]
        is_fast = False

    slow = Slow(tokenizer_object=Tokenizer.from_str(TOKENIZERS["chatml"].backend_tokenizer.to_str()))
    with pytest.raises(InputError, match=r"row 7: kind chat needs a tokenizer that tells where .* is a Slow"):
        ChatTemplate(slow, None, {}, "row 7").read(CHAT, None, every=False)


@pytest.mark.parametrize("name", FORMS)
def test_ids_of_merged_models_change_nothing_else(name: str) -> None:
    """A tokenizer with other ids for its tokens finds the same ones said, those that swallow spaces among them."""
    own, form = TOKENIZERS[name], FORMS[name]
    moved = {one: (one - 50) % len(own) for one in range(len(own))}
    turns = ("how many?", "fifteen a", "how many?", " seven b")
    messages = [{"role": ("user", "assistant")[place % 2], "content": turn} for place, turn in enumerate(turns)]
    found, expected = (
        ChatTemplate(one, None, form.variables, "row 7").read(messages, None, every=True)
        for one in (in_merged_ids(own, moved, Path("b"), own), own)
    )
    assert [found.ids, found.prompt] == [[moved[one] for one in ids] for ids in (expected.ids, expected.prompt)]
    assert (found.said, found.said_before) == (expected.said, expected.said_before)
