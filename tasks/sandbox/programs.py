"""The program in a generated answer."""

import ast
import re

_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)

_THOUGHT = "</think>"
RULES = 2
"""Version of what `program_of` says."""


def program_of(context: str, answer: str, entry_point: str | None) -> str:
    """Return the program that an answer makes of the code before it.

    What a model thinks before it answers, up to the last `</think>`, has drafts and no program. Of fenced blocks, the
    first that defines the entry point counts, or else the first. An answer without them goes on where the context ends,
    and counts up to the last line with which it is still Python.

    Args:
        context: code that the answer may continue or repeat; may be empty.
        answer: what a model generated.
        entry_point: the function that is asked for; None for any.
    """
    answer = answer.rpartition(_THOUGHT)[2]
    first = _FENCE.search(answer)
    if first is None or _is_code(context, answer[: first.start()]):
        return _longest(context, answer if first is None else answer[: first.start()])
    blocks = _FENCE.findall(answer)
    block: str = next((one for one in blocks if _defines(one, entry_point)), blocks[0])
    tries = [f"{context}\n{block}", context + block, block]
    if not _defines(block, entry_point):
        tries[:2] = tries[1::-1]
    return next((one for one in tries if is_python(one)), block)


def is_python(text: str) -> bool:
    """Return whether a text is a module of Python."""
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _is_code(context: str, text: str) -> bool:
    """Whether what stands before a fence is code itself, so that the fence ends it."""
    return bool(text.strip()) and (text[0].isspace() or _defines(text, None)) and is_python(context + text)


def _defines(text: str, name: str | None) -> bool:
    pattern = r"\w+" if name is None else re.escape(name)
    return re.search(rf"\bdef\s+{pattern}\b", text) is not None


def _longest(context: str, answer: str) -> str:
    lines = (answer if context else answer.lstrip()).splitlines(keepends=True)
    for count in range(len(lines), 0, -1):
        if is_python(context + "".join(lines[:count])):
            return context + "".join(lines[:count])
    return context
