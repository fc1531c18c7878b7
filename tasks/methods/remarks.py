"""What methods say of the tensors that they merge, for the user to know."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_SAID: ContextVar[list[str] | None] = ContextVar("said", default=None)


@contextmanager
def remarks() -> Iterator[list[str]]:
    """Collect the remarks that methods make within the block."""
    said: list[str] = []
    before = _SAID.set(said)
    try:
        yield said
    finally:
        _SAID.reset(before)


def remark(text: str) -> None:
    """Say of the tensor that is being merged what its user should know.

    Tensors of which a method says the same are counted, so the text has neither their names nor numbers of their own.
    """
    said = _SAID.get()
    if said is not None and text not in said:
        said.append(text)
