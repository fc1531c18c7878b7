"""What a plan of a large model takes: a sparse Llama 70B and three experts of it, of which only headers are real.

    python -m tests.benchmarks.plan_large [--size 70B] [--gigabytes 4] [--folder FOLDER]

Prints seconds and peak memory of `plan --quick`, and what the digests of a full plan take per terabyte, measured on a
file of some gigabytes whose bytes are in memory, and again with them on the disk only.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import yaml

from sensmerge.tasks.checkpoints.digests import compute
from sensmerge.tasks.checkpoints.planned import plan_checkpoint, preallocate
from tests.benchmarks.synthetic import SIZES, Size, llama_config, shapes
from tests.conftest import make_tokenizer

LARGE = {"70B": Size(8192, 80, 28672, 64, 8, 128_256), **SIZES}
"""By number of parameters; 70B is Llama 3's."""
SHARDS = 30
EXPERTS = ("math", "code", "chat")
PIECE = 2**26
ROOMY = """
import collections, shutil
shutil.disk_usage = lambda path: collections.namedtuple("usage", "total used free")(10**15, 0, 10**15)
from sensmerge.pipeline.cli import main
main()
"""
"""The command line on a machine whose disk has room for what a run would write."""


def make_sparse(folder: Path, size: Size) -> int:
    """Write a model of which only headers, config and tokenizer are real; return the bytes its weights seem to have."""
    tensors = {name: (torch.bfloat16, shape) for name, shape in shapes(size).items()}
    total = plan_checkpoint(tensors, 2**62).sizes["model.safetensors"]
    shard_size = total // SHARDS
    while len((plan := plan_checkpoint(tensors, shard_size)).sizes) > SHARDS:
        shard_size += total // 1000
    preallocate(plan, folder)
    (folder / "config.json").write_text(json.dumps(llama_config(size, torch.bfloat16).to_dict(), indent=2))
    make_tokenizer().save_pretrained(folder)
    return sum(plan.sizes.values())


def make_recipe(folder: Path, size: Size) -> tuple[Path, int]:
    """Write models, data and a recipe with every stage of static merging; return the recipe and the weights' bytes."""
    total = sum(make_sparse(folder / name, size) for name in ("base", *EXPERTS))
    tasks = {}
    for number, name in enumerate(EXPERTS):
        for split, numbers in (("calibration", range(40)), ("evaluation", range(40, 140))):
            rows = [{"prompt": f"{number}+{a}=", "completion": str(number + a)} for a in numbers]
            (folder / f"{name}-{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        splits = {one: {"path": "json", "data_files": f"{name}-{one}.jsonl"} for one in ("calibration", "evaluation")}
        tasks[name] = {"kind": "completion", **splits}
    recipe = {
        "name": "large",
        "base": "base",
        "experts": {name: {"model": name} for name in EXPERTS},
        "tasks": tasks,
        "dtype": "bfloat16",
        "resources": {stage: {"max_in_flight": 1} for stage in ("statistics", "cross_task")},
        "merges": {
            "ta": {"method": "task_arithmetic", "weight": 0.3},
            "dare": {"method": "dare_ties", "density": 0.5},
            "sens": {"method": "ties", "density": 0.3, "coefficients": {"kind": "sens"}},
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path, total


def planned(recipe: Path) -> tuple[float, float, int]:
    """Run `plan --quick` in a process of its own; return its seconds, its processor seconds and its peak bytes."""
    command = [sys.executable, "-c", ROOMY, "plan", str(recipe), "--quick"]
    begin = time.perf_counter()
    with (recipe.parent / "plan.txt").open("w") as said:
        process = subprocess.Popen(
            [*command, "--store", str(recipe.parent / "store")], stdout=said, env=os.environ | {"COLUMNS": "120"}
        )
        _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, "the plan failed"
    return time.perf_counter() - begin, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def hashed(path: Path, from_disk: bool) -> float:
    """Return the seconds that the digest of a file takes, its bytes in memory or not."""
    if from_disk:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    begin = time.perf_counter()
    compute(path, "blake3")
    return time.perf_counter() - begin


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="70B", choices=LARGE)
    parser.add_argument("--gigabytes", type=int, default=4, help="size of the file that is hashed")
    parser.add_argument("--folder", type=Path, help="where the files go meanwhile; default: a temporary folder")
    arguments = parser.parse_args()
    with TemporaryDirectory(dir=arguments.folder) as temporary:
        recipe, total = make_recipe(Path(temporary), LARGE[arguments.size])
        for number in range(3):
            seconds, processor, peak = planned(recipe)
            print(
                f"plan --quick of {total / 1e9:.0f} GB, run {number + 1}: {seconds:.1f} s, {processor:.1f} s of "
                f"processor time, {peak / 1e9:.2f} GB at most"
            )
        print(" ".join((recipe.parent / "plan.txt").read_text().partition("┏")[0].split()))
        file = Path(temporary) / "weights"
        with file.open("wb") as target:
            for _ in range(arguments.gigabytes * 10**9 // PIECE):
                target.write(os.urandom(PIECE))
            os.fsync(target.fileno())
        for where in ("memory", "the disk"):
            seconds = min(hashed(file, where == "the disk") for _ in range(3))
            speed = file.stat().st_size / seconds
            print(f"digests from {where}: {speed / 1e9:.1f} GB/s, {1e12 / speed:.0f} s per TB ({os.cpu_count()} cores)")


if __name__ == "__main__":
    main()
