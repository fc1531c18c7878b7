"""A merge whose shards several machines make and send, on a store at a URL."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sensmerge.pipeline.execute.pieces import Around, Pieces, Running, prepared
from sensmerge.pipeline.execute.united import bundles_of, run_send, run_unite
from sensmerge.pipeline.execute.worker import Done, Spent, run_finish, run_part
from sensmerge.pipeline.plan.models import list_models
from sensmerge.pipeline.plan.plan import Plan, make_plan
from sensmerge.pipeline.plan.step import Step
from sensmerge.pipeline.recipe.load import load_recipe
from sensmerge.pipeline.store import sent
from sensmerge.pipeline.store.garbage import delete, find_garbage
from sensmerge.pipeline.store.store import Store
from sensmerge.tasks.checkpoints import url
from sensmerge.tasks.errors import InputError
from tests.conftest import make_adapter, make_llama, tiny_recipe, write_recipe

URLS = "urls"


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """All weights at URLs count as large; the caches of machines are below tmp_path."""
    monkeypatch.setattr(url, "LARGE", 1)
    monkeypatch.setenv("SENSMERGE_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def recipe(llamas: dict[str, Path], tmp_path: Path) -> dict[str, Any]:
    """A merge into several shards of models at URLs, one of them an adapter."""
    found = tiny_recipe(llamas, tmp_path)
    found["base"] = llamas["base"].as_uri()
    adapter = make_adapter(make_llama(), tmp_path / "adapter", 3)
    places = {"math": llamas["math"], "code": adapter}
    found["experts"] = {name: {"model": folder.as_uri()} for name, folder in places.items()}
    found["merges"] = {"ta": {"method": "task_arithmetic", "weight": 0.5, "shard_size": 30_000}}
    del found["tasks"]
    return found


def planned(recipe: dict[str, Any], tmp_path: Path, name: str) -> tuple[Plan, Step]:
    """The plan with a store of a name, its downloads done, and the merge."""
    loaded, store = load_recipe(write_recipe(tmp_path, recipe), ()), Store.open(f"file://{tmp_path}/{name}")
    store.make()
    plan = make_plan(loaded, tmp_path, store, list_models(loaded, tmp_path, store.hub_cache))
    for step in plan.steps:
        if step.stage == "download":
            run_finish(step.job, plan.store, step.key, Spent(), 1)
    (step,) = [step for step in plan.steps if step.stage == "merge"]
    return plan, step


def forget_models(plan: Plan) -> None:
    """Have this machine be another one, as far as models are concerned."""
    shutil.rmtree(plan.store.hub_cache / URLS)


def do_bundle(plan: Plan, step: Step, bundle: sent.Bundle) -> None:
    """Do a bundle; none of its pieces has what others read."""
    job = prepared(step, plan.store)
    partial = plan.store.partial(step.key, bundle.number)
    for part in bundle.parts:
        forget_models(plan)
        run_part(job, part, partial, 1, step.models)
    run_send(job, plan.store, step.key, bundle, 1)
    assert not partial.exists()


def unite(plan: Plan, step: Step) -> Done:
    forget_models(plan)
    return run_unite(prepared(step, plan.store), plan.store, step.key, Spent(), 1, step.models)


def at(folder: Path) -> dict[str, bytes]:
    """The files of an artifact but for its manifest, which says when it was made."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".synced"}
    assert found.pop("manifest.json")
    return found


def place_of(plan: Plan, step: Step) -> Path:
    assert plan.store.remote is not None
    return Path(plan.store.remote.url.removeprefix("file://")) / plan.store.path_of(plan.store.folder(step.key))


@pytest.fixture
def alone(recipe: dict[str, Any], tmp_path: Path) -> dict[str, bytes]:
    """What one machine makes."""
    plan, step = planned(recipe, tmp_path, "alone")
    job = prepared(step, plan.store)
    for part in job.parts():
        run_part(job, part, plan.store.partial(step.key), 1, step.models)
    run_finish(job, plan.store, step.key, Spent(), 1, step.models)
    return at(place_of(plan, step))


def test_machines_make_what_one_makes(recipe: dict[str, Any], alone: dict[str, bytes], tmp_path: Path) -> None:
    plan, step = planned(recipe, tmp_path, "together")
    bundles = bundles_of(step.job, step.models)
    assert len(bundles) > 2
    for bundle in reversed(bundles):
        do_bundle(plan, step, bundle)
        plan.store.look()
        assert plan.store.manifest(step.key) is None
    done = unite(plan, step)
    assert at(place_of(plan, step)) == alone
    assert done.result["unchanged"] == []
    assert done.bytes == sum(map(len, alone.values())) - len(alone["fingerprint.json"])
    plan.store.look()
    assert plan.store.manifest(step.key) is not None
    assert unite(plan, step) == done  # its worker may have died before it could say so


