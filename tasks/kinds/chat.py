"""Kind chat: the model answers in a conversation, which the chat template of merged models writes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from sensmerge.tasks.errors import InputError, shown
from sensmerge.tasks.identity import Only
from sensmerge.tasks.kinds.checks import NamedField, check_fields
from sensmerge.tasks.kinds.generating import GeneratingTask
from sensmerge.tasks.kinds.kind import KINDS, Labels
from sensmerge.tasks.kinds.messages import MessageTemplate, read_messages, read_tools
from sensmerge.tasks.kinds.sample import Sample
from sensmerge.tasks.kinds.templates import render, template_fields
from sensmerge.tasks.networks.tokens import Inputs, tokens
from sensmerge.tasks.rows.source import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASSISTANT = "assistant"
_TAKEN = {
    *("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
}
"""What no variable of a template can be called, because transformers gives it another meaning."""


@dataclass(frozen=True)
class ChatSample(Sample):
    """A conversation: what is scored need not be its end, nor the prompt of an answer its beginning."""

    scored: Sequence[int] = ()
    """see `Sample`"""
    asked: Sequence[int] = ()
    """tokens of the prompt that an answer is generated from"""

    @property
    def prompt(self) -> Inputs:
        """See `Sample`."""
        return {"input_ids": list(self.asked)}

    @property
    def has_prompt(self) -> bool:
        """See `Sample`."""
        return bool(self.asked)


@KINDS.register("chat")
class ChatTask(GeneratingTask):
    """The model answers in a conversation, which its chat template writes, and is scored on the assistant's last turn.

    All models of a recipe read the template that merged models have.
    """

    templates: ClassVar[tuple[str, ...]] = ()
    asks: ClassVar[tuple[str, ...]] = (
        *("messages", "completion", "continue_final_message", "tools", "chat_template_kwargs", "max_length"),
    )

    kind: Literal["chat"]
    messages: str | list[MessageTemplate] = Field(
        "messages",
        description="field with the messages, each with role, content and what else the template reads (tool_calls, "
        "reasoning_content, …), or the messages themselves, whose contents are templates",
    )
    completion: str | None = Field(
        None, description="template of the expected answer; if left out, it is the last message, the assistant's"
    )
    continue_final_message: bool = Field(
        False,
        description="the completion continues the last message, the assistant's, which the model is given",
    )
    tools: str = Field("tools", description="field with the tools (JSON schemas); rows without it, or null, have none")
    chat_template_kwargs: dict[str, bool | int | float | str] = Field(
        {}, description="variables that the chat template reads, such as enable_thinking: false"
    )
    loss_on: Annotated[Literal["last", "all"], Only("calibration")] = Field(
        "last", description="turns of the assistant that count in calibration losses"
    )
    max_length: int = Field(
        2048, ge=2, description="maximum length of a sample, in tokens; a longer one loses its beginning"
    )

    def prompt_text(self, row: Row) -> str:
        """See `GeneratingTask`."""
        messages, given = self._conversation(row)
        last = [] if given is None else [{**messages[-1], "content": given}]
        return "\n".join(map(_line, [*messages[:-1], *last]))

    def expected(self, row: Row) -> str:
        """See `GeneratingTask`."""
        if self.completion is not None:
            return render(self.completion, row)
        content: str = self._conversation(row)[0][-1].get("content", "")
        return content

    # Rows

    def check_rows(
        self, rows: Sequence[Row], key: str, labels: Labels | None = None, places: Sequence[str] | None = None
    ) -> None:
        """See `RowTask`; a field of tools that the recipe names has to be there."""
        super().check_rows(rows, key, labels, places)
        if "tools" in self.model_fields_set and rows and not any(self.tools in row for row in rows):
            raise InputError(
                f"{key.rpartition('.')[0]}.tools names field {self.tools!r}, which no row of {key} has; correct it, "
                "or leave it out"
            )

    def named_fields(self, settings: str) -> list[NamedField]:
        """See `RowTask`."""
        if self.continue_final_message and self.completion is None:
            raise InputError(
                f"{settings}.continue_final_message is true, set {settings}.completion to the template of what the "
                "model is expected to continue the last message with"
            )
        if taken := sorted(_TAKEN & self.chat_template_kwargs.keys()):
            raise InputError(f"{settings}.chat_template_kwargs: {taken[0]} is no variable of a template; leave it out")
        templates = [] if self.completion is None else [("completion", self.completion)]
        if not isinstance(self.messages, str):
            templates += [(f"messages[{place}].content", one.content) for place, one in enumerate(self.messages)]
        found = super().named_fields(settings)
        if isinstance(self.messages, str):
            found.append(NamedField(self.messages, "messages", False))
        for setting, template in templates:
            try:
                found += [NamedField(name, setting, True) for name in template_fields(template)]
            except InputError as error:
                raise InputError(f"{settings}.{setting}: {error}") from None
        return found

    def check_row(self, row: Row, settings: str, where: str, labels: Labels | None) -> None:
        """See `RowTask`: there have to be messages that the assistant answers, and the answer."""
        field = self.messages if isinstance(self.messages, str) else f"{settings}.messages"
        messages = self._messages(row, f"{where}: {field}")
        read_tools(row.get(self.tools), f"{where}: {self.tools}")
        last = f"{where}: {field}[{len(messages) - 1}]"
        answers = self.completion is None or self.continue_final_message
        if answers and messages[-1]["role"] != ASSISTANT:
            raise InputError(
                f"{last}.role is {shown(messages[-1]['role'])}, expected {ASSISTANT}, whose "
                f"{'message' if self.completion else 'answer'} it is; set completion to the template of the answer"
                f"{' and continue_final_message: false' if self.completion else ''}, or leave the row out"
            )
        if answers and len(messages) < 2:
            raise InputError(f"{where}: {field} has no message but the {ASSISTANT}'s, expected one that is answered")
        if self.continue_final_message and not isinstance(messages[-1].get("content"), str):
            raise InputError(f"{last} has no content, expected a text that the model continues")
        if self.generate and not self.expected(row).strip():
            raise InputError(f"{last} has no content, expected a text that answers are compared with; set generate: 0")
        self.check_expected(row, settings, where)

    def check_question(self, row: Row, settings: str, where: str) -> None:
        """See `RowTask`: there have to be messages that the assistant answers; the completion need not be there."""
        asked = [one for one in self.named_fields(settings) if one.setting.partition("[")[0] == "messages"]
        check_fields(asked, row, settings, where)
        field = self.messages if isinstance(self.messages, str) else f"{settings}.messages"
        last = self._messages(row, f"{where}: {field}")[-1]
        read_tools(row.get(self.tools), f"{where}: {self.tools}")
        if not self._asked(row):
            raise InputError(f"{where}: {field} has no message but the {ASSISTANT}'s, expected one that is answered")
        if self.continue_final_message and (last["role"] != ASSISTANT or not isinstance(last.get("content"), str)):
            raise InputError(f"{where}: the last of {field} is no text of the {ASSISTANT}'s, expected one to continue")

    def notes(self, key: str, tokenizer: "PreTrainedTokenizerBase", expert: Path) -> list[str]:
        """See `Task`: the expert may have been trained with another template."""
        from sensmerge.tasks.networks.template_files import template_texts

        found: Any = tokenizer.chat_template
        if template_texts(expert) <= {*(found.values() if isinstance(found, dict) else [found])}:
            return []
        return [
            f"{key}: its rows are written in the chat template that merged models have, and not in that of its expert; "
            "scores, sensitivities and distances are those of that template"
        ]

    def _conversation(self, row: Row) -> tuple[list[dict[str, Any]], str | None]:
        """Return a row's messages, the expected answer last, and the beginning of it that the model is given."""
        messages = self._messages(row, "messages")
        if self.completion is None:
            return messages, None
        answer = render(self.completion, row)
        if not self.continue_final_message:
            return [*messages, {"role": ASSISTANT, "content": answer}], None
        given = messages[-1]["content"]
        return [*messages[:-1], {**messages[-1], "content": given + answer}], given

    def _messages(self, row: Row, where: str) -> list[dict[str, Any]]:
        value: Any = row[self.messages] if isinstance(self.messages, str) else _rendered(self.messages, row)
        return read_messages(value, where)

    # Samples

    def sample(
        self, row: Row, tokenizer: "PreTrainedTokenizerBase", where: str, labels: Labels | None = None
    ) -> Sample:
        """Return the conversation in the tokens of `apply_chat_template`, of which those of the last turn count.

        They are what the model would have to say after the prompt, up to the token that ends its turn. A conversation
        that is too long loses its beginning.

        Raises InputError: no chat template, messages that it refuses, a turn without a token or that cannot be found.
        """
        return self._sample(row, tokenizer, where, every=False)

    def calibration_sample(
        self, row: Row, tokenizer: "PreTrainedTokenizerBase", where: str, labels: Labels | None = None
    ) -> Sample:
        """Return the sample; with `loss_on: all` all turns of the assistant count."""
        return self._sample(row, tokenizer, where, self.loss_on == "all")

    def question(self, row: Row, tokenizer: "PreTrainedTokenizerBase", where: str) -> Inputs:
        """See `RowTask`: the messages up to the assistant's answer, which a row may have, in the template."""
        from sensmerge.tasks.networks.chats import ChatTemplate

        messages, continued = self._asked(row), self.continue_final_message
        tools = read_tools(row.get(self.tools), f"{where}: {self.tools}")
        template = ChatTemplate(tokenizer, tools, self.chat_template_kwargs, where)
        text = template.write(messages, prompt=not continued, continued=continued)
        return {"input_ids": tokens(text, tokenizer, front=False)[-self.max_length :]}

    def _asked(self, row: Row) -> list[dict[str, Any]]:
        messages = self._messages(row, "messages")
        answered = self.completion is None and messages[-1]["role"] == ASSISTANT
        return messages[:-1] if answered else messages

    def _sample(self, row: Row, tokenizer: "PreTrainedTokenizerBase", where: str, every: bool) -> ChatSample:
        from sensmerge.tasks.networks.chats import ChatTemplate

        messages, given = self._conversation(row)
        tools = read_tools(row.get(self.tools), f"{where}: {self.tools}")
        chat = ChatTemplate(tokenizer, tools, self.chat_template_kwargs, where).read(messages, given, every)
        cut = max(len(chat.ids) - self.max_length, 0)
        said = sorted([*chat.said_before, *chat.said]) if every else chat.said
        scored = [place - cut for place in said if place > cut]  # nothing predicts the first
        if not scored:
            raise InputError(f"{where}: what the {ASSISTANT} says has no token to score; leave the row out")
        before = max(chat.said[0] - cut, 0) if chat.said else len(chat.ids) - cut
        return ChatSample({"input_ids": chat.ids[cut:]}, before, None, scored, chat.prompt[-self.max_length :])


def _line(message: Mapping[str, Any]) -> str:
    """A message for people to read."""
    calls = [json.dumps(one, ensure_ascii=False) for one in message.get("tool_calls", ())]
    return f"{message['role']}: {' '.join([message.get('content', ''), *calls]).strip()}"


def _rendered(messages: Sequence[MessageTemplate], row: Row) -> list[Mapping[str, str]]:
    return [{"role": one.role, "content": render(one.content, row)} for one in messages]
