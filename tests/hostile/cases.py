"""The honest files that hostile ones are made of, and what is done with each kind."""

import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import datasets
import pandas as pd
import yaml

from sensmerge.pipeline.plan.models import hash_models, list_models
from sensmerge.pipeline.plan.plan import Plan, make_plan
from sensmerge.pipeline.recipe.load import load_recipe
from sensmerge.pipeline.store.store import Store
from sensmerge.tasks.artifacts import canonical, sha256_file, sha256_text
from sensmerge.tasks.dynamic.folder import MANIFEST
from sensmerge.tasks.dynamic.model import DynamicModel
from sensmerge.tasks.errors import InputError
from tests.conftest import command_line, do_steps, make_adapter, make_llama, make_tokenizer, perturbed, write_rows
from tests.hostile.sandbox import Outcome, attempt
from tests.hostile.values import json_bytes, misplace, spoilt, spoilt_bytes, yaml_bytes
from tests.pictures import picture, save_classifiers

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "base": "base",
    "experts": {"math": {"model": "math"}, "code": {"model": "code"}},
    "tasks": {
        "math": {
            "kind": "completion",
            "generate": 2,
            "answer": r"(\d+)",
            "calibration": {"path": "set"},
            "evaluation": {"path": "parquet", "data_files": "math.parquet"},
        },
        "code": {
            "kind": "chat",
            "messages": [
                {"role": "user", "content": "{prompt}"},
                {"role": "assistant", "content": "{completion}"},
            ],
            "calibration": {"path": "json", "data_files": "math.jsonl"},
            "evaluation": {"path": "csv", "data_files": "code.csv", "samples": 2},
        },
    },
    "merges": {"ta": {"method": "task_arithmetic", "coefficients": {"kind": "sens"}}},
    "tokenizer": {"source": "union"},
}
SE = {"method": "task_arithmetic", "weight": 0.5, "application": {"kind": "se"}}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SEEN = "seen"
"""Folder of a world of its own, whose networks read pictures."""
LABELS = {"reds": 2, "blues": 3}
CARD = """---
dataset_info:
  features:
  - name: prompt
    dtype: string
  - name: completion
    dtype: string
---
"""


def made_world(folder: Path) -> None:
    """Make a world in a process of its own: threads that it started would be missing in forks of this one."""
    child = os.fork()
    if child == 0:
        try:
            make_world(folder)
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def rows(start: int) -> pd.DataFrame:
    numbers = range(start, start + 3)
    return pd.DataFrame({"prompt": [f"{n}+1=" for n in numbers], "completion": [str(n + 1) for n in numbers]})


