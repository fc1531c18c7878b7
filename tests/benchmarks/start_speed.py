"""What commands cost that find nothing to do: wall and processor seconds of whole processes; prints Markdown.

    python -m tests.benchmarks.start_speed [RECIPE] [--rounds N]      (RECIPE: the quickstart's)

A refresh fills a store in a temporary folder and settles its champion. Then every round takes the commands in turns;
the table has their medians. Processor seconds are those of the command and of the processes that it waited for.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

PROJECT = Path(__file__).resolve().parents[2]
QUICK_START = PROJECT / "configs/quickstart/recipe.yaml"
SETTLED = (0, 3)
"""Exit statuses of a refresh: 3 if the gate kept the former champion."""


def spent(*words: str) -> tuple[float, float]:
    """Run a command that succeeds; return its wall and its processor seconds."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    told = subprocess.run([sys.executable, "-m", "pipeline", *words], cwd=PROJECT, capture_output=True, text=True)
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    allowed = SETTLED if words[0] == "refresh" else (0,)
    assert told.returncode in allowed, f"{words[0]}: exit status {told.returncode}\n{told.stdout}{told.stderr}"
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Run it; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?", default=QUICK_START)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        where = (str(chosen.recipe.resolve()), "--store", f"{work}/store")
        spent("refresh", *where)
        commands = {
            "`--help`": ("--help",),
            "`plan`, unchanged": ("plan", *where),
            "`run`, nothing to do": ("run", *where),
            "`refresh`, nothing changed": ("refresh", *where),
        }
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(chosen.rounds):
            for name, words in commands.items():
                taken[name].append(spent(*words))
    print("| command | wall, s | processor, s |")
    print("| --- | --- | --- |")
    for name, rounds in taken.items():
        walls, processor = zip(*rounds, strict=True)
        print(f"| {name} | {median(walls):.2f} | {median(processor):.2f} |")


if __name__ == "__main__":
    main()
