"""Plans that are kept: said again without torch, and never believed once anything is different."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sensmerge.pipeline.plan import kept
from sensmerge.pipeline.plan.models import hash_models, list_models
from sensmerge.pipeline.plan.plan import Plan, make_plan, plan_table
from sensmerge.pipeline.recipe.load import load_recipe
from sensmerge.pipeline.store.store import Store
from tests.conftest import command_line, make_llama, perturbed, write_recipe, write_rows

Save = Callable[..., Path]
Recipe = dict[str, Any]


def planned(folder: Path, recipe: Recipe) -> Plan:
    """The plan of a recipe in a store beside it."""
    path = write_recipe(folder, recipe)
    loaded, store = load_recipe(path), Store(folder / "store")
    store.make()
    listings = hash_models(list_models(loaded, folder, store.hub_cache), store.hub_cache)
    return make_plan(loaded, folder, store, listings)


def done(folder: Path, recipe: Recipe) -> Plan:
    """A plan whose steps have all been done."""
    plan = planned(folder, recipe)
    for step in plan.steps:
        plan.store.partial(step.key).mkdir(parents=True)
        plan.store.publish(step.key, {"result": {}})
    return planned(folder, recipe)


def found(folder: Path, recipe: Recipe) -> kept.KeptPlan | None:
    loaded, store = load_recipe(write_recipe(folder, recipe)), Store(folder / "store")
    return kept.find(loaded, folder, store, list_models(loaded, folder, store.hub_cache))


def keep(plan: Plan, folder: Path) -> None:
    kept.keep(plan, folder, kept.inputs_digest(plan.recipe, folder, plan.store, plan.inputs.listings))


def text(table: object) -> str:
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


@pytest.fixture
def settled(llama_recipe: Recipe, save: Save, tmp_path: Path) -> Recipe:
    """A recipe with models and rows of its own, old enough for digests to be kept, whose plan is kept."""
    llama_recipe["base"] = str(save(make_llama(), "base", tmp_path))
    for seed, name in enumerate(("math", "code")):
        llama_recipe["experts"][name]["model"] = str(save(perturbed(make_llama(), seed + 7), name, tmp_path))
    for path in tmp_path.rglob("*"):
        if path.is_file():
            os.utime(path, (10**9, 10**9))
    plan = done(tmp_path, llama_recipe)
    assert not plan.todo
    keep(plan, tmp_path)
    assert found(tmp_path, llama_recipe) is not None
    return llama_recipe


def test_it_says_what_the_plan_says(settled: Recipe, tmp_path: Path) -> None:
    one = found(tmp_path, settled)
    assert one is not None
    plan = planned(tmp_path, settled)
    assert text(kept.kept_table(one)) == text(plan_table(plan))
    assert one.lines == list(plan.inputs.notes)
    assert [key.fingerprint for key in one.step_keys()] == [step.key.fingerprint for step in plan.steps]


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change a file and keep its modification time; its inode is another, as that of any file put in its place."""
    stat = path.stat()
    other = path.with_name(f"{path.name}.other")
    other.write_bytes(change(path.read_bytes()))
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(path)


