"""Where do sens coefficients help? Both directions, four temperatures, against uniform coefficients; prints Markdown.

    python -m tests.benchmarks.sweep RECIPE [--method task_arithmetic] [--store store]

The recipe's base, experts, tasks and the settings of its first variant with that method are used; its other merges are
not. Everything runs through `python -m pipeline run`, so what the store holds already is not done again.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from sensmerge.pipeline.recipe.load import load_recipe
from sensmerge.pipeline.recipe.schema import Recipe

TEMPERATURES = (0.05, 0.3, 1.0, 3.0)
DIRECTIONS = ("distance", "similarity")


def swept(recipe: Recipe, method: str) -> dict[str, Any]:
    """Return the recipe as data, its merges replaced by the method with uniform and with every sens setting."""
    data = recipe.model_dump(by_alias=True, exclude_unset=True)
    first = next(dict(variant) for variant in data["merges"].values() if variant["method"] == method)
    first.pop("coefficients", None)
    merges = {"uniform": first}
    for direction in DIRECTIONS:
        for temperature in TEMPERATURES:
            sens = {"kind": "sens", "direction": direction, "temperature": temperature}
            merges[f"{direction}-{temperature:g}"] = {**first, "coefficients": sens}
    return data | {"name": f"{recipe.name}-sweep-{method}", "merges": merges}


def table(report: dict[str, Any]) -> str:
    """Return the scores of all variants as Markdown, with the spread of their weights around the mean."""
    tasks = report["tasks"]
    samples = {task: report["scores"]["base"][task][metric]["n"] for task, metric in tasks.items()}
    header = ["variant", "weights ÷ mean", *(f"{task}, n = {n}" for task, n in samples.items()), "mean normalised"]
    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    for name, variant in report["variants"].items():
        ratios = [
            weight * len(row) / sum(row.values()) for row in variant["weights"].values() for weight in row.values()
        ]
        scores = [report["scores"][name][task][metric] for task, metric in tasks.items()]
        cells = [_cell(score, 3) for score in scores] + [_cell(report["mean_normalised"][name], 4)]
        lines.append(f"| {name} | {min(ratios):.3f} … {max(ratios):.3f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(score: dict[str, Any], digits: int) -> str:
    return f"{score['value']:.{digits}f} [{score['low']:.{digits}f}, {score['high']:.{digits}f}]"


def main() -> None:
    """Run the sweep and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--method", default="task_arithmetic")
    parser.add_argument("--store", type=Path, default=Path("store"))
    arguments = parser.parse_args()
    data = swept(load_recipe(arguments.recipe), arguments.method)
    # Beside the recipe, for its relative paths.
    with tempfile.NamedTemporaryFile("w", dir=arguments.recipe.parent, prefix=".sweep-", suffix=".yaml") as recipe:
        yaml.safe_dump(data, recipe, sort_keys=False)
        recipe.flush()
        report = arguments.store / "sweep.json"
        arguments.store.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pipeline", "run", recipe.name, "--store", str(arguments.store)]
        subprocess.run([*command, "--report", str(report)], check=True)
    print(table(json.loads(report.read_text())))


if __name__ == "__main__":
    main()
