"""What `init` does: a recipe to start from, with what is found of base and experts in its comments."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.filesize import decimal

from sensmerge.pipeline.plan.models import weight_bytes
from sensmerge.pipeline.recipe.load import checked
from sensmerge.tasks.artifacts import load_object
from sensmerge.tasks.checkpoints.listing import CONFIGS, HubModel, Listing, UrlModel, parse_model_id
from sensmerge.tasks.checkpoints.source import fetch_files, resolve
from sensmerge.tasks.errors import InputError

CONFIG, ADAPTER_CONFIG = CONFIGS
TEMPLATES = ("chat_template.jinja", "tokenizer_config.json")
"""Small files that say whether a model has a chat template."""
KINDS_OF_CLASSES: Mapping[str, str] = {
    "ForCausalLM": "completion",
    "LMHeadModel": "completion",
    "ForSequenceClassification": "classification",
    "ForImageClassification": "image_classification",
    "ForTokenClassification": "token_classification",
    "ForConditionalGeneration": "seq2seq",
}
"""Kind of task by the end of a class's name."""
KINDS_OF_ADAPTERS: Mapping[str, str] = {
    "CAUSAL_LM": "completion",
    "SEQ_CLS": "classification",
    "TOKEN_CLS": "token_classification",
    "SEQ_2_SEQ_LM": "seq2seq",
}
"""Kind of task by what peft calls it."""
FIELDS: Mapping[str, Sequence[str]] = {
    "chat": ("messages: messages            # the field with the conversation, or the messages as templates",),
    "completion": ('prompt: "{prompt}"           # {…} is a field of your rows', 'completion: "{completion}"'),
    "classification": ('prompt: "{text}"             # {…} is a field of your rows', "label: label"),
    "regression": ('prompt: "{text}"             # {…} is a field of your rows', "label: label"),
    "image_classification": ("image: image                # fields of your rows", "label: label"),
    "token_classification": ("tokens: tokens              # fields of your rows", "tags: tags"),
    "seq2seq": ('source: "{source}"           # {…} is a field of your rows', 'target: "{target}"'),
}
"""What a task of a kind says of its rows."""
NEED_DATA = (
    "tuned: {method: task_arithmetic, weight: auto}",
    "regmean: {method: regmean, calibrate: {}}",
    "ta-sens: {method: task_arithmetic, weight: 0.4, coefficients: {kind: sens}}",
    "ta-se: {method: task_arithmetic, weight: 0.3, application: {kind: se, mass: 1.0}}",
)
"""Variants that need tasks; the first of them makes sense for one expert too."""


@dataclass(frozen=True)
class Found:
    """A model, as far as its small files tell."""

    model: str
    """as the recipe is to say it"""
    about: str
    """for people: class or adapter, size, dtype"""
    kind: str | None
    """of a task of an expert like this"""


def new_recipe(base: str, experts: Sequence[str], folder: Path, cache: Path) -> str:
    """Return a recipe for a base and experts as YAML with comments.

    Its merges need no data. Tasks, and merges that need them, are there as comments.

    Args:
        base: folder, `hub:ORG/NAME@REVISION` or URL.
        experts: the same; they may be adapters.
        folder: where the recipe will lie; relative paths are made relative to it.
        cache: of the hub.

    Raises:
        InputError: a model that cannot be found or is none, or experts that make no recipe.
    """
    found = _look(base, folder, cache, None)
    named = dict(zip(_names(experts), (_look(one, folder, cache, found.kind) for one in experts), strict=True))
    text = "\n".join(_lines(found, named)) + "\n"
    checked(yaml.safe_load(text), Path("recipe"))
    return text


def _lines(base: Found, experts: Mapping[str, Found]) -> Iterator[str]:
    yield "# sensmerge plan RECIPE says what a run does; sensmerge run RECIPE does it. All keys: docs/recipe.md"
    yield f"name: {_plain(Path(base.model.partition('@')[0]).name)}-merged"
    yield f"base: {_quoted(base.model)}  # {base.about}"
    yield "experts:"
    for name, one in experts.items():
        yield f"  {name}: {{model: {_quoted(one.model)}}}  # {one.about}"
    tasks = {name: one.kind for name, one in experts.items() if one.kind is not None}
    if tasks:
        yield ""
        yield "# With rows of every expert's task, all models are scored, and more methods can be used. Name your files"
        yield "# (JSON Lines, CSV or Parquet; folders and data sets of the hub work too) and uncomment them."
        yield "# tasks:"
        for name, kind in tasks.items():
            yield f"#   {name}:"
            yield f"#     kind: {kind}"
            yield f"#     calibration: {{path: json, data_files: data/{name}/train.jsonl, samples: 64}}"
            yield f"#     evaluation: {{path: json, data_files: data/{name}/test.jsonl, samples: 200}}"
            yield from (f"#     {line}" for line in FIELDS[kind])
    yield ""
    yield "merges:"
    yield from (f"  {line}" for line in _merges(len(experts)))
    if set(tasks) == set(experts):
        yield "  # These need the tasks above:"
        yield from (f"  # {line}" for line in NEED_DATA[: None if len(experts) > 1 else 1])


