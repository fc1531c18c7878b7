"""The files of a tokenizer: found and copied, never loaded."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks.artifacts import read_json, write_json

TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
FILES = ["tokenizer.json", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json"]
FILES += ["vocab.*", "merges.txt", "*.model", "chat_template.*"]
"""Patterns of all files that a tokenizer may consist of."""


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a tokenizer of its own."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"))


def copy_tokenizer(source: Path, others: Sequence[Path], target: Path) -> None:
    """Copy a tokenizer, if the folder has one; where it has no chat template, with the first one of the others."""
    if not has_tokenizer(source):
        return
    for path in sorted({path for pattern in FILES for path in source.glob(pattern)}):
        shutil.copyfile(path, target / path.name)
    template = next((found for found in map(_chat_template, (source, *others)) if found), None)
    if template is None or _chat_template(target):
        return
    if isinstance(template, str):
        (target / CHAT_TEMPLATE).write_text(template)
    else:  # several, by name
        write_json(target / TOKENIZER_CONFIG, _config(target) | {"chat_template": template})


def _chat_template(folder: Path) -> Any:
    """Return the chat template of a tokenizer's folder, None where it has none."""
    file = folder / CHAT_TEMPLATE
    return file.read_text() if file.is_file() else _config(folder).get("chat_template")


def _config(folder: Path) -> dict[str, Any]:
    file = folder / TOKENIZER_CONFIG
    config: dict[str, Any] = read_json(file) if file.is_file() else {}
    return config
