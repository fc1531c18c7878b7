"""What is said while weights are read for their digests."""

import io
import os
import re
from concurrent.futures import CancelledError
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from rich.console import Console

from sensmerge.pipeline import hashing
from sensmerge.pipeline.hashing import hashed
from sensmerge.pipeline.plan.models import list_models, unhashed_bytes
from sensmerge.pipeline.recipe.load import load_recipe
from sensmerge.pipeline.store.store import Store
from tests.conftest import write_recipe


@pytest.mark.parametrize("is_terminal", [False, True])
def test_much_is_announced_once(
    is_terminal: bool, llama_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, store = load_recipe(write_recipe(tmp_path, llama_recipe), ()), Store(tmp_path / "store")
    listings = list_models(loaded, tmp_path, store.hub_cache)
    silent, told = (Console(file=io.StringIO(), width=200, force_terminal=is_terminal) for _ in range(2))
    found = hashed(listings, Store(tmp_path / "other"), silent)
    assert silent.file.getvalue() == ""
    monkeypatch.setattr(hashing, "WORTH_SAYING", 1000)
    assert hashed(listings, store, told) == found
    said = told.file.getvalue()
    assert re.search(r"kB of base, math, code without a digest yet: read once for it, about 1 s\n", said)
    assert ("━" in said) == is_terminal
    assert not any(one.unhashed() for one in found.values())


def test_it_stops_behind_a_file_when_nobody_waits_any_more(
    llama_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, store = load_recipe(write_recipe(tmp_path, llama_recipe), ()), Store(tmp_path / "store")
    os.utime(Path(llama_recipe["base"]) / "model.safetensors", (10**9, 10**9))  # settled, so that its digest is kept
    listings = list_models(loaded, tmp_path, store.hub_cache)
    monkeypatch.setattr(hashing, "WORTH_SAYING", 1000)
    stopped = Event()
    stopped.set()
    with pytest.raises(CancelledError):
        hashed(listings, store, Console(quiet=True), stopped)
    left = unhashed_bytes(list_models(loaded, tmp_path, store.hub_cache))
    assert list(left) == ["math", "code"]
