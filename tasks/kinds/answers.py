"""Answers that models write, found in what they say and compared with what is expected."""

import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from string import punctuation
from typing import Literal

from sensmerge.tasks.patterns import TimeLimit, compile_pattern

Comparison = Literal["text", "number", "normalized"]

_CURRENCY = str.maketrans("−", "-", "$€£¥")
_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3}\b)?"
)
_PUNCTUATION = str.maketrans("", "", punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def find_answer(pattern: str, text: str, where: str = "answer") -> str | None:
    """The last match of a regular expression, its group 1 if it has one, without surrounding space; None if none.

    Raises:
        InputError: no regular expression, or one that takes too long on the text; `where` names it.
    """
    found = compile_pattern(pattern, where).last(text, TimeLimit())
    return None if found is None else found.strip()


def number(text: str) -> Decimal | None:
    """The last number in a text: `72`, `72.0`, `$72`, `1,234.5`, `-3e5`; None if there is none.

    Signs of currencies, commas between thousands and whatever stands around the number do not count.
    """
    found = _NUMBER.findall(text.translate(_CURRENCY))
    return Decimal(found[-1].replace(",", "")) if found else None


def normalized(text: str) -> str | None:
    """A text in lower case without punctuation, English articles and double spaces (as SQuAD's evaluation has it).

    None if nothing is left: of `A`, an article, say.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()) or None


COMPARED: Mapping[Comparison, Callable[[str], object]] = {"text": str.strip, "number": number, "normalized": normalized}
"""What of an answer is compared, and has to be equal; None: there is no answer."""