def make_world(folder: Path) -> None:
    """Write models, rows and a recipe to a folder, and have a store made of them with a dynamic model in it."""
    base = make_llama()
    for name, network in (("base", base), ("math", perturbed(make_llama(), 1))):
        # Two shards and an index, of which the base has none.
        network.save_pretrained(folder / name, max_shard_size="60KB" if name == "math" else "1GB")
        tokenizer = make_tokenizer()
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder / name)
    make_adapter(make_llama(), folder / "code", 2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    (folder / "set").mkdir()
    rows(0).to_json(folder / "math.jsonl", orient="records", lines=True)
    rows(10).to_parquet(folder / "math.parquet")
    rows(20).to_csv(folder / "code.csv", index=False)
    rows(30).to_json(folder / "set" / "train.jsonl", orient="records", lines=True)
    (folder / "set" / "README.md").write_text(CARD)
    recipe = RECIPE | {"merges": {**RECIPE["merges"], "se": SE}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    plan = plan_of(folder)
    do_steps(plan)
    dynamic = next(plan.store.folder(step.key) for step in plan.steps if step.stage == "route")
    shutil.copytree(dynamic, folder / "dynamic")
    make_pictures(folder / SEEN)


def make_pictures(folder: Path) -> None:
    """Write classifiers of pictures, pictures with rows that name them, and a recipe to a folder."""
    folder.mkdir()
    save_classifiers("vit", folder, LABELS)
    tasks = {}
    for colour, (name, classes) in enumerate(LABELS.items()):
        table = []
        for number in range(3):
            file = f"{name}-{number}.png"
            (folder / file).write_bytes(picture(number, colour))
            table.append({"image": file, "label": number % classes})
        write_rows(folder / f"{name}.jsonl", table)
        tasks[name] = {
            "kind": "image_classification",
            "calibration": {"path": "json", "data_files": f"{name}.jsonl"},
        }
    recipe = {
        "name": "seen",
        "base": "base",
        "experts": {name: {"model": name} for name in LABELS},
        "tasks": tasks,
        "merges": {"se": SE},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def plan_of(folder: Path) -> Plan:
    """Plan the recipe of a world, with its store."""
    recipe, store = load_recipe(folder / "recipe.yaml"), Store(folder / "store")
    store.make()
    listings = hash_models(list_models(recipe, folder, store.hub_cache), store.hub_cache)
    return make_plan(recipe, folder, store, listings)


def said(do: Callable[[], object]) -> int:
    """Do something and say what is wrong as the command line does."""
    try:
        do()
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def run(folder: Path) -> int:
    """Plan the recipe of a world, and do its steps in this process."""
    shutil.rmtree(folder / "store")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return said(lambda: do_steps(plan_of(folder)))


def see(folder: Path) -> int:
    """Plan the recipe on pictures of a world, and do its steps in this process."""
    return said(lambda: do_steps(plan_of(folder / SEEN)))


def plan(folder: Path) -> int:
    """Run the command `plan`."""
    return command_line("plan", folder / "recipe.yaml", "--store", folder / "store")


def inspect(folder: Path) -> int:
    """Run the command `verify`, which names what is damaged line by line and ends with status 1, and then `plan`."""
    status = command_line("verify", "--store", folder / "store")
    if status not in (0, 1):
        return status
    os.ftruncate(2, 0)  # what it said; a traceback has another status
    os.lseek(2, 0, os.SEEK_SET)
    return plan(folder)


def answer(folder: Path) -> int:
    """Load the dynamic model of a world, and have it answer."""
    return said(lambda: DynamicModel.load(folder / "dynamic").predict(["1+1="], max_new_tokens=2))


Spoil = Callable[[Path, Random], None]


def in_json(path: Path, draw: Random) -> None:
    path.write_bytes(json_bytes(json.loads(path.read_text()), draw))


def in_bytes(path: Path, draw: Random) -> None:
    path.write_bytes(spoilt_bytes(path.read_bytes(), draw))


def in_recipe(path: Path, draw: Random) -> None:
    path.write_bytes(yaml_bytes(RECIPE, draw))


def in_rows(path: Path, draw: Random) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    if draw.random() < 0.5:
        lines[draw.randrange(len(lines))] = spoilt(lines[0], draw)
    else:
        lines = draw.choice([[None] * 3, [lines[0], None], [[]], [5], ["a"], [], [{}], [{"prompt": None}] * 3])
    text = "".join(json.dumps(line) + "\n" for line in lines).encode("utf-8", "surrogatepass")
    path.write_bytes(text if draw.random() < 0.7 else spoilt_bytes(text, draw))


def in_header(path: Path, draw: Random) -> None:
    """Spoil what the header of a safetensors file says, or its bytes."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    if draw.random() < 0.3:
        path.write_bytes(spoilt_bytes(content, draw))
        return
    header = json_bytes(json.loads(content[8 : 8 + size]), draw)
    length = draw.choice([len(header)] * 6 + [0, 2**63, len(header) + 10**6, 5])
    path.write_bytes(length.to_bytes(8, "little") + header + content[8 + size :])


def in_manifest(path: Path, draw: Random) -> None:
    """Spoil a manifest and seal it again."""
    content = json.loads(path.read_text())
    del content["digest"]
    found = spoilt(content, draw)
    try:
        sealed = found | {"digest": sha256_text(canonical(found))}
    except (TypeError, ValueError):
        sealed = found
    path.write_text(json.dumps(sealed))


def in_sealed(path: Path, draw: Random) -> None:
    """Spoil a file of a dynamic model, and have the manifest name it as it is now."""
    (in_header if path.suffix == ".safetensors" else in_json if path.suffix == ".json" else in_bytes)(path, draw)
    folder = path.parents[1] if (path.parents[1] / MANIFEST).is_file() else path.parent
    content = json.loads((folder / MANIFEST).read_text())
    del content["digest"]
    content["files"][path.relative_to(folder).as_posix()] = sha256_file(path)
    (folder / MANIFEST).write_text(json.dumps(content | {"digest": sha256_text(canonical(content))}))


@dataclass(frozen=True)
class Kind:
    """A kind of file: where it stands, how it is spoilt, and who reads it then."""

    files: str
    """pattern of paths in the world"""
    spoil: Spoil
    read: Callable[[Path], int]


KINDS: Mapping[str, Kind] = {
    "recipe": Kind("recipe.yaml", in_recipe, plan),
    "config": Kind("*/config.json", in_json, run),
    "tokenizer": Kind("*/tokenizer.json", in_json, run),
    "tokenizer config": Kind("*/tokenizer_config.json", in_json, run),
    "chat template": Kind("*/chat_template.jinja", in_bytes, run),
    "generation config": Kind("*/generation_config.json", in_json, run),
    "safetensors": Kind("[bm]a*/model*.safetensors", in_header, run),
    "index": Kind("math/*.index.json", in_json, run),
    "adapter config": Kind("code/adapter_config.json", in_json, run),
    "adapter weights": Kind("code/adapter_model.safetensors", in_header, run),
    "rows as JSON": Kind("math.jsonl", in_rows, run),
    "rows as CSV": Kind("code.csv", in_bytes, run),
    "rows as Parquet": Kind("math.parquet", in_bytes, run),
    "rows of a folder": Kind("set/train.jsonl", in_rows, run),
    "README of rows": Kind("set/README.md", in_bytes, run),
    "image processor": Kind("seen/*/preprocessor_config.json", in_json, see),
    "pictures": Kind("seen/*.png", in_bytes, see),
    "rows of pictures": Kind("seen/*.jsonl", in_rows, see),
    "store": Kind("store/*/*/*.json", in_json, inspect),
    "manifest of a dynamic model": Kind("dynamic/dynamic.json", in_manifest, answer),
    "files of a dynamic model": Kind("dynamic/**/*.*", in_sealed, answer),
}


HONEST = sorted({kind.read: number - len(KINDS) for number, kind in enumerate(KINDS.values())}.values())
"""Numbers of inputs that nothing is wrong with: one for each reader."""


def try_one(world: Path, seed: int, number: int) -> tuple[str, Outcome]:
    """Make one hostile input of a world, and have it read; of a number below 0, an honest one.

    Returns:
        What it was, and what became of it.
    """
    draw = Random(f"{seed}:{number}")
    name = list(KINDS)[number % len(KINDS)]
    kind = KINDS[name]
    with tempfile.TemporaryDirectory(prefix="hostile-") as temporary:
        folder = Path(temporary) / "world"
        shutil.copytree(world, folder)
        secret = folder.parent / "secret"
        shutil.copytree(world / "base", secret)
        for copy in ("tokenizer.json", "config.json"):
            shutil.copyfile(secret / copy, secret / copy.replace(".", ".4.0.0.", 1))
        paths = (one for one in folder.glob(kind.files) if one.is_file())
        path = draw.choice(sorted(one for one in paths if kind.spoil is not in_sealed or one.name != MANIFEST))
        if number < 0:
            pass
        elif draw.random() < 0.06 and kind.spoil is not in_manifest:
            misplace(path, draw)
        else:
            kind.spoil(path, draw)

        def read() -> int:
            (folder / "temporary").mkdir()
            tempfile.tempdir = str(folder / "temporary")
            datasets.config.HF_DATASETS_CACHE = str(folder / "cache")
            return kind.read(folder)

        outcome = attempt(read, folder, secret)
        if (folder / "it-ran").exists():
            outcome = Outcome(outcome.status, outcome.said, [*outcome.breaches, "code ran"])
    return f"{name}, {path.relative_to(folder)}", outcome
