"""Recipes whose models are at URLs."""

from pathlib import Path
from typing import Any

from tests.conftest import write_recipe
from tests.here import run_here


def test_a_run_of_models_at_urls_makes_what_one_of_folders_makes(
    bucket: Any, llamas: dict[str, Path], tmp_path: Path
) -> None:
    recipe = {"name": "tiny", "merges": {"ties": {"method": "ties", "density": 0.3}}}
    for name, folder in llamas.items():
        bucket.put(str(folder), f"s3://models/{name}", recursive=True)
    places = {"there": {name: f"s3://models/{name}" for name in llamas}, "here": {n: str(f) for n, f in llamas.items()}}
    merged = {}
    for place, models in places.items():
        full = recipe | {
            "base": models["base"],
            "experts": {name: {"model": models[name]} for name in ("math", "code")},
        }
        store = tmp_path / place
        assert run_here(write_recipe(tmp_path, full, f"{place}.yaml"), "--store", store) == 0
        (merged[place],) = store.glob("merge/*/model.safetensors")
    assert merged["there"].read_bytes() == merged["here"].read_bytes()