def model_file(recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(Path(recipe["experts"]["math"]["model"]) / "model.safetensors", lambda old: old[:-1] + bytes([old[-1] ^ 1]))


def config(recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(Path(recipe["experts"]["math"]["model"]) / "config.json", lambda old: old + b" ")


def rows(recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(folder / "math.jsonl", lambda old: old.replace(b"1", b"2", 1))


def setting(recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe["merges"]["ta"]["weight"] = 0.123


def gate(recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe["gate"] = {"tolerance": 0.5}


def library(recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "version", lambda name: "0.0" if name == "transformers" else "1.0")


def source(recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "rooms").mkdir()
    (folder / "rooms" / "new.py").write_text("")
    monkeypatch.setattr(kept, "rooms", lambda: [folder / "rooms"])


def plugin(recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "entry_points", lambda group: ["median = my_package.median"])


def manifest(recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    next((folder / "store" / "merge").glob("*/manifest.json")).unlink()


def damage(recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = next((folder / "store" / "merge").glob("*/fingerprint.json"))
    path.write_bytes(path.read_bytes().replace(b"1", b"2"))


def kept_file(recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    next((folder / "store" / "plans").iterdir()).write_bytes(b'{"made_from": 5')


def record(recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = next((folder / "store" / "plans").iterdir())
    path.write_text(json.dumps(json.loads(path.read_text()) | {"recorded": {"report": 5}}))


@pytest.mark.parametrize(
    "change",
    [model_file, config, rows, setting, gate, library, source, plugin, manifest, damage, kept_file, record],
    ids=lambda change: change.__name__,
)
def test_nothing_stale_is_believed(
    change: Callable[[Recipe, Path, pytest.MonkeyPatch], None],
    settled: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    change(settled, tmp_path, monkeypatch)
    assert found(tmp_path, settled) is None


def test_what_a_run_has_found_stays_with_its_plan(settled: Recipe, tmp_path: Path) -> None:
    plan = planned(tmp_path, settled)
    made_from = kept.inputs_digest(plan.recipe, tmp_path, plan.store, plan.inputs.listings)
    recorded = kept.Recorded({"recipe": "tiny"}, None, "0123")
    kept.keep(plan, tmp_path, made_from, recorded)
    keep(plan, tmp_path)
    one = found(tmp_path, settled)
    assert one is not None
    assert one.recorded == recorded
    settled["merges"]["ta"]["weight"] = 0.4
    keep(done(tmp_path, settled), tmp_path)
    other = found(tmp_path, settled)
    assert other is not None
    assert other.recorded is None


def test_what_changes_while_steps_run_is_not_tied_to_their_plan(settled: Recipe, tmp_path: Path) -> None:
    (tmp_path / "store" / "plans" / "tiny.json").unlink()
    plan = planned(tmp_path, settled)
    before = kept.inputs_digest(plan.recipe, tmp_path, plan.store, plan.inputs.listings)
    rewrite(tmp_path / "math.jsonl", lambda old: old.replace(b"1", b"2", 1))
    kept.keep(plan, tmp_path, before)
    assert found(tmp_path, settled) is None


def test_the_order_of_experts_counts(settled: Recipe, tmp_path: Path) -> None:
    settled["experts"] = dict(reversed(settled["experts"].items()))
    assert planned(tmp_path, settled).todo
    assert found(tmp_path, settled) is None


def test_rows_that_a_pattern_finds_anew(settled: Recipe, tmp_path: Path) -> None:
    settled["tasks"]["math"]["calibration"]["data_files"] = "math*.jsonl"
    plan = done(tmp_path, {**settled, "merges": {"x": {"method": "linear"}}})
    keep(plan, tmp_path)
    recipe = {**settled, "merges": {"x": {"method": "linear"}}}
    assert found(tmp_path, recipe) is not None
    write_rows(tmp_path / "math-more.jsonl", [{"prompt": "9+9=", "completion": "18"}])
    assert found(tmp_path, recipe) is None


def test_what_has_something_left_to_do_is_not_kept(llama_recipe: Recipe, tmp_path: Path) -> None:
    keep(planned(tmp_path, llama_recipe), tmp_path)
    assert not (tmp_path / "store" / "plans").exists()


def test_rows_of_the_hub_are_not_kept(settled: Recipe, tmp_path: Path) -> None:
    loaded = load_recipe(write_recipe(tmp_path, settled))
    evaluation = getattr(loaded.tasks["math"], "evaluation")  # noqa: B009 (a kind without rows has none)
    hub = evaluation.model_copy(update={"path": "team/math", "data_files": None})
    task = loaded.tasks["math"].model_copy(update={"evaluation": hub})
    other = loaded.model_copy(update={"tasks": {**loaded.tasks, "math": task}})
    store = Store(tmp_path / "store")
    assert kept.find(other, tmp_path, store, list_models(other, tmp_path, store.hub_cache)) is None


def test_the_command_says_it_without_torch(settled: Recipe, tmp_path: Path) -> None:
    program = (
        "import json, sys\nfrom pathlib import Path\nfrom rich.console import Console\n"
        "from sensmerge.pipeline.start import print_plan\nfrom sensmerge.pipeline.store.store import Store\n"
        "print_plan(Path('recipe.yaml'), (), Store.open('store'), Console())\n"
        "print(json.dumps([name for name in ('torch', 'transformers', 'ray', 'mlflow') if name in sys.modules]))"
    )
    path = {"PYTHONPATH": str(Path(__file__).parents[3])}
    said = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=os.environ | path, check=True, capture_output=True, text=True
    ).stdout
    assert "all 18 steps are in the store" in said
    assert json.loads(said.splitlines()[-1]) == []


def test_a_store_that_may_only_be_read(settled: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(kept, "write_json", refused)
    keep(planned(tmp_path, settled), tmp_path)
    assert command_line("plan", tmp_path / "recipe.yaml", "--store", tmp_path / "store") == 0
