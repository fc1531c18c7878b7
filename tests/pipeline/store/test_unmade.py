"""What makes no store, where there is none yet."""

import os
from pathlib import Path
from typing import Any

import pytest

from sensmerge.pipeline.store.store import Store
from sensmerge.pipeline.store.unmade import looked_at, take_over
from sensmerge.tasks.checkpoints.listing import DIGESTS
from sensmerge.tasks.errors import InputError
from tests.conftest import command_line, write_recipe
from tests.hub_server import HubServer


def test_plan_and_init_make_no_store_and_the_digests_are_its_own_later(
    llama_recipe: dict[str, Any],
    llamas: dict[str, Path],
    hub: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SENSMERGE_CACHE", str(tmp_path / "cache"))
    os.utime(llamas["code"] / "model.safetensors", (10**9, 10**9))  # settled, so that its digest is kept
    hub.add_repo("org/math", {path.name: path.read_bytes() for path in llamas["math"].iterdir()})
    llama_recipe["experts"]["math"]["model"] = "hub:org/math"
    recipe, store = write_recipe(tmp_path, llama_recipe), Store(tmp_path / "team" / "store")
    before = {path.name for path in tmp_path.iterdir()}
    assert command_line("init", llamas["base"], "hub:org/math", "--store", store) == 0
    assert command_line("plan", recipe, "--store", store) == 0
    assert {path.name for path in tmp_path.iterdir()} == before | {"cache"}
    early = looked_at(store).hub_cache
    taken = {path.name for path in (early / DIGESTS).iterdir()}
    assert taken
    store.make()
    take_over(store)
    assert {path.name for path in (store.hub_cache / DIGESTS).iterdir()} == taken
    assert not early.exists()
    assert looked_at(store) is store
    take_over(store)


def test_a_store_that_cannot_be_made_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place, wrong in (("file", "file"), ("file/store", "file")):
        with pytest.raises(InputError, match=rf"--store {tmp_path / place}: cannot be made \({tmp_path / wrong} is no"):
            looked_at(Store(tmp_path / place))
