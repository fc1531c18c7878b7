"""What every merged folder of the tests must be: a model that plain transformers loads, with all files of its base."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModel

from sensmerge.tasks.checkpoints.companions import companions

_REPORTED = ("missing_keys", "unexpected_keys", "mismatched_keys")


def assert_loads(folder: Path, source: Path, without: Sequence[str] = ()) -> None:
    """Assert that transformers loads a merged folder as well as its base, and that no small file is lost.

    Args:
        folder: of the merged model.
        source: folder of the base.
        without: files of the base that the merged model is not to have.
    """
    found, allowed = loading_problems(folder), loading_problems(source)
    for kind in _REPORTED:
        assert found[kind] <= allowed[kind], f"{folder}: {kind} {sorted(found[kind] - allowed[kind])[:5]}"
    lost = set(companions(source)) - set(companions(folder)) - set(without)
    assert not lost, f"{folder} lacks {', '.join(sorted(lost))}"


def assert_store_loads(store: Path) -> None:
    """Assert `assert_loads` of every static merge in a store."""
    bases = [Path(json.loads(path.read_text())["folder"]) for path in sorted(store.glob("download/base-*/files.json"))]
    for config in store.glob("merge/*/config.json"):
        is_whole = (config.parent / "manifest.json").is_file() and bases and bases[-1].is_dir()
        if is_whole and _is_read_by_transformers(bases[-1]):
            assert_loads(config.parent, bases[-1])


def _is_read_by_transformers(folder: Path) -> bool:
    """Whether transformers has a class for a model that needs no other package (timm), nor runs in fp8."""
    config = json.loads((folder / "config.json").read_text())
    known = config.get("model_type") in set(transformers.CONFIG_MAPPING) - {"timm_wrapper"}
    return known and "quantization_config" not in config


def loading_problems(folder: Path) -> dict[str, set[str]]:
    """Return the missing, unexpected and mismatched keys that transformers finds as it loads a model."""
    names = json.loads((folder / "config.json").read_text()).get("architectures") or ["AutoModel"]
    cls: Any = getattr(transformers, names[0], AutoModel)
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        _, info = cls.from_pretrained(folder, output_loading_info=True)
    finally:
        transformers.logging.set_verbosity(level)
    return {kind: {str(one) for one in info[kind]} for kind in _REPORTED}
