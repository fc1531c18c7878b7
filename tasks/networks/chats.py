"""Conversations as a tokenizer's chat template writes them, and where in them the assistant speaks."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from string import ascii_letters
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from sensmerge.tasks.deadline import deadline
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.template_files import SECONDS, TEMPLATE_ERRORS
from sensmerge.tasks.networks.tokens import tokens

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]
"""where in a text: from the first character to before the second"""

TODAY = datetime(2024, 7, 26)
"""What templates take for today: a text that changes every day would change results. It is what Llama 3.1's template
says where it does not know the date."""
_TEXT = "\ue000\ue001\ue002"
"""Stands for what the assistant says, to find what stands around it."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class ReadChat:
    """A conversation, the last message of which is the assistant's, in tokens."""

    ids: list[int]
    """of all of it"""
    prompt: list[int]
    """what a model is given to answer: all but the last message, and what the template sets before an answer"""
    said: list[int]
    """indices of the tokens that the assistant says in its last turn, with the one that ends it"""
    said_before: list[int]
    """those of its other turns"""


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, with all that it reads beside the messages."""

    tokenizer: PreTrainedTokenizerBase
    tools: list[Any] | None
    variables: Mapping[str, Any]
    where: str
    """names the conversation in messages"""

    def read(self, messages: Messages, given: str | None, every: bool) -> ReadChat:
        """Return a conversation in the tokens of `apply_chat_template`.

        A token is said that has a character of a turn, as transformers counts those that a template marks; but for
        an added token that stands before it and swallows the space between them.

        Args:
            messages: the last one is the assistant's.
            given: the beginning of the last message, if the model is given that, too (`continue_final_message`).
            every: look for all turns of the assistant, and not for the last alone.

        Raises:
            InputError: a tokenizer without a template or without offsets, messages that the template refuses, turns
                that cannot be told from the rest of the text.
        """
        if not self.tokenizer.is_fast:
            raise InputError(
                f"{self.where}: kind chat needs a tokenizer that tells where in the text its tokens stand (with a "
                f"tokenizer.json); the one of merged models is a {type(self.tokenizer).__name__}"
            )
        whole = self.write(messages)
        if given is None:
            prompt = self.write(messages[:-1], prompt=True)
        else:
            prompt = self.write([*messages[:-1], {**messages[-1], "content": given}], continued=True)
            if not whole.startswith(prompt):
                raise InputError(
                    f"{self.where}: the chat template writes the last message in another way when it is continued; "
                    "set continue_final_message: false"
                )
        closing = self._closing(messages)
        last = self._turn(messages, len(messages) - 1, whole, prompt, closing)
        if _GENERATION.search(self._template):
            marked = self._marked(messages, whole)
            before = [(start, end) for start, end in marked if end <= last[0]]
            after = [(max(start, last[0]), end) for start, end in marked if end > last[0]]
        else:
            before, after = self._earlier(messages, whole, closing) if every else [], [last]
        found = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = found["input_ids"], found["offset_mapping"]
        asked = tokens(prompt, self.tokenizer, front=False)
        return ReadChat(ids, asked, self._within(after, ids, offsets), self._within(before, ids, offsets))

    def write(self, messages: Messages, prompt: bool = False, continued: bool = False) -> str:
        """Return messages as text.

        Args:
            messages: at least one.
            prompt: add what the template sets before an answer.
            continued: leave the last message open.

        Raises:
            InputError: the template refuses them, or takes too long.
        """
        template = self._template
        try:
            with deadline(SECONDS):
                text: str = self.tokenizer.apply_chat_template(
                    list(messages),
                    tools=self.tools,
                    chat_template=template,
                    add_generation_prompt=prompt,
                    continue_final_message=continued,
                    tokenize=False,
                    **self.variables,
                )
        except TimeoutError:
            raise InputError(
                f"{self.where}: the chat template has not written the messages after {SECONDS:g} seconds; name another "
                "model, or template, in tokenizer"
            ) from None
        except TEMPLATE_ERRORS as error:
            what = " ".join(str(error).split("\n")[0].split())
            raise InputError(f"{self.where}: the chat template cannot write the messages: {what}") from error
        return text

    @cached_property
    def _template(self) -> str:
        """The template for these tools, in which it is always the same day."""
        try:
            template: str = self.tokenizer.get_chat_template(None, self.tools)
        except ValueError:  # none, or several without a default
            named = ", ".join(self.tokenizer.chat_template or ())
            raise InputError(
                f"{self.where}: the tokenizer of merged models has no chat template{f' but {named}' if named else ''}; "
                "add chat_template.jinja to the base, name another model in tokenizer.source, or use kind completion"
            ) from None
        return dated(template)

    @cached_property
    def _added(self) -> Mapping[int, str]:
        """The tokenizer's added tokens, among them those that end turns."""
        return {number: str(one) for number, one in self.tokenizer.added_tokens_decoder.items()}

    def _within(self, spans: Sequence[Span], ids: Sequence[int], offsets: Sequence[Span]) -> list[int]:
        """Return the indices of the tokens that have a character of one of some spans."""
        return [
            place
            for place, (start, end) in enumerate(offsets)
            if any(
                max(start, one) < min(end, other) and (start >= one or ids[place] not in self._added)
                for one, other in spans
            )
        ]

    # Turns of the assistant

    def _marked(self, messages: Messages, whole: str) -> list[Span]:
        """Return what the template itself marks as generated."""
        texts, spans = render_jinja_template(
            conversations=[list(messages)],
            tools=self.tools,
            chat_template=self._template,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **self.variables},
        )
        assert texts == [whole], "the template writes the same text"
        found: list[Span] = spans[0]
        return found

    def _earlier(self, messages: Messages, whole: str, closing: str) -> list[Span]:
        """Return where each turn of the assistant stands but the last."""
        prompts = {
            place: self.write(messages[:place], prompt=True) if place else None
            for place, one in enumerate(messages[:-1])
            if one["role"] == "assistant"
        }
        return [self._turn(messages, place, whole, prompt, closing) for place, prompt in prompts.items()]

    def _turn(self, messages: Messages, place: int, whole: str, prompt: str | None, closing: str) -> Span:
        """Return where a message of the assistant stands in the text of all messages, with the token that ends turns.

        It begins where the prompt ends that it is generated from; if the template writes that in another way once it
        is answered, where the text of a message stands. It ends before what follows whatever the assistant says. Where
        the template does not follow every message alike, it ends where the text of all messages up to it ends.

        Raises:
            InputError: the text does not tell.
        """
        before, after = self._around(messages, place)
        start = next((len(one) for one in (prompt, before) if one is not None and whole.startswith(one)), -1)
        end = -1
        if after is not None and whole.endswith(after):
            found = re.match(rf"\s*{re.escape(closing)}", after) if closing else None
            end = len(whole) - len(after) + (found.end() if found else 0)
        elif start >= 0:
            text = self.write(messages[: place + 1])
            if whole.startswith(text):
                trimmed = text.rstrip()
                end = len(trimmed if trimmed.endswith(tuple(self._added.values())) else text)
        if not 0 <= start <= end:
            raise InputError(
                f"{self.where}: message {place} cannot be told from the rest of what the chat template writes; "
                f"{'set loss_on: last, or ' if place < len(messages) - 1 else ''}leave the row out"
            )
        return start, end

    def _around(self, messages: Messages, place: int) -> tuple[str, str] | tuple[None, None]:
        """Return the texts before and after what a message says; None where they depend on that."""
        other = {"role": messages[place]["role"], "content": _TEXT}
        try:
            text = self.write([*messages[:place], other, *messages[place + 1 :]])
        except InputError:  # a tool's answer that follows no call, say
            return None, None
        before, found, after = text.partition(_TEXT)
        return (before, after) if found and _TEXT not in after else (None, None)

    def _closing(self, messages: Messages) -> str:
        """Return the token that ends the assistant's turns, by what follows the last text; empty if no token does."""
        after = (self._around(messages, len(messages) - 1)[1] or "").lstrip()
        return max((one for one in self._added.values() if after.startswith(one)), key=len, default="")


@lru_cache(maxsize=64)
def dated(template: str) -> str:
    """Return a template for which it is always `TODAY`, in whichever format it asks for the date."""
    if "strftime_now" not in template:
        return template
    percent = "\ue003"
    codes = [f"%{pad}{letter}" for pad in ("", "-") for letter in ascii_letters]
    said = {"%%": percent} | {one: TODAY.strftime(one) for one in codes} | {percent: "%"}
    filters = "".join(f"|replace({one!r}, {text!r})" for one, text in said.items() if one != text)
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{filters} }}}}{{%- endmacro +%}}{template}"
