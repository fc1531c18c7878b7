"""What takes seconds to find out, kept on this machine by a name that tells all that it depends on."""

import time
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter

from sensmerge.pipeline.store.store import cache_folder
from sensmerge.tasks.artifacts import parse_json, write_json

T = TypeVar("T")
UNUSED = 30 * 24 * 3600
"""Seconds after which what nobody has used is deleted."""


def facts_folder(kind: str) -> Path:
    """Return where facts of a kind are kept."""
    return cache_folder() / kind


def find_fact(kind: str, name: str, form: type[T]) -> T | None:
    """Return what is kept; None if nothing is.

    Args:
        kind: of fact.
        name: tells all that it depends on.
        form: a dataclass, which it is an instance of.
    """
    path = facts_folder(kind) / f"{name}.json"
    try:
        found = TypeAdapter(form).validate_python(parse_json(path.read_bytes()))
        path.touch()
    except (OSError, ValueError):  # there is none, or another version of the program has written it
        return None
    return found


def keep_fact(kind: str, name: str, fact: T) -> None:
    """Keep a fact, and delete those of its kind that nobody has used for long.

    Args:
        kind: of fact.
        name: tells all that it depends on.
        fact: an instance of a dataclass.
    """
    path = facts_folder(kind) / f"{name}.json"
    with suppress(OSError):  # a folder that may only be read: the next time takes as long as this one
        path.parent.mkdir(parents=True, exist_ok=True)
        for one in path.parent.glob("*.json"):
            if one.stat().st_mtime < time.time() - UNUSED:
                one.unlink(missing_ok=True)
        write_json(path, TypeAdapter(type(fact)).dump_python(fact, mode="json"))
