"""Questions: rows that a merged model is to answer, in the prompt of a task, in its chat template, or as plain text.

A row with a field `task` is asked as the task of that name asks in evaluation; one with `messages` as its chat template
writes these; one with a `text` as that text. transformers and torch are imported where they are used.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from sensmerge.tasks.errors import InputError, shown
from sensmerge.tasks.kinds.chat import ASSISTANT, ChatTask
from sensmerge.tasks.kinds.kind import KINDS, RowTask
from sensmerge.tasks.kinds.messages import read_messages
from sensmerge.tasks.networks.tokens import Inputs
from sensmerge.tasks.rows.source import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Question = str | bytes | Mapping[str, Any]
"""a text, a picture's file, or a row"""
Prompts = Mapping[str, RowTask]
"""the tasks that a merged model can be asked, by name"""
TASK, MESSAGES, TEXT = "task", "messages", "text"
"""Fields of a row, the first of which that it has says how it is asked."""
KEEPS_NONE = (
    "none, for the model keeps no prompts: leave it out of the row, whose text is read as it is; where a head is to be "
    "chosen, name the task of all rows beside them (--task, or the parameter task)"
)
"""What is expected of the task of a row where none can be asked."""


def kept_settings(tasks: Prompts) -> dict[str, dict[str, Any]]:
    """Return as JSON what a merged model has to keep of its recipe's tasks to be asked as they ask."""
    return {
        name: task.model_dump(mode="json", include={"kind", *task.asks}) for name, task in tasks.items() if task.asks
    }


def prompts_of(settings: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, RowTask]:
    """Return the tasks of `kept_settings`.

    Raises:
        InputError: a kind that is not installed here, or settings that it does not take; `where` names their file.
    """
    found: dict[str, RowTask] = {}
    for name, one in settings.items():
        kind = one.get("kind")
        cls = KINDS.get(kind) if isinstance(kind, str) else None
        if cls is None or not issubclass(cls, RowTask) or not cls.asks:
            raise InputError(
                f"{where}: task {name} is of kind {shown(kind)}, which has no prompt format here; if a package has it, "
                "install that"
            )
        try:
            found[name] = cls.model_validate({key: value for key, value in one.items() if key in ("kind", *cls.asks)})
            found[name].named_fields(f"task {name}")
        except ValidationError as error:
            raise InputError(f"{where}: task {name}: {error.errors()[0]['msg']}; copy the folder again") from None
        except InputError as error:
            raise InputError(f"{where}: {error}; copy the folder again") from None
    return found


def check_question(row: Row, prompts: Prompts, where: str) -> None:
    """Check that a row can be asked.

    Args:
        row: has a `task`, `messages` or a `text`.
        prompts: the tasks that the model knows.
        where: names the row in messages.

    Raises:
        InputError: names row and field.
    """
    if row.get(TASK) is not None:
        task = _task(row[TASK], prompts, where)
        task.check_question(row, f"tasks.{row[TASK]}", where)
    elif row.get(MESSAGES) is not None:
        _CHAT.check_question(row, "chat", where)
        if read_messages(row[MESSAGES], where)[-1]["role"] == ASSISTANT:
            raise InputError(f"{where}: the last of {MESSAGES} is the {ASSISTANT}'s, expected one that is answered")
    elif not isinstance(row.get(TEXT), str):
        found = (
            f"field {TEXT!r} is {shown(row[TEXT])}" if TEXT in row else f"has {', '.join(map(repr, row)) or 'no field'}"
        )
        raise InputError(f"{where}: {found}; expected a text in {TEXT!r}, {MESSAGES!r}, or a {TASK!r} and its fields")


def is_plain(question: Question) -> bool:
    """Return whether a question is read as it is, in no prompt and no chat template."""
    return not isinstance(question, Mapping) or (question.get(TASK) is None and question.get(MESSAGES) is None)


def plain(question: Question) -> str | bytes:
    """Return the text or the picture of a question; empty for a row that has no `text`."""
    return str(question.get(TEXT) or "") if isinstance(question, Mapping) else question


def read_questions(
    questions: Sequence[Question],
    prompts: Prompts,
    reader: Any,
    network: "PreTrainedModel",
    max_new_tokens: int | None,
    places: Sequence[str],
) -> list[Inputs]:
    """Return what a network reads of questions.

    Args:
        questions: texts, pictures or rows.
        prompts: the tasks that the model knows.
        reader: the model's tokenizer, or its image processor.
        network: the model's.
        max_new_tokens: length of an answer in text at most; None for a classifier.
        places: what messages call the questions.

    Raises:
        InputError: a row that cannot be asked, a text without a token or longer than the network takes; what is no
            picture.
    """
    from sensmerge.tasks.networks.texts import check_room, inputs_of

    found: list[Inputs] = []
    for question, place in zip(questions, places, strict=True):
        if isinstance(question, Mapping):
            row = dict(question)
            check_question(row, prompts, place)
            if not is_plain(row):
                task = _CHAT if row.get(TASK) is None else _task(row[TASK], prompts, place)
                asked = task.question(row, reader, place)
                check_room(asked["input_ids"], network, max_new_tokens, place)
                found.append(asked)
                continue
        found += inputs_of([plain(question)], reader, network, max_new_tokens, [place])
    return found


_CHAT = ChatTask.model_validate({"kind": "chat", "max_length": sys.maxsize})
"""Messages that no task is named for."""


def _task(name: Any, prompts: Prompts, where: str) -> RowTask:
    if not isinstance(name, str) or name not in prompts:
        known = f"one of {', '.join(prompts)}" if prompts else KEEPS_NONE
        raise InputError(f"{where}: task is {shown(name)}; expected {known}")
    return prompts[name]
