"""Recipes run on a real Ray cluster, with a real MLflow database, on tiny models."""

import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.cluster_utils import Cluster
from ray.experimental import internal_kv
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from sensmerge.pipeline.execute import run as run_module
from sensmerge.pipeline.execute.cluster import cluster
from sensmerge.pipeline.execute.run import execute, step_line
from sensmerge.pipeline.execute.worker import Done, Spent
from sensmerge.pipeline.plan.plan import Plan
from sensmerge.pipeline.plan.step import Step
from sensmerge.pipeline.store.store import Key
from sensmerge.tasks.checkpoints.unchanged import PlannedModels
from sensmerge.tasks.errors import InputError, StepError
from sensmerge.tasks.stages import written
from sensmerge.tasks.stages.job import Job
from tests.conftest import command_line, plan_of, tiny_recipe, write_recipe
from tests.pipeline.execute.jobs import Die, DieOnce, Exchange, Fail, FillDisk, Flip, Write

pytestmark = pytest.mark.ray


def weights(folder: Path) -> dict[str, str]:
    """Return the sha256 of every weight file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}


def merged(store: Path, variant: str) -> Path:
    (folder,) = (path for path in (store / "merge").glob(f"{variant}-*") if len(path.name) == len(variant) + 9)
    return folder


def run(recipe: Path, store: Path, address: str, *more: object) -> dict[str, Any]:
    report = store.with_suffix(".json")
    assert command_line("run", recipe, "--store", store, "--address", address, "--report", report, *more) == 0
    found: dict[str, Any] = json.loads(report.read_text())
    return found


@pytest.fixture(scope="module")
def finished(
    llamas: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, ray_address: str
) -> tuple[Path, Path, dict[str, Any]]:
    """A recipe run to the end once: recipe, store, report."""
    folder = tmp_path_factory.mktemp("run")
    recipe = write_recipe(folder, tiny_recipe(llamas, folder))
    return recipe, folder / "store", run(recipe, folder / "store", ray_address)


def test_report_has_every_stage_model_and_score(finished: tuple[Path, Path, dict[str, Any]]) -> None:
    _, _, report = finished
    assert {stage["stage"] for stage in report["stages"]} == {
        *("download", "statistics", "cross_task", "merge", "evaluate")
    }
    assert all(stage["status"] == "run" and stage["peak_memory"] > 0 for stage in report["stages"])
    assert all(stage["pieces_run"] == stage["pieces"] > 0 for stage in report["stages"])
    models = ["base", "math", "code", "ta", "ties-sens"]
    assert list(report["models"]) == list(report["scores"]) == models
    for model in models:
        for task in ("math", "code"):
            for score in report["scores"][model][task].values():
                assert score["n"] == 6
                assert score["low"] <= score["value"] <= score["high"]
    means = {name: report["mean_normalised"][name]["value"] for name in ("ta", "ties-sens")}
    (other,) = means.keys() - {max(means, key=means.__getitem__)}
    behind = report["behind"]
    assert set(behind) == {other}
    assert behind[other]["value"] == pytest.approx(max(means.values()) - means[other])
    assert behind[other]["low"] <= behind[other]["value"] <= behind[other]["high"]
    assert behind[other]["n"] == 12
    layers = set(report["sigma"])
    assert "model.layers.0" in layers
    assert set(report["alpha"]["math"]) == layers
    assert all(sum(row.values()) == pytest.approx(1) for row in report["sigma"].values())
    assert sum(report["tau"].values()) == pytest.approx(1)
    assert report["distances"]["math"]["math"] == 0
    assert report["distances"]["math"]["code"] > 0


def test_merged_folder_is_an_ordinary_checkpoint(finished: tuple[Path, Path, dict[str, Any]]) -> None:
    folder = Path(finished[2]["models"]["ties-sens"])
    network = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generated = network.generate(**tokenizer("1+2=", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert generated.shape[1] == 7
    card = (folder / "README.md").read_text()
    for expected in ("base_model:", "- merge", "ties", "mean normalised", "density: 0.3", "n = 6"):
        assert expected in card


def test_again_everything_is_cached_and_ray_is_not_needed(finished: tuple[Path, Path, dict[str, Any]]) -> None:
    recipe, store, first = finished
    again = run(recipe, store, "no such cluster")
    assert {stage["status"] for stage in again["stages"]} == {"cached"}
    assert again["scores"] == first["scores"]


def test_only_what_depends_on_a_change_runs(finished: tuple[Path, Path, dict[str, Any]], ray_address: str) -> None:
    recipe, store, _ = finished
    report = run(recipe, store, ray_address, "--set", "merges.ta.weight=0.25")
    ran = {f"{stage['stage']} {stage['name']}" for stage in report["stages"] if stage["status"] == "run"}
    assert ran == {"merge ta", "evaluate ta/math", "evaluate ta/code"}


def test_runs_are_tracked(finished: tuple[Path, Path, dict[str, Any]]) -> None:
    _, store, report = finished
    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny")
    (parent, *_) = client.search_runs([experiment.experiment_id], "tags.role = 'recipe'", order_by=["start_time"])
    (child,) = client.search_runs(
        [experiment.experiment_id],
        f"tags.mlflow.parentRunId = '{parent.info.run_id}' AND tags.mlflow.runName = 'ties-sens'",
    )
    assert parent.data.tags["best"] in ("ta", "ties-sens")
    assert parent.data.metrics["steps/done"] == parent.data.metrics["steps/planned"] == len(report["stages"])
    assert parent.data.metrics["seconds/merge"] > 0
    assert (parent.info.end_time - parent.info.start_time) / 1000 > max(s["seconds"] for s in report["stages"])
    keys = {key for key in child.data.metrics if key.startswith("eval/")}
    assert keys == {"eval/math/token_accuracy", "eval/code/token_accuracy", "eval/mean_normalised"}
    took = sum(one["seconds"] for one in report["stages"] if one["name"].partition("/")[0] == "ties-sens")
    assert (child.info.end_time - child.info.start_time) / 1000 == pytest.approx(took, abs=0.002)
    assert child.data.metrics["eval/math/token_accuracy"] == pytest.approx(
        report["scores"]["ties-sens"]["math"]["token_accuracy"]["value"]
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_weights_do_not_depend_on_the_number_of_workers(
    finished: tuple[Path, Path, dict[str, Any]],
    tmp_path: Path,
    ray_address: str,
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(written, "GROUP_BYTES", 1)  # every layer is a group, as in a large model
    recipe, store, _ = finished
    stages = ("statistics", "merge")
    limits = [f"resources.{stage}.max_in_flight={workers}" for stage in stages]
    run(recipe, tmp_path / "store", ray_address, *(word for limit in limits for word in ("--set", limit)))
    assert weights(merged(tmp_path / "store", "ties-sens")) == weights(merged(store, "ties-sens"))


def test_killed_while_merging_and_started_again(
    finished: tuple[Path, Path, dict[str, Any]], tmp_path: Path, ray_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, finished_store, _ = finished
    store = tmp_path / "store"
    driver = (
        "import sys\n"
        "from sensmerge.tasks.stages import written\n"
        "written.GROUP_BYTES = 1\n"
        "from sensmerge.pipeline.cli import main\n"
        "main()\n"
    )
    one_by_one = ["--set", "resources.merge.max_in_flight=1"]
    arguments = ["run", recipe, "--store", store, *one_by_one]
    killed = subprocess.Popen(
        [sys.executable, "-c", driver, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    # This variant comes after all that sens coefficients need; the other one does not.
    while not list(store.glob("merge/ties-sens-*.partial/.group-*.json")):
        assert killed.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not list(store.glob("merge/*/manifest.json")) or list(store.glob("merge/*.partial"))
    monkeypatch.setattr(written, "GROUP_BYTES", 1)
    report = run(recipe, store, ray_address, *one_by_one)
    status = {f"{stage['stage']} {stage['name']}": stage["status"] for stage in report["stages"]}
    assert status["statistics math"] == "cached"
    (record,) = (stage for stage in report["stages"] if (stage["stage"], stage["name"]) == ("merge", "ties-sens"))
    assert record["status"] == "run"
    assert record["pieces"] == 5
    assert 0 < record["pieces_run"] < record["pieces"], "only what was not done before"
    assert weights(merged(store, "ties-sens")) == weights(merged(finished_store, "ties-sens"))


def test_a_node_lost_while_merging(
    finished: tuple[Path, Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, _, undisturbed = finished
    store = tmp_path / "store"
    monkeypatch.setattr(written, "GROUP_BYTES", 1)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        first, _ = (cluster.add_node(num_cpus=1) for _ in range(2))
        removed: list[Path] = []

        def remove() -> None:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline and not removed:
                merging = list(store.glob("merge/*.partial/.group-*.json"))
                if merging:
                    cluster.remove_node(first, allow_graceful=False)
                    removed.extend(merging)
                time.sleep(0.005)

        thread = threading.Thread(target=remove)
        thread.start()
        report = run(recipe, store, cluster.address)
        thread.join()
    finally:
        cluster.shutdown()
    assert removed, "the run ended before the node was removed"
    assert {stage["status"] for stage in report["stages"]} == {"run"}
    for variant in ("ta", "ties-sens"):
        assert weights(Path(report["models"][variant])) == weights(Path(undisturbed["models"][variant]))


def test_a_recipe_without_tasks_needs_no_data(
    llamas: dict[str, Path], tmp_path: Path, ray_address: str, llama_recipe: dict[str, Any]
) -> None:
    del llama_recipe["tasks"]
    llama_recipe["merges"] = {"soup": {"method": "linear"}}
    report = run(write_recipe(tmp_path, llama_recipe), tmp_path / "store", ray_address)
    assert report["scores"] == report["mean_normalised"] == {}
    soup, *experts = (
        AutoModelForCausalLM.from_pretrained(folder).model.norm.weight
        for folder in (report["models"]["soup"], llamas["math"], llamas["code"])
    )
    torch.testing.assert_close(soup, sum(experts) / 2)


def test_more_than_any_node_has(
    llama_recipe: dict[str, Any],
    tmp_path: Path,
    ray_address: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = write_recipe(tmp_path, llama_recipe)
    arguments = ("--store", tmp_path / "store", "--address", ray_address, "--set", "resources.evaluate.num_gpus=8")
    assert command_line("run", recipe, *arguments) == 2
    asked = "resources.evaluate: a step asks for 1 CPUs and 8 GPUs, the largest node has"
    assert asked in capsys.readouterr().err

    # Nodes may be on their way.
    monkeypatch.setattr(run_module, "LOOK_AGAIN", 0.2)
    assert command_line("run", recipe, *arguments, "--wait", 1) == 2
    said = capsys.readouterr()
    assert said.out.count(f" s more: {asked}") in range(2, 6)
    assert said.out.count("waiting for nodes, 1 s more") >= 1
    assert asked in said.err
    with cluster(ray_address):  # an autoscaler was asked for them, and then no more
        assert internal_kv._internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL) == b"[]"


def test_what_an_autoscaler_is_asked_for(llama_recipe: dict[str, Any], tmp_path: Path) -> None:
    """One worker of each size, and all actors of a step: more comes as work waits for it."""
    llama_recipe["resources"] = {"merge": {"num_cpus": 4}, "statistics": {"num_cpus": 2, "accelerator_type": "H100"}}
    llama_recipe["resources"]["merge"]["resources"] = {"fast_disk": 0.5}
    llama_recipe["placement"] = {"actors": 2}
    plan = plan_of(tmp_path, llama_recipe)
    asked = run_module._least_room(plan, list(plan.steps))
    actors, merge = {"CPU": 2.0, "accelerator_type:H100": 0.001}, {"CPU": 4.0, "fast_disk": 0.5}
    assert sorted(asked, key=str) == [*[{"CPU": 1.0}] * 2, *[actors] * 2, merge]


def test_nan_in_an_expert_stops_the_run_before_a_merge_is_published(
    llama_recipe: dict[str, Any],
    llamas: dict[str, Path],
    tmp_path: Path,
    ray_address: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    network = AutoModelForCausalLM.from_pretrained(llamas["math"])
    network.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    network.save_pretrained(tmp_path / "broken")
    del llama_recipe["tasks"]
    llama_recipe["merges"] = {"ta": {"method": "task_arithmetic"}}
    llama_recipe["experts"]["math"]["model"] = "broken"
    recipe = write_recipe(tmp_path, llama_recipe)
    capsys.readouterr()  # what was printed while the model was made
    assert command_line("run", recipe, "--store", tmp_path / "store", "--address", ray_address) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "experts.math: tensor model.layers.1.mlp.up_proj.weight" in error
    assert "1 NaN or Inf" in error
    client = MlflowClient(f"sqlite:///{tmp_path / 'store' / 'mlflow.db'}")
    (recorded,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert (recorded.info.status, recorded.data.tags["reason"]) == ("FAILED", error.removeprefix("error: ").strip())
    assert not list((tmp_path / "store" / "merge").glob("*/manifest.json"))


def one_step(job: Job, llama_recipe: dict[str, Any], tmp_path: Path) -> Plan:
    """A plan with nothing but one step that does this job."""
    step = Step("work", Key.of("work", job), (), job)
    plan = plan_of(tmp_path, llama_recipe)
    return replace(plan, steps=(step,), todo={step.title: "new"})


def test_a_worker_that_dies_is_replaced(llama_recipe: dict[str, Any], tmp_path: Path, ray_address: str) -> None:
    plan = one_step(DieOnce(), llama_recipe, tmp_path)
    execute(plan, ray_address, Console(quiet=True))
    manifest = plan.store.manifest(plan.steps[0].key)
    assert manifest is not None
    assert manifest["result"]["pid"] > 0


def test_a_worker_that_keeps_dying_stops_the_run(
    llama_recipe: dict[str, Any], tmp_path: Path, ray_address: str
) -> None:
    plan = one_step(Die(), llama_recipe, tmp_path)
    with pytest.raises(StepError, match="download work: its worker died 2 times"):
        execute(plan, ray_address, Console(quiet=True))


def test_a_worker_that_runs_out_of_memory_again_stops_the_run(llama_recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, llama_recipe))
    command = [sys.executable, "-m", "pipeline", "run", recipe, "--store", str(tmp_path / "store")]
    # Ray's memory monitor takes this machine for full, whatever runs.
    full = {"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "50"}
    done = subprocess.run(
        [*command, "--address", "local"],
        env=os.environ | full,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert re.search(r"download \w+: its worker ran out of memory 2 times; raise resources\.download\.", done.stderr)


def test_an_exception_is_final_and_leaves_no_artifact(
    llama_recipe: dict[str, Any], tmp_path: Path, ray_address: str
) -> None:
    plan = one_step(Fail(), llama_recipe, tmp_path)
    with pytest.raises(StepError, match=r"download work failed: .*broken on purpose") as raised:
        execute(plan, ray_address, Console(quiet=True))
    node, log = re.findall(r"^on (.*); its log: (.*)$", str(raised.value), re.MULTILINE)[0]
    assert node == platform.node()
    assert Path(log).is_file()
    assert (tmp_path / "store" / "download" / "calls").read_text() == "x"
    assert plan.store.manifest(plan.steps[0].key) is None


def test_a_full_disk_is_told_of_in_one_line(llama_recipe: dict[str, Any], tmp_path: Path, ray_address: str) -> None:
    plan = one_step(FillDisk(), llama_recipe, tmp_path)
    with pytest.raises(StepError) as raised:
        execute(plan, ray_address, Console(quiet=True))
    (step,) = plan.steps
    where = plan.store.partial(step.key) / "weights"
    way_out = "make room on it, and run again: what is done is kept"
    assert str(raised.value) == f"download work: {where}: No space left on device; {way_out}"


def test_a_model_that_changes_meanwhile_ends_the_run(
    llama_recipe: dict[str, Any], llamas: dict[str, Path], tmp_path: Path, ray_address: str
) -> None:
    llama_recipe["experts"]["math"]["model"] = str(shutil.copytree(llamas["math"], tmp_path / "math"))
    plan = one_step(Exchange(tmp_path / "math"), llama_recipe, tmp_path)
    (step,) = plan.steps
    models = PlannedModels((plan.inputs.listings["math"],), plan.store.hub_cache)
    with pytest.raises(InputError, match=r"math: config\.json changed after it was planned; run again"):
        execute(replace(plan, steps=(replace(step, models=models),)), ray_address, Console(quiet=True))
    assert plan.store.manifest(step.key) is None


def test_what_the_run_has_made_is_read_through_before_a_step_reads_it(
    llama_recipe: dict[str, Any], tmp_path: Path, ray_address: str
) -> None:
    plan = one_step(Write("made"), llama_recipe, tmp_path)
    (made,) = plan.steps
    folder = plan.store.folder(made.key)
    flip, reader = Flip(folder / "text"), Write("read")
    steps = (
        made,
        Step("flip", Key.of("flip", flip), (made.title,), flip),
        Step("reader", Key.of("reader", reader), (made.title, "download flip"), reader),
    )
    plan = replace(plan, steps=steps, todo={step.title: "new" for step in steps})
    with pytest.raises(InputError) as raised:
        execute(plan, ray_address, Console(quiet=True))
    wrong = f"download work: text has other content in {folder}"
    assert str(raised.value) == f"{wrong}, changed during this run; run again, which makes it again"
    # To the next plan it is absent.
    assert [plan.store.manifest(step.key) is not None for step in steps] == [False, True, False]


def test_every_step_that_reads_models_is_tied_to_them(llama_recipe: dict[str, Any], tmp_path: Path) -> None:
    llama_recipe["merges"] |= {"ta-se": {"method": "task_arithmetic", "weight": 0.5, "application": {"kind": "se"}}}
    plan = plan_of(tmp_path, llama_recipe)
    found = {step.title: [one.folder.name for one in step.models.listings] for step in plan.steps}
    every = ["base", "math", "code"]
    assert found["merge ta"] == found["merge ties-sens"] == found["merge ta-se"] == found["cross_task all"] == every
    assert found["statistics code"] == ["base", "code"]
    assert found["evaluate math/code"] == ["math", "base"]
    assert found["evaluate ta/code"] == ["base"]  # its tokenizer
    assert found["download base"] == found["route ta-se"] == []


def test_a_step_is_told_of_in_one_line(llama_recipe: dict[str, Any], tmp_path: Path) -> None:
    step = plan_of(tmp_path, llama_recipe).step("merge", "ta")
    spent = Spent(seconds=2.34, peak_memory=1_500_000_000, pieces=4, pieces_run=3)
    result = {"tensors": 20, "tensor_bytes": 4_000_000, "taken_over": 17, "taken_over_bytes": 3_000_000}
    assert step_line(step, Done(result, spent, 5_000_000, "worker-1")) == (
        f"merge ta ({step.key.fingerprint[:8]}) on worker-1: 2.3 s, 5.0 MB, 1.5 GB peak memory, "
        "3 of 4 pieces, the others were done before, 17 of 20 tensors taken over (3.0 MB of 4.0 MB)"
    )
