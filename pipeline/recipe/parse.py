"""YAML of which no text, however made, takes more time or memory than a recipe needs."""

from pathlib import Path
from typing import Any

import yaml

from sensmerge.tasks.errors import InputError, shown
from sensmerge.tasks.kinds.checks import is_unicode

MOST_BYTES = 2**20
MOST_NODES = 100_000
"""Values of a recipe, those counted again that are repeated by aliases."""
MOST_LEVELS = 50


def read_text(path: Path) -> str:
    """Return the text of a recipe.

    Raises:
        InputError: it is no plain file, too large, or not UTF-8.
    """
    try:
        if path.exists() and not path.is_file():
            found = "a folder" if path.is_dir() else "a pipe or device"
            raise InputError(f"{path}: is {found}; expected a file with a recipe")
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise InputError(f"{path}: has {size:,} bytes; expected a recipe of at most {MOST_BYTES:,}")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: what can be no path at all, and no UTF-8
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: cannot be read ({reason}); expected a recipe in UTF-8") from error


def parse(text: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        InputError: it is no YAML, says a key twice, or is nested or repeated by aliases beyond all use.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            count = _nodes(node, {}, 0)
            if count > MOST_NODES:
                raise InputError(f"has {count:.3g} values, repeated ones counted; expected at most {MOST_NODES:,}")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise InputError(f"is nested too deeply; expected at most {MOST_LEVELS} levels") from None
    # Beside impossible dates and numbers of too many digits, what explicit tags make of texts that are no such value.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        said = str(error).replace('in "<unicode string>", line', "at line")
        raise InputError(f"not valid YAML: {said}") from error


def _nodes(node: yaml.Node, known: dict[int, int], level: int) -> int:
    """Return how many values a node holds, each alias counted as what it stands for.

    Raises:
        InputError: it holds itself, too many levels, or a text that no file can hold.
    """
    if level > MOST_LEVELS:
        raise InputError(f"is nested too deeply; expected at most {MOST_LEVELS} levels")
    if isinstance(node, yaml.ScalarNode):
        if not is_unicode(node.value):
            raise InputError(
                f"{shown(node.value)} has half a surrogate pair; write the character itself{node.start_mark}"
            )
        return 1
    if id(node) not in known:
        pairs = node.value if isinstance(node, yaml.MappingNode) else [(one,) for one in node.value]
        known[id(node)] = 1 + sum(_nodes(one, known, level + 1) for pair in pairs for one in pair)
    return known[id(node)]


class _Loader(yaml.SafeLoader):
    """Plain YAML takes the last of two equal keys without a word; here the same expert twice is an error."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                raise yaml.YAMLError(f"key {key.value!r} stands twice in one mapping{node.start_mark}")
            keys.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return node
