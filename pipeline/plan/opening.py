"""Base and experts, opened as far as headers go: by the classes of transformers that read them, or by name."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from sensmerge.pipeline.plan.models import about
from sensmerge.pipeline.plan.opened import Opened, OwnHead
from sensmerge.pipeline.plan.processor import choose_processor
from sensmerge.pipeline.plan.seen import Tokenizer
from sensmerge.pipeline.plan.tokenizer import Unopened, choose_tokenizer, tokenizer_by_name
from sensmerge.pipeline.recipe.schema import ModelFiles, Recipe
from sensmerge.pipeline.store.store import Store
from sensmerge.tasks.artifacts import load_object
from sensmerge.tasks.checkpoints.by_name import base_by_name, expert_by_name
from sensmerge.tasks.checkpoints.checkpoint import Checkpoint, FilesNeeded, checkpoint_of, indexed_tensors, viewed
from sensmerge.tasks.checkpoints.checkpoint import open_checkpoint as open_local
from sensmerge.tasks.checkpoints.companions import CONFIG
from sensmerge.tasks.checkpoints.layers import block_names, group_by_layer
from sensmerge.tasks.checkpoints.listing import Listing, LocalModel
from sensmerge.tasks.checkpoints.quantised import WAY_OUT, quantisation
from sensmerge.tasks.checkpoints.settings import SettingDifference, listed, stated_differences
from sensmerge.tasks.checkpoints.source import fetch_files, safetensors_header, small_files
from sensmerge.tasks.checkpoints.stems import CONSOLIDATED, INDEXED, SAFETENSORS, SHARDED, find_stem
from sensmerge.tasks.checkpoints.weights import BaseWeights
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.adapter import ADAPTER_WEIGHTS
from sensmerge.tasks.networks.base import Base, open_base
from sensmerge.tasks.networks.classes import class_names
from sensmerge.tasks.networks.compare import differences
from sensmerge.tasks.networks.expert import Expert, is_adapter, open_expert
from sensmerge.tasks.networks.foreign import check_foreign
from sensmerge.tasks.networks.known import known_config, lacking_package, why_unknown


@dataclass(frozen=True)
class _Files(Unopened):
    """What is here of a model before its weights are."""

    key: str
    """of the recipe"""
    model: ModelFiles

    @property
    def where(self) -> str:
        """What names it in messages."""
        return f"{self.key}: {self.folder}"

    def checkpoint(self) -> Checkpoint:
        """See `Unopened`."""
        return open_local(self.folder, True) if self.model.dequantize and not self.headers else super().checkpoint()

    @contextmanager
    def about(self) -> Iterator[None]:
        """Name the recipe key, and the layout of files that may not be the base's, in what is said of bad input."""
        names = [path.name for path in self.folder.iterdir()]
        try:
            with about(self.key):
                yield
        except InputError as error:
            if find_stem(names) != CONSOLIDATED:
                raise
            raise InputError(f"{error} (consolidated files are in Mistral's own layout, as a rule)") from error


def open_models(recipe: Recipe, listings: Mapping[str, Listing], store: Store) -> Opened:
    """Open base and experts; where a merge alone is made of what no class of transformers reads, by name.

    Raises:
        InputError: models that cannot be merged; a recipe with tasks, of models that are only to be merged by name.
    """
    cache = store.hub_cache
    models: dict[str, _Files] = {}
    for name, model in recipe.models().items():
        key = name if name == "base" else f"experts.{name}"
        with about(key):
            folder, headers = (
                small_files(listings[name], cache),
                _remote_headers(listings[name], model.dequantize, cache),
            )
            models[name] = _Files(listings[name], folder, headers, key, model)
    why = _why_by_name(models)
    chosen: tuple[Tokenizer, list[str]] | None = None
    while True:
        if why and recipe.tasks:
            raise InputError(
                f"tasks: {why}, so these models are merged by the names of their tensors, and no network can be run; "
                "leave tasks out, and all that needs them: application se, coefficients sens, tune, calibrate, methods "
                "with statistics"
            )
        try:
            if why:
                return _by_name(recipe, models, why)
            if recipe.reads == "pictures":
                chosen = chosen or choose_processor(recipe, models, store)
            chosen = chosen or choose_tokenizer(recipe.tokenizer, models, cache)
            return _by_class(recipe, models, *chosen)
        except FilesNeeded as needed:
            seen = {} if chosen is None else chosen[0].seen
            places = {name: {one.folder, seen[name].folder if name in seen else None} for name, one in models.items()}
            fetch_files(listings[next(name for name in models if needed.folder in places[name])], needed.files, cache)
        except InputError as error:
            why = None if why else lacking_package(error)
            if why is None:
                raise


