from pathlib import Path

from pipeline.history import last_run, past_runs, remember
from pipeline.store import Key, Store


def keys(*weights: float) -> list[Key]:
    return [Key("merge", "ta", {"weight": weight}) for weight in weights]


def test_runs_are_remembered_in_order(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert past_runs(store) == []
    assert last_run(store, "one", keys(1)) is None
    remember(store, "one", "run", keys(1, 2))
    remember(store, "two", "refresh", keys(3))
    first, second = past_runs(store)
    assert (first.recipe, second.recipe) == ("one", "two")
    assert first.artifacts == sorted(f"merge/{store.folder(key).name}" for key in keys(1, 2))
    assert first.ended <= second.ended


def test_the_last_run_is_that_of_the_recipe(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for recipe, used in (("one", keys(1, 2)), ("two", keys(3))):
        remember(store, recipe, "run", used)
    found = last_run(store, "one", keys(2, 1))
    assert found is not None
    assert found.command == "run"
    assert last_run(store, "one", keys(1)) is None
    remember(store, "one", "refresh", keys(1))
    assert last_run(store, "one", keys(1)) == past_runs(store)[-1]
    assert last_run(store, "one", keys(1, 2)) is None
