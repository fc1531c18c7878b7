"""A Llama 70B and three experts on 8 nodes of 8 GPUs: on paper, and the largest pieces of the work for real.

    python -m tests.benchmarks.large_cluster paper [--nodes 8] [--gigabytes-per-second 3]
    python -m tests.benchmarks.large_cluster block WORK

`paper` plans the recipe of `plan_large` from the headers of sparse models. It prints what that takes, and of every
stage the steps, their pieces, the bytes that all of them read and write, the most that one node does, and the time that
follows where each node reads and writes at the stated speed. `block` makes models of one block of full width below
WORK, merges them for real, and takes the sensitivity of blocks that are shortened to a narrow feed-forward part, shared
out among two actors.
"""

import argparse
import math
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from sensmerge.pipeline.plan.models import list_models
from sensmerge.pipeline.plan.plan import Plan, make_plan
from sensmerge.pipeline.plan.step import Step
from sensmerge.pipeline.recipe.load import load_recipe
from sensmerge.pipeline.store.store import Store
from tests.benchmarks.memory import watched
from tests.benchmarks.merge_speed import ray_workers
from tests.benchmarks.plan_large import EXPERTS, LARGE, make_recipe
from tests.benchmarks.plan_large import planned as run_plan
from tests.benchmarks.synthetic import Size, make_model
from tests.conftest import make_tokenizer

BLOCK = Size(8192, 1, 28672, 64, 8, 512)
"""One block of a Llama 70B, and next to nothing else."""
SHORT = Size(8192, 2, 1024, 64, 8, 512)
"""Two blocks of its width whose feed-forward part is narrow."""

ON_GPUS = ["placement={actors: 8}", *(f"resources.{stage}.num_gpus=1" for stage in ("statistics", "cross_task"))]


def planned(folder: Path) -> Plan:
    """Return the plan of the recipe of `plan_large`, on a machine whose disk has room for it."""
    recipe, _ = make_recipe(folder, LARGE["70B"])
    loaded, store = load_recipe(recipe, ON_GPUS), Store.open(str(folder / "store"))
    store.make()
    roomy: Any = namedtuple("roomy", "total used free")(10**15, 0, 10**15)
    shutil.disk_usage = lambda path: roomy
    return make_plan(loaded, folder, store, list_models(loaded, folder, store.hub_cache))


def row(stage: str, steps: list[Step], nodes: int, speed: float) -> str:
    """Return a line of the table; pieces are shared out evenly, each is done on one node, an actor's share is one."""
    pieces = [max(1, len(step.job.parts())) * max(1, step.actors) for step in steps]
    reads, writes = (sum(getattr(step, what) for step in steps) for what in ("reads", "writes"))
    share = math.ceil(sum(pieces) / nodes) / sum(pieces)
    seconds = share * (reads + writes) / speed
    cells = (stage, len(steps), sum(pieces), *(f"{one / 1e9:.0f} GB" for one in (reads, writes)))
    return f"| {' | '.join(map(str, cells))} | {share * (reads + writes) / 1e9:.0f} GB | {seconds / 60:.1f} min |"


def paper(nodes: int, speed: float) -> None:
    """Print the table, and what the plan itself took."""
    with TemporaryDirectory() as temporary:
        plan = planned(Path(temporary))
        seconds, _, peak = run_plan(Path(temporary) / "recipe.yaml")
        print(f"plan --quick: {seconds:.1f} s, {peak / 1e9:.2f} GB at most")
        print(f"{nodes} nodes, each reads and writes {speed / 1e9:g} GB/s\n")
        print("| stage | steps | pieces | read | written | most on one node | time |\n" + "| --- " * 7 + "|")
        for stage in dict.fromkeys(step.stage for step in plan.steps):
            print(row(stage, [step for step in plan.steps if step.stage == stage], nodes, speed))


def block(work: Path) -> None:
    """Merge one block of full width, take the sensitivity of shortened ones by two actors, and print what it took."""
    merges = {
        "ta": {"method": "task_arithmetic", "weight": 0.3},
        "ties": {"method": "ties", "weight": 0.3, "density": 0.3},
    }
    run(work, "block", BLOCK, {"merges": merges})
    sens = {"method": "task_arithmetic", "weight": 0.3, "coefficients": {"kind": "sens"}}
    run(work, "short", SHORT, {"merges": {"sens": sens}, "placement": {"actors": 2}, "tasks": tasks(work)})


def tasks(work: Path) -> dict[str, Any]:
    """Write a few rows for each expert, and return the tasks of a recipe."""
    found = {}
    for number, name in enumerate(EXPERTS):
        rows = [f'{{"prompt": "{number}+{a}=", "completion": "{number + a}"}}\n' for a in range(8)]
        work.mkdir(parents=True, exist_ok=True)
        (work / f"{name}.jsonl").write_text("".join(rows))
        found[name] = {"kind": "completion", "calibration": {"path": "json", "data_files": f"{name}.jsonl"}}
    return found


def run(work: Path, name: str, size: Size, recipe: dict[str, Any]) -> None:
    """Make models of a size and run a recipe on them; print where networks run, all steps, and the workers' memory."""
    for number, model in enumerate(("base", *EXPERTS)):
        folder = make_model(work / name / model, size, number - 1 if number else None)
        make_tokenizer().save_pretrained(folder)
    models = {"base": f"{name}/base", "experts": {one: {"model": f"{name}/{one}"} for one in EXPERTS}}
    path = work / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"name": name, **models, "dtype": "bfloat16", **recipe}))
    program, store = [sys.executable, "-m", "pipeline"], ["--store", str(work / f"{name}-store")]
    planned = subprocess.run([*program, "plan", str(path), "--quick", *store], stdout=subprocess.PIPE, text=True)
    print(" ".join(planned.stdout.rpartition("┘")[2].split()))
    command = [*program, "run", str(path), *store, "--tracking-uri", f"sqlite:///{work}/mlflow.db"]
    begin = time.perf_counter()
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process,
        watched(lambda: ray_workers(process.pid)) as peak,
    ):
        assert process.stdout is not None
        print("".join(line for line in process.stdout if line.startswith("[")), end="")
    assert process.returncode == 0, command
    print(f"{name}: {time.perf_counter() - begin:.0f} s, {peak.largest / 1e9:.2f} GB of anonymous memory at most\n")
    shutil.rmtree(work / f"{name}-store")


def main() -> None:
    """Print what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of_paper = commands.add_parser("paper")
    of_paper.add_argument("--nodes", type=int, default=8)
    of_paper.add_argument("--gigabytes-per-second", type=float, default=3)
    commands.add_parser("block").add_argument("work", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "paper":
        paper(arguments.nodes, arguments.gigabytes_per_second * 1e9)
    else:
        block(arguments.work.absolute())


if __name__ == "__main__":
    main()
