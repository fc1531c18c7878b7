"""How long a refresh takes after one expert changed, against a run of everything; prints Markdown.

    python -m tests.benchmarks.refresh_speed RECIPE EXPERT VARIANT... [--samples N]

Only these variants of the recipe are made. In this order: a refresh of an empty store, one after which nothing is
to do, one after every weight of a copy of the expert was changed a little, and, for comparison, one of another empty
store with that changed expert. The two of empty stores stand before and after what is compared with them, so that one
sees how far the machine was as busy.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file

from sensmerge.pipeline.recipe.load import load_recipe
from sensmerge.tasks.artifacts import sha256_file


def changed(folder: Path) -> None:
    """Change all weights of a saved model by a hundredth: less might be rounded away in bfloat16."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        before = sha256_file(file)
        scaled = {name: one * 1.01 if one.is_floating_point() else one for name, one in tensors.items()}
        save_file(scaled, file, metadata={"format": "pt"})
        assert sha256_file(file) != before, f"{file} is as it was"


def weights(report: dict[str, Any], variants: list[str]) -> dict[str, str]:
    """Return the sha256 of the variants' weight files."""
    folders = {name: Path(report["models"][name]) for name in variants}
    return {
        f"{name}/{file.relative_to(folder)}": sha256_file(file)
        for name, folder in folders.items()
        for file in sorted(folder.rglob("*.safetensors"))
    }


def main() -> None:
    """Run it; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("expert")
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--samples", type=int, help="of every calibration and evaluation set; default: the recipe's")
    chosen = parser.parse_args()
    recipe = load_recipe(chosen.recipe, ())
    every = recipe.model_dump(by_alias=True, exclude_unset=True)["merges"]
    merges = yaml.safe_dump({name: every[name] for name in chosen.variants}, default_flow_style=True, width=10**6)
    with tempfile.TemporaryDirectory() as work:
        copy = Path(work) / chosen.expert
        shutil.copytree((chosen.recipe.parent / recipe.experts[chosen.expert].model).resolve(), copy)
        sets = [f"merges={merges.strip()}", f"experts.{chosen.expert}.model={copy}"]
        if chosen.samples is not None:
            splits = ("calibration", "evaluation")
            sets += [f"tasks.{task}.{split}.samples={chosen.samples}" for task in recipe.tasks for split in splits]

        def refresh(store: str) -> tuple[float, dict[str, Any]]:
            report = Path(work) / "report.json"
            command = [sys.executable, "-m", "pipeline", "refresh", str(chosen.recipe), "--store", f"{work}/{store}"]
            command += ["--report", str(report), *(word for one in sets for word in ("--set", one))]
            begin = time.perf_counter()
            status = subprocess.run(command, stdout=sys.stderr, check=False).returncode
            taken = time.perf_counter() - begin
            print(f"{store}: {taken:.1f} s, exit status {status}", flush=True)
            assert status in (0, 3), status  # 3: the gate kept the former champion
            return taken, json.loads(report.read_text())

        first, _ = refresh("store")
        idle, _ = refresh("store")
        changed(copy)
        again, refreshed = refresh("store")
        last, anew = refresh("anew")
        assert weights(refreshed, chosen.variants) == weights(anew, chosen.variants), "not the bytes of a full run"
        assert refreshed["scores"] == anew["scores"], "not the scores of a full run"
        ran = sum(stage["status"] == "run" for stage in refreshed["stages"])
        assert 0 < ran < len(refreshed["stages"]), ran
        print("| variants | steps | full, before / after | nothing changed | one expert changed | ÷ mean full |")
        print("| --- | --- | --- | --- | --- | --- |")
        print(
            f"| {', '.join(chosen.variants)} | {ran} of {len(refreshed['stages'])} | {first:.0f} s / {last:.0f} s "
            f"| {idle:.1f} s | {again:.0f} s | {2 * again / (first + last):.2f} |"
        )


if __name__ == "__main__":
    main()
