"""Regular expressions that others have written: Python's syntax, but no text keeps them busy for long.

They run in the engine `regex`, which reads what `re` reads and takes a time limit. Engines whose time is linear by
design know no lookahead, which recipes and adapters use.
"""

import re
import time
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import regex

from sensmerge.tasks.errors import InputError, shown

SECONDS = 1.0
"""How long one search may take; most take microseconds."""
MOST_CHARACTERS = 2000
"""of a pattern"""
MOST_REPEATED = 10_000
"""Characters that a pattern may ask for, repeats counted out: the engine holds them all."""
_PART = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(\d+)(?:,\d*)?\}|.", re.DOTALL)
_OTHERWISE = re.compile(r"(?<!\\)\{(?=[^}:]*[deis])[\d\s<=,+deis]+[}:]|\[\[:")
"""What `regex` reads as approximate matching or as a named class, and `re` as it stands."""


@dataclass
class TimeLimit:
    """The seconds that are left to some searches together, of this process's CPU time."""

    left: float = SECONDS


@dataclass(frozen=True)
class Pattern:
    """A regular expression that ends in time; see `compile_pattern`."""

    text: str
    where: str
    """names it in messages: a key, or a file and a key"""
    _compiled: Any = field(repr=False)

    def matches(self, text: str, limit: TimeLimit) -> bool:
        """Return whether the whole of a text matches.

        Raises:
            InputError: the time is up.
        """
        return self._within(limit, lambda seconds: self._compiled.fullmatch(text, timeout=seconds)) is not None

    def last(self, text: str, limit: TimeLimit) -> str | None:
        """Return the last match in a text, group 1 of it if the pattern has one ("" where that took no part).

        Raises:
            InputError: the time is up.
        """
        found = self._within(limit, lambda seconds: deque(self._compiled.finditer(text, timeout=seconds), maxlen=1))
        return (found[0][1 if self._compiled.groups else 0] or "") if found else None

    def _within(self, limit: TimeLimit, search: Callable[[float], Any]) -> Any:
        start = time.process_time()
        try:
            return search(min(SECONDS, max(limit.left, 1e-3)))
        except (TimeoutError, MemoryError):
            raise InputError(
                f"{self.where}: searching a text for {shown(self.text)} takes too long; write the regular expression "
                "so that no two parts of it can match the same characters"
            ) from None
        finally:
            limit.left -= time.process_time() - start


@lru_cache(maxsize=1024)
def compile_pattern(text: str, where: str) -> Pattern:
    """Return a regular expression in Python's syntax.

    Args:
        text: the expression.
        where: names it in messages.

    Raises:
        InputError: it is none, too long, or asks for more characters than any answer or name has.
    """
    if len(text) > MOST_CHARACTERS:
        raise InputError(f"{where}: has {len(text):,} characters; expected a pattern of at most {MOST_CHARACTERS:,}")
    try:
        if _OTHERWISE.search(text):
            raise InputError(f"{where}: {shown(text)} is ambiguous; write \\{{ for a brace and \\[ for a bracket")
        with warnings.catch_warnings():  # of what a later Python may read otherwise; `regex` stays as it is
            warnings.simplefilter("ignore", FutureWarning)
            re.compile(text)  # `regex` takes more than Python does
        if _asked_for(text) > MOST_REPEATED:
            raise InputError(f"{where}: {shown(text)} repeats more than {MOST_REPEATED:,} characters; repeat fewer")
        return Pattern(text, where, regex.compile(text, regex.VERSION0))
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise InputError(f"{where}: {shown(text)} is not a regular expression: {error}") from None


def _asked_for(text: str) -> int:
    """Return how many characters a pattern, which Python has read, asks for at least; more rather than fewer."""
    counts, last = [0], 0
    for part in _PART.finditer(text):
        if part[1]:
            more = last * (int(part[1]) - 1)
            counts[-1], last = counts[-1] + more, last + more
        elif part[0] == "(":
            counts.append(0)
        else:
            last = counts.pop() if part[0] == ")" and len(counts) > 1 else 1
            counts[-1] += last
    return sum(counts)