def test_what_an_earlier_run_sent_is_not_made_again(recipe: dict[str, Any], tmp_path: Path, ray_here: None) -> None:
    plan, step = planned(recipe, tmp_path, "together")
    first, *others = bundles_of(step.job, step.models)
    do_bundle(plan, step, first)
    plan, step = planned(recipe, tmp_path, "together")  # this one has no open files
    state = Running.begin("run", step, plan.store, plan.steps, apart=True)
    assert [one.bundle for one in state.bundles] == others
    assert state.spent == Spent(pieces=len(first.parts))
    taken = []
    while (one := state.take(2)) is not None:
        taken.append(one)
    assert [(strand.bundle, piece) for strand, piece in taken] == [(one, Around.CHECK) for one in others[:2]]


def test_a_node_has_files_of_so_many_bundles(recipe: dict[str, Any], tmp_path: Path, ray_here: None) -> None:
    plan, step = planned(recipe, tmp_path, "together")
    state = Running.begin("run", step, plan.store, plan.steps, apart=True)
    for strand, piece in [taken for _ in range(2) if (taken := state.take(2))]:
        strand.ended(piece, Done({}, Spent()))
        strand.node = "one"
    assert state.nodes_of_files() == []
    taken = []
    while (one := state.take(2, {"one"} if taken else ())) is not None:
        taken.append(one)
    first, second = state.bundles[:2]
    assert {id(strand) for strand, _ in taken} == {id(first)}
    assert state.nodes_of_files() == ["one"]
    for _, piece in taken:
        first.ended(piece, Done({}, Spent()))
    assert state.take(2, {"one"}) == (first, Around.SEND)
    first.ended(Around.SEND, Done({}, Spent()))
    assert state.nodes_of_files() == []
    state.bundles.reverse()  # where none may begin, those that have begun go on all the same
    assert state.take(0) == (second, second.bundle and second.bundle.parts[0])


def test_a_bundle_begins_again_alone(recipe: dict[str, Any], tmp_path: Path, ray_here: None) -> None:
    plan, step = planned(recipe, tmp_path, "together")
    pieces = Pieces([step], plan.store, {"merge": 2}, plan.steps, lambda: True)
    (state, first, check), (_, second, _) = pieces.take()
    pieces.piece_done(state, first, check, Done({}, Spent(), node_id="one"))
    assert first.node == "one"
    ((_, _, part),) = pieces.take()
    assert part == 0
    pieces.begin_again(state, first, 1)
    ((_, again, check),) = pieces.take()
    assert (again.bundle, again.nodes_lost, again.node, check) == (first.bundle, 1, None, Around.CHECK)
    assert state.bundles[:2] == [again, second]


@pytest.mark.parametrize("change", ["a shard is gone", "a shard is another one", "the receipt is cut"])
def test_what_was_sent_is_looked_at(change: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    plan, step = planned(recipe, tmp_path, "together")
    bundles = bundles_of(step.job, step.models)
    for bundle in bundles:
        do_bundle(plan, step, bundle)
    receipt, shard = place_of(plan, step) / bundles[0].name, min(place_of(plan, step).glob("*.safetensors"))
    if change == "a shard is gone":
        shard.unlink()
    elif change == "a shard is another one":
        shard.write_bytes(shard.read_bytes() + b"0")
    else:
        receipt.write_bytes(receipt.read_bytes()[:100])
    with pytest.raises(InputError, match=rf"merge ta: {bundles[0].name} is not at file://.*or files that it names"):
        unite(plan, step)
    do_bundle(plan, step, bundles[0])
    unite(plan, step)


def test_what_is_left_of_a_merge_is_garbage(recipe: dict[str, Any], tmp_path: Path) -> None:
    plan, step = planned(recipe, tmp_path, "together")
    do_bundle(plan, step, bundles_of(step.job, step.models)[0])
    (place_of(plan, step) / ".bundle-0.json").unlink()  # a large file alone is nothing that is seen here
    shutil.rmtree(plan.store.root / "merge")
    store = Store.open(str(plan.store))
    store.look()
    garbage = find_garbage(store, [f"download/{path.name}" for path in (store.root / "download").iterdir()])
    assert [folder.name for folder in garbage.folders] == [store.folder(step.key).name]
    delete(store, garbage)
    assert not place_of(plan, step).exists()
