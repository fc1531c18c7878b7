"""Which merge keeps most? Scores of a run's variants, paired differences from one of them, and their price; Markdown.

    sensmerge run RECIPE --report report.json
    python -m tests.benchmarks.paired RECIPE report.json --reference ta-auto

Differences are of mean normalised, with the same resamples of rows for both variants and the experts. Seconds and the
largest resident memory are those of its own steps (tune, merge, calibrate, vectors, route), wherever they ran.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sensmerge.pipeline.recipe.load import load_recipe
from sensmerge.pipeline.recipe.schema import Recipe
from sensmerge.tasks.artifacts import read_json
from sensmerge.tasks.kinds.scores import Record, normalised_difference

OWN = ("tune", "merge", "calibrate", "vectors", "route")
Records = dict[str, list[Record]]


def records_of(report: Mapping[str, Any]) -> dict[str, Records]:
    """Return what every model answered to every evaluation sample, by model and task."""
    found: dict[str, Records] = {}
    for stage in report["stages"]:
        if stage["stage"] == "evaluate":
            model, _, task = stage["name"].partition("/")
            kept = read_json(Path(stage["artifact"]) / "records.json")
            found.setdefault(model, {}).update({task: kept} if task else kept)
    return found


def table(recipe: Recipe, report: Mapping[str, Any], reference: str) -> str:
    """Return a row for each variant."""
    tasks, records = report["tasks"], records_of(report)
    own = {task: records[task][task] for task in tasks}
    metrics = {task: recipe.tasks[task].metric_of(metric, own[task]) for task, metric in tasks.items()}
    header = [*tasks, "mean normalised", f"− {reference}, paired", "seconds", "peak memory"]
    lines = ["| variant | " + " | ".join(header) + " |", "| --- " * (len(header) + 1) + "|"]
    for name in recipe.merges:
        scores = [report["scores"][name][task][metric] for task, metric in tasks.items()]
        known = {task: metric for task, metric in metrics.items() if metric is not None}
        behind = normalised_difference(known, records[name], records[reference], own)
        steps = [one for one in report["stages"] if one["stage"] in OWN and one["name"] == name]
        cells = [_cell(score) for score in (*scores, report["mean_normalised"][name])]
        cells.append("" if name == reference or behind is None else _cell(vars(behind), "+"))
        cells.append(" + ".join(f"{one['stage']} {one['seconds']:.0f}" for one in steps))
        cells.append(f"{max(one['peak_memory'] for one in steps) / 1e9:.1f} GB")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(score: Mapping[str, Any], sign: str = "") -> str:
    return f"{score['value']:{sign}.3f} [{score['low']:{sign}.3f}, {score['high']:{sign}.3f}]"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("report", type=Path)
    parser.add_argument("--reference", required=True, help="variant that the others are compared with")
    arguments = parser.parse_args()
    print(table(load_recipe(arguments.recipe), json.loads(arguments.report.read_text()), arguments.reference))


if __name__ == "__main__":
    main()