def _merges(experts: int) -> Iterator[str]:
    if experts == 1:
        yield "mixed: {method: task_arithmetic, weight: [0.25, 0.5, 0.75]}  # three mixtures of base and expert"
        return
    yield "ta: {method: task_arithmetic, weight: [0.3, 0.5, 0.7, 1.0]}  # a sweep: four variants"
    yield "ties: {method: ties, density: 0.3}"
    yield "tsv: {method: tsv_m}"


def _look(text: str, folder: Path, cache: Path, kind: str | None) -> Found:
    """Look at a model; `kind` is that of the base, if it is not the base."""
    listing = resolve(parse_model_id(text, Path()), cache)
    there = [file.name for file in listing.files]
    small = [name for name in (*CONFIGS, *TEMPLATES) if name in there]
    fetch_files(listing, small, cache)
    read = {name: load_object(listing.folder / name) for name in small if name.endswith(".json")}
    size = decimal(weight_bytes(listing))
    model = _model(text, folder, listing)
    if ADAPTER_CONFIG in read and CONFIG not in read:
        adapter = read[ADAPTER_CONFIG]
        own = KINDS_OF_ADAPTERS.get(str(adapter.get("task_type")), kind)
        return Found(model, _comment(f"adapter, rank {adapter.get('r')}", size), _chatting(own, kind, read, there))
    config = read.get(CONFIG, {})
    classes = config.get("architectures")
    name = str(classes[0]) if isinstance(classes, list) and classes else "no class named"
    dtype = config.get("dtype") or config.get("torch_dtype")
    own = next((one for end, one in KINDS_OF_CLASSES.items() if name.endswith(end)), None)
    if own == "classification" and len(config.get("id2label") or {}) == 1:
        own = "regression"
    if own == "seq2seq" and not config.get("is_encoder_decoder"):  # it reads pictures or sound as well
        own = None
    return Found(model, _comment(name, size, dtype), _chatting(own, kind, read, there))


def _chatting(
    own: str | None, base: str | None, read: Mapping[str, Mapping[str, Any]], there: Sequence[str]
) -> str | None:
    """Return chat for a language model with a chat template, which may be the base's; else the kind that it has."""
    has_template = TEMPLATES[0] in there or bool(read.get(TEMPLATES[1], {}).get("chat_template"))
    return "chat" if own in ("completion", "chat") and (has_template or base == "chat") else own


def _comment(*parts: object) -> str:
    """Return what files say as a part of a line, whatever they say."""
    return re.sub(r"[^\x20-\x7e]", "?", ", ".join(str(part)[:60] for part in parts if part))


def _model(text: str, folder: Path, listing: Listing) -> str:
    """Return a model as a recipe in a folder says it; one of the hub with its commit."""
    if isinstance(listing.source, HubModel):
        return f"hub:{listing.source.repo}@{listing.revision}"
    if isinstance(listing.source, UrlModel):
        return listing.source.url
    path = Path(text).expanduser()
    return text if path.is_absolute() or text.startswith("~") else os.path.relpath(path, folder)


def _names(experts: Sequence[str]) -> list[str]:
    """Return a name for every expert: the last part of where it is, and a number if others are called so too."""
    names: list[str] = []
    for text in experts:
        last = _plain(Path(text.removeprefix("hub:").partition("@")[0]).absolute().name)
        number = 2
        name = last
        while name in (*names, "base", "ta", "ties", "tsv", "mixed", "regmean", "tuned", "ta-sens", "ta-se"):
            name, number = f"{last}-{number}", number + 1
        names.append(name)
    return names


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).lstrip("._-")[:80] or "model"


def _quoted(text: str) -> str:
    """Return a text as YAML says it in a line, in quotes where it needs them."""
    return yaml.safe_dump([text], default_flow_style=True, width=10**6, allow_unicode=True).strip()[1:-1]


def check_target(target: Path) -> None:
    """Refuse a file for a recipe that is there already, or whose folder is not.

    Raises:
        InputError: one of these.
    """
    if target.exists():
        raise InputError(f"-o {target}: exists; name a file that does not")
    if not target.absolute().parent.is_dir():
        raise InputError(f"-o {target}: folder {target.absolute().parent} does not exist; make it first")
