"""Which rule finds a sample's expert best? Every score, layer and pool at several weights of task arithmetic.

    python -m tests.benchmarks.routes RECIPE [--weights 0.3 1] [--samples 100] [--experts a b c] [--store store]

The recipe's base, experts and tasks are used; its merges are not. Statistics come from the calibration sets,
identification is measured on `--samples` rows of each evaluation set. Prints Markdown: a row per weight and score, a
column per layer, in each cell the best pool and how many samples it identifies.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from sensmerge.pipeline.recipe.load import load_recipe
from sensmerge.pipeline.recipe.schema import Recipe
from sensmerge.tasks.dynamic.application import PoolName
from sensmerge.tasks.dynamic.folder import load_network_with_heads, read_manifest
from sensmerge.tasks.dynamic.network import DynamicNetwork
from sensmerge.tasks.dynamic.probes import probe
from sensmerge.tasks.dynamic.router import POOLS, SCORES, Features, Rule, affinities, fit
from sensmerge.tasks.dynamic.vectors import BASE
from sensmerge.tasks.kinds.kind import RowTask
from sensmerge.tasks.kinds.scores import mean_score
from sensmerge.tasks.kinds.templates import render
from sensmerge.tasks.networks.networks import load_tokenizer
from sensmerge.tasks.networks.tokens import pad, pad_token, tokens
from sensmerge.tasks.rows.source import Row
from sensmerge.tasks.rows.tables import load_rows

BATCH_SIZE = 8
METRIC = "l2"


def dynamic_folder(recipe: Recipe, experts: list[str], folder: Path, store: Path) -> Path:
    """Return the folder of a dynamic model of the recipe's experts under task arithmetic, run as far as need be."""
    data = recipe.model_dump(by_alias=True, exclude_unset=True)
    data["experts"] = {name: data["experts"][name] for name in experts}
    data["tasks"] = {name: {**data["tasks"][name], "evaluation": None} for name in experts}
    data["merges"] = {"se": {"method": "task_arithmetic", "application": {"kind": "se", "score": "centroid"}}}
    data |= {"name": f"{recipe.name}-routes", "resources": None}
    store.mkdir(parents=True, exist_ok=True)
    # Beside the recipe, for its relative paths.
    with tempfile.NamedTemporaryFile("w", dir=folder, prefix=".routes-", suffix=".yaml") as file:
        yaml.safe_dump(data, file, sort_keys=False)
        file.flush()
        report = store / "routes.json"
        command = [sys.executable, "-m", "pipeline", "run", file.name, "--store", str(store), "--report", str(report)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return Path(json.loads(report.read_text())["models"]["se"])


def prompt(task: RowTask, row: Row, tokenizer: Any) -> list[int]:
    """Return what a sample is routed by."""
    if task.has_own_head:
        ids: list[int] = tokenizer(render(task.prompt, row), truncation=True, max_length=task.max_length)["input_ids"]
        return ids
    return tokens(render(task.prompt, row), tokenizer, front=True)[-task.max_length :]


def features(
    network: DynamicNetwork, prompts: list[list[int]], rules: list[Rule], experts: int, weight: float, pad_id: int
) -> dict[tuple[int, PoolName], Features]:
    """Return the features of all prompts by layer and pool."""
    parts = []
    with torch.inference_mode():
        for start in range(0, len(prompts), BATCH_SIZE):
            parts.append(probe(network, pad(prompts[start : start + BATCH_SIZE], pad_id), rules, experts, weight))
    return {
        key: Features(*(torch.cat([getattr(part[key], name) for part in parts]) for name in vars(parts[0][key])))
        for key in parts[0]
    }


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--weights", type=float, nargs="+", default=[0.3, 1.0])
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--experts", nargs="+")
    parser.add_argument("--store", type=Path, default=Path("store"))
    arguments = parser.parse_args()
    recipe, folder = load_recipe(arguments.recipe), arguments.recipe.absolute().parent
    names = arguments.experts or list(recipe.experts)
    model = dynamic_folder(recipe, names, folder, arguments.store)
    network, _ = load_network_with_heads(model, names, read_manifest(model).head, "float32", "cpu")
    tokenizer = load_tokenizer(model / BASE)
    pad_id = pad_token(network.network, tokenizer)
    layers = range(1, network.blocks + 1)
    rules = [Rule(score, layer, pool, METRIC) for score in SCORES for layer in layers for pool in POOLS]
    prompts: dict[str, list[list[int]]] = {"calibration": [], "evaluation": []}
    owners: dict[str, list[int]] = {"calibration": [], "evaluation": []}
    for number, name in enumerate(names):
        task = recipe.tasks[name]
        for split, found in prompts.items():
            source = getattr(task, split)
            if split == "evaluation":
                source = source.model_copy(update={"samples": arguments.samples})
            rows = load_rows(source, f"tasks.{name}.{split}", folder).rows
            found += [prompt(task, row, tokenizer) for row in rows]  # type: ignore[arg-type]
            owners[split] += [number] * len(rows)
    truth = {split: torch.tensor(found) for split, found in owners.items()}
    print(f"{len(truth['evaluation'])} samples of {', '.join(names)}; chance {1 / len(names):.2f}\n")
    print("| weight | score | " + " | ".join(f"layer {layer}" for layer in layers) + " | best, 95 % interval |")
    print("| --- " * (len(layers) + 3) + "|")
    for weight in arguments.weights:
        seen = features(network, prompts["calibration"], rules, len(names), weight, pad_id)
        new = features(network, prompts["evaluation"], rules, len(names), weight, pad_id)
        for score in SCORES:
            print(
                f"| {weight:g} | {score} | {row([rule for rule in rules if rule.score == score], seen, new, truth)} |"
            )


def row(
    rules: list[Rule],
    seen: Mapping[tuple[int, PoolName], Features],
    new: Mapping[tuple[int, PoolName], Features],
    truth: Mapping[str, Tensor],
) -> str:
    """Return the cells of one score: at each layer the best pool and its accuracy, and the best of all."""
    experts = int(truth["calibration"].max()) + 1
    hits: dict[Rule, list[float]] = {}
    for rule in rules:
        key = rule.layer, rule.pool
        statistics = fit(rule, seen[key], truth["calibration"], experts)
        hits[rule] = (affinities(rule, new[key], statistics).argmax(1) == truth["evaluation"]).double().tolist()
    cells = []
    for layer in sorted({rule.layer for rule in rules}):
        best = max((rule for rule in rules if rule.layer == layer), key=lambda rule: sum(hits[rule]))
        cells.append(f"{sum(hits[best]) / len(hits[best]):.2f} {best.pool}")
    best = max(rules, key=lambda rule: sum(hits[rule]))
    overall = mean_score(hits[best], is_proportion=True)
    cells.append(f"layer {best.layer} {best.pool}: {overall.value:.3f} [{overall.low:.3f}, {overall.high:.3f}]")
    return " | ".join(cells)


if __name__ == "__main__":
    main()
