"""Which placement is chosen, and what the plan says of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline import placement
from pipeline.placement import whole_bytes
from tasks.artifacts import read_json
from tasks.coefficients import alpha
from tasks.datasets import CompletionTask, DataSource
from tasks.errors import InputError
from tasks.models.expert import open_base
from tasks.models.placement import Actors
from tasks.rows import load_rows
from tasks.sensitivity import sensitivity
from tests.conftest import command_line, plan_of, write_recipe

Recipe = dict[str, Any]


def test_auto_goes_by_the_memory_of_a_worker(
    llama_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    needed = whole_bytes(plan_of(tmp_path, llama_recipe).inputs.base, torch.float32, 6, gradients=True)
    cases = ((8 * needed, 4, "whole"), (8 * needed - 4, 4, "streamed"), (2 * needed, 1, "whole"))
    for memory, at_once, expected in cases:
        monkeypatch.setattr(placement, "machine_memory", lambda memory=memory: memory)
        plan = plan_of(tmp_path, llama_recipe, f"resources.sensitivity.max_in_flight={at_once}")
        found = plan.placements["sensitivity"]
        assert found.placement == expected
        assert f"{at_once} at once" in found.why
        kept = plan.step("sensitivity", "math").writes
        assert (kept > 0) == (expected == "streamed")


def test_a_whole_network_with_its_activations(llamas: dict[str, Path]) -> None:
    base = open_base(llamas["base"])
    weights = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(llamas["base"]).parameters())
    blocks = 2 * (2 * 64 + 2 * 48 + 3 * 80)  # q and o, k and v, the three of the MLP; rows + columns
    expected = 4 * (weights + 259 * 32 + 10 * blocks) + 3 * 10 * 259 * 4
    assert whole_bytes(base, torch.float32, 10, gradients=True) == expected
    assert whole_bytes(base, torch.bfloat16, 10, gradients=False) == 2 * (weights + 10 * 80) + 3 * 10 * 259 * 4


def test_plan_says_what_and_why(
    llama_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    recipe = write_recipe(tmp_path, llama_recipe)

    def said(*more: str) -> str:
        assert command_line("plan", recipe, "--store", tmp_path / "store", *more) == 0
        return " ".join(capsys.readouterr().out.split())

    assert "sensitivity runs whole (auto: a whole network with the activations of 6 tokens takes" in said()
    assert "cross_task runs streamed (as the recipe says)" in said("--set", "placement=streamed")
    assert "sensitivity runs {actors: 2} (as the recipe says)" in said("--set", "placement.actors=2")
    del llama_recipe["merges"]["ties-sens"]
    write_recipe(tmp_path, llama_recipe)
    assert " runs " not in said()


def test_actors_have_the_resources_of_the_stage(llama_recipe: Recipe, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, llama_recipe, "placement={actors: 2}", "resources.cross_task.num_cpus=3")
    assert plan.placements["sensitivity"].placement == Actors(2, 1, 0)
    assert plan.placements["cross_task"].placement == Actors(2, 3, 0)
    assert {step.actors for step in plan.steps if step.stage in ("sensitivity", "cross_task")} == {2}
    assert {step.actors for step in plan.steps if step.stage in ("merge", "evaluate")} == {0}


@pytest.mark.parametrize("setting", ["streamed", "whole", "{actors: 2}"])
def test_no_result_depends_on_the_placement(setting: str, llama_recipe: Recipe, tmp_path: Path) -> None:
    before, after = plan_of(tmp_path, llama_recipe), plan_of(tmp_path, llama_recipe, f"placement={setting}")
    assert [step.key.fingerprint for step in before.steps] == [step.key.fingerprint for step in after.steps]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("disk", r"placement: expected auto, whole, streamed or {actors: N}, N at least 1 \(found 'disk'\)"),
        ("{actor: 2}", r"placement: expected .* N at least 1 \(found {'actor': 2}\)"),
        ("{actors: 0}", r"placement: expected .* N at least 1 \(found {'actors': 0}\)"),
        ("{actors: 3}", r"placement\.actors is 3; the base has 2 blocks, .* set it to 2 at most"),
    ],
)
def test_bad_placements(setting: str, message: str, llama_recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        plan_of(tmp_path, llama_recipe, f"placement={setting}")


def sens_only(recipe: Recipe) -> Recipe:
    """Leave out what does not need a placement."""
    del recipe["merges"]["ta"]
    for task in recipe["tasks"].values():
        del task["evaluation"]
    return recipe


@pytest.mark.ray
def test_a_run_with_actors(llama_recipe: Recipe, llamas: dict[str, Path], tmp_path: Path, ray_address: str) -> None:
    """Every step with actors takes all CPUs of the cluster, and several are ready at once: none waits for ever."""
    recipe = write_recipe(tmp_path, sens_only(llama_recipe))
    arguments = ("--store", tmp_path / "store", "--address", ray_address, "--report", tmp_path / "report.json")
    assert command_line("run", recipe, *arguments, "--set", "placement={actors: 2}") == 0
    report = read_json(tmp_path / "report.json")
    source = DataSource(path="json", data_files="math.jsonl", samples=3)
    rows = load_rows(source, "tasks.math.calibration", tmp_path).rows
    task = CompletionTask(kind="completion")
    base = llamas["base"]
    sensitivity(base, llamas["math"], "math", task, rows, base, "float32", "cpu", "whole", tmp_path)
    whole = alpha(read_json(tmp_path / "sensitivity.json")["sensitivity"])
    assert report["alpha"]["math"] == pytest.approx(whole, rel=1e-5)


@pytest.mark.ray
def test_more_actors_than_the_cluster_has_room_for(
    llama_recipe: Recipe, tmp_path: Path, ray_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, sens_only(llama_recipe))
    more = ("--set", "placement={actors: 2}", "--set", "resources.cross_task.num_cpus=2")
    assert command_line("run", recipe, "--store", tmp_path / "store", "--address", ray_address, *more) == 2
    expected = "placement.actors is 2; the cluster has room for 1 with 2 CPUs and 0 GPUs each (resources.cross_task)"
    assert expected in capsys.readouterr().err