def _remote_headers(listing: Listing, dequantize: bool, cache: Path) -> Checkpoint | None:
    """Return the headers of a hub model whose weights are not here yet; None where the folder has them."""
    names = {file.name for file in listing.files}
    if isinstance(listing.source, LocalModel) or not any(file.name in names for file in listing.missing()):
        return None
    if ADAPTER_WEIGHTS in names:
        return Checkpoint(listing.folder, safetensors_header(listing, ADAPTER_WEIGHTS, cache))
    stem = find_stem(names)
    if stem is None:
        return open_local(listing.folder)  # says what is wrong
    whole = f"{stem}{SAFETENSORS}"
    if whole in names:
        return checkpoint_of(listing.folder, safetensors_header(listing, whole, cache), stem, dequantize)
    index = listing.folder / f"{stem}{INDEXED}"
    tensors = indexed_tensors(index, lambda file: safetensors_header(listing, file, cache))
    return checkpoint_of(listing.folder, tensors, stem, dequantize)


def _by_class(recipe: Recipe, models: Mapping[str, _Files], tokenizer: Tokenizer, said: Sequence[str]) -> Opened:
    """Open base and experts in the tokenizer's vocabulary; where one unties what the base ties, all are seen so."""
    seen = {name: one.folder for name, one in models.items()} | {k: one.folder for k, one in tokenizer.seen.items()}
    headers = {name: one.headers and viewed(replace(one.headers, folder=seen[name])) for name, one in models.items()}
    try:
        with about("base"):
            base = open_base(seen["base"], headers["base"])
        experts = {}
        for name, expert in recipe.experts.items():
            with models[name].about():
                experts[name] = open_expert(seen[name], base, models[name].key, headers[name], expert.config == "base")
    except InputError as error:
        raise InputError(tokenizer.as_given(str(error))) from error
    base = next((one.base for one in experts.values() if one.base.untied), base)
    experts = {name: expert.on(base) for name, expert in experts.items()}
    notes = (*base.notes, *(note for one in experts.values() for note in one.notes))
    notes = tuple(map(tokenizer.as_given, notes))
    classes = tuple(_agreed_classes(base, experts))
    return Opened(base, experts, tokenizer, notes, tuple(said), False, _own_heads(experts), classes)


def _own_heads(experts: Mapping[str, Expert]) -> dict[str, OwnHead]:
    found = {}
    for name, one in experts.items():
        if one.head:
            config = {key: value for key, value in json.loads(one.config.to_json_string()).items() if key != "dtype"}
            found[name] = OwnHead(json.dumps(config, indent=2) + "\n", one.network, one.base_config)
    return found


def _agreed_classes(base: Base, experts: Mapping[str, Expert]) -> list[str]:
    """Return the names of the classes of experts whose heads are merged, where the base's config names none.

    Raises:
        InputError: the experts do not agree on them.
    """
    if not base.names.has_task_head or class_names(base.config):
        return []
    named: dict[str, list[str]] = {}
    for name, expert in experts.items():
        classes = class_names(expert.config)
        if classes and expert.network == base.names.network and not expert.head:
            named[name] = classes
    first, *others = named or [""]
    for name in others:
        if named[name] != named[first]:
            raise InputError(
                f"experts.{name}: its classes are {', '.join(named[name][:5])}, those of experts.{first} are "
                f"{', '.join(named[first][:5])}, and the base's config names none to tell which is which; name them in "
                f"id2label and label2id of a copy of the base's config.json"
            )
    return named[first] if first else []


# By name -------------------------------------------------------------------------------------------------------------


