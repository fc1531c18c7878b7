from pathlib import Path

from sensmerge.pipeline.store.history import begin, has_passed, last_run, past_runs, remember, unfinished_runs
from sensmerge.pipeline.store.store import Key, Store


def keys(*weights: float) -> list[Key]:
    return [Key("merge", "ta", {"weight": weight}) for weight in weights]


def test_runs_are_remembered_in_order(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert past_runs(store) == []
    assert last_run(store, "one", keys(1)) is None
    remember(store, "one", "run", keys(1, 2), None)
    remember(store, "two", "refresh", keys(3), None)
    first, second = past_runs(store)
    assert (first.recipe, second.recipe) == ("one", "two")
    assert first.artifacts == sorted(f"merge/{store.folder(key).name}" for key in keys(1, 2))
    assert first.ended <= second.ended


def test_the_last_run_is_that_of_the_recipe(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for recipe, used in (("one", keys(1, 2)), ("two", keys(3))):
        remember(store, recipe, "run", used, None)
    found = last_run(store, "one", keys(2, 1))
    assert found is not None
    assert found.command == "run"
    assert last_run(store, "one", keys(1)) is None
    remember(store, "one", "refresh", keys(1), None)
    assert last_run(store, "one", keys(1)) == past_runs(store)[-1]
    assert last_run(store, "one", keys(1, 2)) is None


def test_where_runs_were_recorded_is_known_without_the_password(tmp_path: Path) -> None:
    store = Store(tmp_path)
    uris = [None, "sqlite:////data/mlflow.db", "http://user:secret@mlflow:5000/team", "https://mlflow:5000"]
    for uri in uris:
        remember(store, "one", "run", keys(1), uri)
    assert [run.tracking_uri for run in past_runs(store)] == [*uris[:2], "http://mlflow:5000/team", uris[3]]


def test_a_run_is_unfinished_until_one_of_its_recipe_has_ended(tmp_path: Path) -> None:
    store = Store(tmp_path)
    begin(store, "one", "run", keys(1, 2), None)
    begin(store, "two", "run", keys(3), None)
    assert [(run.recipe, run.ended) for run in unfinished_runs(store)] == [("one", None), ("two", None)]
    assert past_runs(store) == []
    remember(store, "one", "run", keys(1), None)
    assert [run.recipe for run in unfinished_runs(store)] == ["two"]


def test_what_passed_the_gate_stays_so_while_only_runs_come_after_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    one, other = (Key("merge", "ta", {"stage": "merge", "weight": weight}) for weight in (0.1, 0.2))
    remember(store, "tiny", "run", [one], None)
    assert not has_passed(store, "tiny", [one], "gate")
    remember(store, "tiny", "refresh", [one], None, "gate")
    remember(store, "tiny", "run", [one], None)
    assert has_passed(store, "tiny", [one], "gate")
    assert not has_passed(store, "tiny", [one], "another gate")
    assert not has_passed(store, "tiny", [other], "gate")
    remember(store, "tiny", "refresh", [other], None, "gate")
    assert not has_passed(store, "tiny", [one], "gate")
