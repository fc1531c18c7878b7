"""What a model's files could have transformers fetch and run, or read from elsewhere: it is refused.

Keys that name code beside a model (`auto_map`) are passed over by transformers, as it is told to trust none.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sensmerge.tasks.artifacts import load_object
from sensmerge.tasks.errors import InputError, shown


def _one_of(*values: str) -> Callable[[Any], bool]:
    def allowed(found: Any) -> bool:
        return all(one in (None, *values) for one in (found.values() if isinstance(found, dict) else [found]))

    return allowed


def _nothing(found: Any) -> bool:
    return not found


def _plain_names(found: Any) -> bool:
    names = found if isinstance(found, list) else [found]
    return all(isinstance(one, str) and Path(one).name == one and "\\" not in one for one in names)


_ATTENTION = (_one_of("eager", "sdpa"), "eager or sdpa")
_EXPERTS = (_one_of("eager", "batched_mm", "grouped_mm"), "eager, batched_mm or grouped_mm")
_NONE = (_nothing, "no such key")
_IN_FOLDER = (_plain_names, "names of files in the model's folder")

KEYS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "attn_implementation": _ATTENTION,
    "_attn_implementation": _ATTENTION,
    "_attn_implementation_internal": _ATTENTION,
    "experts_implementation": _EXPERTS,
    "_experts_implementation": _EXPERTS,
    "_experts_implementation_internal": _EXPERTS,
    "use_kernels": _NONE,
    "_use_kernels": _NONE,
    "kernel_config": _NONE,
    "trust_remote_code": _NONE,
    "gguf_file": _NONE,
    "configuration_files": _NONE,
    "_configuration_file": _NONE,
    "fast_tokenizer_files": _IN_FOLDER,
}
"""By key: which values are harmless, and what to call these."""


def check_foreign(path: Path) -> None:
    """Check that nothing in a JSON file of a model, at any depth, calls for what lies elsewhere.

    Raises:
        InputError: something does, or the file holds no object; it names file and key.
    """
    for key, value in _entries(load_object(path)):
        allowed, expected = KEYS[key]
        if not allowed(value):
            raise InputError(
                f"{path}: {key} is {shown(value)}; expected {expected}: what a model names elsewhere is neither read "
                "nor run; remove the key in a copy of the model"
            )


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    for inner in value if isinstance(value, list) else ():
        yield from _entries(inner)
    for key, inner in value.items() if isinstance(value, dict) else ():
        if key in KEYS:
            yield key, inner
        yield from _entries(inner)