def _why_by_name(models: Mapping[str, _Files]) -> str | None:
    """Return for which model, and why, all are merged by name; None where classes of transformers read them."""
    for one in models.values():
        if one.model.dequantize:
            return f"{one.key}.dequantize is set"
        with about(one.key):
            why = why_unknown(one.folder)
        if why is not None:
            return f"{one.key}: {why}"
    return None


def _by_name(recipe: Recipe, models: Mapping[str, _Files], why: str) -> Opened:
    """Open base and experts, whose tensors have the same names and shapes.

    Raises:
        InputError: they have not, or an expert has other settings than the base, or is an adapter.
        FilesNeeded: tensors must be compared whose files are not here yet.
    """
    sources = {name: _checked(one, why) for name, one in models.items()}
    base = base_by_name(sources["base"], models["base"].where)
    layers, blocks = group_by_layer(base.weights), block_names(base.weights)
    notes = [
        f"{why}: names of tensors are taken as they are, by no class of transformers; the base has {len(base.weights)} "
        f"in {len(layers)} layers, {len(blocks)} of them numbered"
    ]
    experts = {}
    for name, expert in recipe.experts.items():
        one = models[name]
        with one.about():
            experts[name] = expert_by_name(sources[name], base, one.where)
        notes += _compare_settings(one, models["base"], expert.config == "base")
    notes += _unsplit(recipe, base)
    notes += [f"{models[name].key}: {note}" for name, source in sources.items() for note in source.notes]
    tokenizer, said = tokenizer_by_name(recipe.tokenizer, {name: one.folder for name, one in models.items()})
    return Opened(base, experts, tokenizer, tuple(notes), tuple(said), True, {}, ())


def _unsplit(recipe: Recipe, base: BaseWeights) -> list[str]:
    """Return a line if merged models are in one file that is larger than the recipe's shards."""
    size, stem = sum(base.info(name).nbytes for name in base.weights), base.checkpoint.stem
    larger = [name for name, variant in recipe.merges.items() if variant.shard_size < size]
    if stem in SHARDED or not larger:
        return []
    return [
        f"merges.{larger[0]}.shard_size: merged models are in one file, {stem}{SAFETENSORS}, as the base is: what "
        "reads files of that name knows no shards"
    ]


def _checked(one: _Files, why: str) -> Checkpoint:
    """Return the tensors of a model, which is no adapter and not quantised but as its recipe allows."""
    if is_adapter(one.folder, one.headers, one.key):
        raise InputError(f"{one.where} is an adapter, which needs a network ({why}); merge it into its base first")
    path = one.folder / CONFIG
    if path.is_file():
        check_foreign(path)
    found = quantisation(load_object(path)) if path.is_file() and not one.model.dequantize else None
    if found:
        raise InputError(
            f"{one.key}: {path}: the weights are quantised ({found}); expected float weights, without that key: "
            f"{WAY_OUT}"
        )
    with about(one.key):
        checkpoint = one.checkpoint()
    if one.model.dequantize and not checkpoint.scales:
        raise InputError(f"{one.key}.dequantize: {one.folder} has no tensor in fp8; leave the key out")
    return checkpoint


def _compare_settings(expert: _Files, base: _Files, base_config: bool) -> list[str]:
    """Compare the configs of an expert and its base, and return what a user should know of it.

    Raises:
        InputError: they differ in settings, without `base_config`.
    """
    if not ((expert.folder / CONFIG).is_file() and (base.folder / CONFIG).is_file()):
        return [f"{expert.where}: its settings are not compared with the base's, for there is no {CONFIG} of both"]
    unlike = _unlike(expert.folder, base.folder)
    if unlike and not base_config:
        raise InputError(
            f"{expert.where} has other settings than the base: {listed(unlike)}; expected those of the base: set "
            f"{expert.key}.config: base to merge it all the same"
        )
    return [f"{expert.where}: merged models have the base's settings, not its {listed(unlike)}"] if unlike else []


def _unlike(expert: Path, base: Path) -> list[SettingDifference]:
    ours, theirs = known_config(base), known_config(expert)
    if ours is not None and type(theirs) is type(ours):
        return differences(theirs, ours, own_head=False)
    return stated_differences(*({**load_object(folder / CONFIG)} for folder in (expert, base)))
