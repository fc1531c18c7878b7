"""How fast is a merge? Side by side with mergekit 0.1.5, and with reading all inputs and writing one output.

    python -m tests.benchmarks.merge_speed WORK [--size 1.1B] [--experts 3] [--methods task_arithmetic ties dare_ties]
        [--workers 2 …] [--rounds 3] [--no-mergekit]

Makes seeded Llama-shaped checkpoints and a virtual environment with mergekit below WORK, as far as they are not there,
and lets the ways take turns. Prints a table of medians: the whole process, the merge stage alone, the floor
(`cat` of all inputs to nowhere and `cp` of one), ratios, and the peak anonymous memory (RssAnon, page cache apart) of
all worker processes together; for each number of workers that may merge at once, with one thread each. Every run starts
from an empty store, and every way after a pause: a virtual machine may give memory that is free back to its host, and
who uses it next waits for it. Without the pause some would and some not. Python may keep its bytecode, as it does for
what is installed.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from tests.benchmarks.memory import children, watched
from tests.benchmarks.synthetic import make_models

MERGEKIT = "mergekit==0.1.5"
SETTINGS: dict[str, dict[str, float]] = {
    "linear": {"weight": 0.4},
    "task_arithmetic": {"weight": 0.4},
    "ties": {"weight": 0.4, "density": 0.3},
    "dare_linear": {"weight": 0.4, "density": 0.3},
    "dare_ties": {"weight": 0.4, "density": 0.3},
    "della": {"weight": 0.4, "density": 0.3},
    "slerp": {"t": 0.4},
    "karcher": {},
    "model_stock": {},
}
WITHOUT_BASE = ("linear", "karcher")
PAUSE = 20
"""seconds; memory that is free this long is with the host again"""


@dataclass(frozen=True)
class Ours:
    """One run of a recipe."""

    whole: float
    """seconds of the whole process"""
    stage: float
    """seconds from the end of the step before the merge to the end of the merge"""
    memory: int
    """peak RssAnon in bytes of all workers together"""


def seconds(command: list[str]) -> float:
    """Return how long a command takes."""
    time.sleep(PAUSE)
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begin


def floor(models: list[Path], out: Path) -> float:
    """Return how long it takes to read all models and to write one."""
    time.sleep(PAUSE)
    files = [str(path) for model in models for path in sorted(model.glob("*.safetensors"))]
    begin = time.perf_counter()
    subprocess.run(["cat", *files], check=True, stdout=subprocess.DEVNULL)
    out.mkdir()
    subprocess.run(["cp", *(file for file in files if file.startswith(str(models[0]))), str(out)], check=True)
    taken = time.perf_counter() - begin
    shutil.rmtree(out)
    return taken


def mergekit(program: Path, models: list[Path], method: str, work: Path) -> float:
    """Return how long mergekit takes for the whole process, with its own defaults."""
    base, *experts = (str(model.absolute()) for model in models)
    config = {
        "merge_method": method,
        **({} if method in WITHOUT_BASE else {"base_model": base}),
        "models": [{"model": expert} for expert in experts],
        "parameters": SETTINGS[method],
        "dtype": "bfloat16",
    }
    (work / "mergekit.yaml").write_text(yaml.safe_dump(config))
    taken = seconds([str(program), str(work / "mergekit.yaml"), str(work / "mergekit-out")])
    shutil.rmtree(work / "mergekit-out")
    return taken


def ours(models: list[Path], method: str, workers: int, work: Path) -> Ours:
    """Run a recipe from nothing and measure it."""
    base, *experts = (str(model.absolute()) for model in models)
    recipe = {
        "name": "speed",
        "base": base,
        "experts": {f"e{number}": {"model": expert} for number, expert in enumerate(experts)},
        "merges": {"merged": {"method": method, **SETTINGS[method]}},
        "resources": {"merge": {"max_in_flight": workers}},
    }
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "pipeline", "run", str(work / "recipe.yaml"), "--store", str(work / "store")]
    time.sleep(PAUSE)
    begin = time.perf_counter()
    ends = []
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process,
        watched(lambda: ray_workers(process.pid)) as peak,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("["):  # a step has ended
                ends.append((time.perf_counter(), line))
    whole = time.perf_counter() - begin
    assert process.returncode == 0, command
    assert " merge merged" in ends[-1][1], ends
    shutil.rmtree(work / "store")
    return Ours(whole, ends[-1][0] - ends[-2][0], peak.largest)


def ray_workers(driver: int) -> list[psutil.Process]:
    """Return the Ray workers that a driver has started, idle ones too."""
    try:
        return [one for one in children(psutil.Process(driver), "ray::") if "Agent" not in "".join(one.cmdline())]
    except psutil.Error:  # it has ended
        return []


def install_mergekit(work: Path) -> Path:
    """Return mergekit's program, installed in a virtual environment of its own."""
    program = work / "mergekit" / "bin" / "mergekit-yaml"
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", str(work / "mergekit")], check=True)
        pip = [str(work / "mergekit" / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, MERGEKIT, "torch==2.13.0"], check=True)
    return program


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--size", default="1.1B")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=["task_arithmetic", "ties", "dare_ties"])
    parser.add_argument("--workers", type=int, nargs="+", default=[os.cpu_count() or 1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-mergekit", action="store_true")
    arguments = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    work: Path = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    models = list(make_models(work / "models", arguments.size, arguments.experts))
    size = sum(path.stat().st_size for model in models for path in model.glob("*.safetensors"))
    program = None if arguments.no_mergekit else install_mergekit(work)
    floor(models, work / "copied")  # the page cache is warm from here on
    print(f"{arguments.size}, K = {arguments.experts}, {size / 1e9:.1f} GB of input\n")
    print(
        "| method | workers | mergekit, s | whole process, s | faster | merge stage, s | floor, s | stage ÷ floor "
        "| stage, ns per byte | peak anonymous memory |\n" + "| --- " * 10 + "|"
    )
    for method in arguments.methods:
        rounds, used = [], models[:2] if method == "slerp" else models
        size = sum(path.stat().st_size for model in used for path in model.glob("*.safetensors"))
        for _ in range(arguments.rounds):
            theirs = mergekit(program, used, method, work) if program else float("nan")
            runs = {workers: ours(used, method, workers, work) for workers in arguments.workers}
            rounds.append((theirs, runs, floor(used, work / "copied")))
            print(json.dumps([theirs, {key: vars(run) for key, run in runs.items()}, rounds[-1][2]]), file=sys.stderr)
        theirs = statistics.median(theirs for theirs, _, _ in rounds)
        low = statistics.median(low for _, _, low in rounds)
        for workers in arguments.workers:
            runs_of = [runs[workers] for _, runs, _ in rounds]
            whole, stage = (statistics.median(getattr(run, key) for run in runs_of) for key in ("whole", "stage"))
            print(
                f"| {method} | {workers} | {theirs:.1f} | {whole:.1f} | {theirs / whole:.1f} × | {stage:.1f} "
                f"| {low:.1f} | {stage / low:.2f} | {1e9 * stage / size:.2f} "
                f"| {max(run.memory for run in runs_of) / 1e9:.2f} GB |",
                flush=True,
            )


if __name__ == "__main__":
    main()
