"""What `export` does: a variant of a recipe as a configuration of mergekit, with its coefficients as plain numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from sensmerge.pipeline.hashing import hashed
from sensmerge.pipeline.plan.models import list_models
from sensmerge.pipeline.plan.opening import open_models
from sensmerge.pipeline.plan.plan import Plan, make_plan
from sensmerge.pipeline.recipe.export import Made, Reference, check_variant, configuration_of, has_base
from sensmerge.pipeline.recipe.load import load_recipe
from sensmerge.pipeline.recipe.schema import Recipe
from sensmerge.pipeline.store.store import Store
from sensmerge.tasks.artifacts import read_json, sha256_file
from sensmerge.tasks.checkpoints.companions import companions, is_tokenizer_file
from sensmerge.tasks.checkpoints.layers import group_by_layer
from sensmerge.tasks.checkpoints.listing import HubModel, UrlModel
from sensmerge.tasks.coefficients import SensCoefficients
from sensmerge.tasks.errors import InputError, shown
from sensmerge.tasks.methods.contract import Method
from sensmerge.tasks.networks.networks import load_tokenizer
from sensmerge.tasks.stages.merge import MergeJob
from sensmerge.tasks.stages.variant import COEFFICIENTS, TUNE, chosen_values


def export(recipe: Path, overrides: Sequence[str], variant: str, store: Store, console: Console) -> str:
    """Return the configuration of mergekit 0.1.5, as YAML, that makes what a variant of a recipe makes.

    Numbers that are known only once the recipe has run, such as sens coefficients, are read from the store.

    Args:
        recipe: path of the recipe.
        overrides: of its values.
        variant: name of one of its merges.
        store: where what has run is looked for.
        console: told what is read.

    Raises:
        InputError: bad input; mergekit cannot do what the variant says, which is named; the recipe has not run.
    """
    loaded, folder = load_recipe(recipe, overrides), recipe.absolute().parent
    if variant not in loaded.merges:
        raise InputError(f"--variant {variant}: expected one of {', '.join(loaded.merges)}")
    check_variant(f"merges.{variant}", loaded.merges[variant])
    store.make()
    store.look()
    listings = hashed(list_models(loaded, folder, store.hub_cache), store, console)
    plan = _with_networks(make_plan(loaded, folder, store, listings))
    check_models(plan)
    made = _made(plan, variant)
    names = list(loaded.experts)
    references = {name: _reference(plan, name) for name in ("base", *names)}
    donor = _donor(plan, made.method)
    experts = {name: references[name] for name in names}
    found = configuration_of(made, references["base"], experts, references[donor] if donor else None)
    header = "".join(f"# {line}\n" for line in _remarks(plan, made))
    return header + yaml.safe_dump(found, sort_keys=False, allow_unicode=True)


def _with_networks(plan: Plan) -> Plan:
    """Return a plan whose models classes of transformers have read, which that of a merge alone need not have."""
    if plan.recipe.tasks:
        return plan
    opened = open_models(plan.recipe, plan.inputs.listings, plan.store)
    return replace(plan, inputs=replace(plan.inputs, base=opened.base, experts=opened.experts))


def check_models(plan: Plan) -> None:
    """Check that mergekit reads the models as they are read here.

    Raises:
        InputError: it does not, naming the model.
    """
    recipe = plan.recipe
    _check_keys(recipe)
    if plan.inputs.by_name:
        raise InputError("base: its tensors are merged by their names, and mergekit may take other ones; merge it here")
    base, experts = plan.inputs.networks
    for name, listing in plan.inputs.listings.items():
        if isinstance(listing.source, UrlModel):
            raise InputError(
                f"{'' if name == 'base' else 'experts.'}{name}.model: mergekit reads no URL; name a copy of it on this "
                "disk"
            )
        if isinstance(listing.source, HubModel) and listing.source.subfolder:
            raise InputError(
                f"{'' if name == 'base' else 'experts.'}{name}.subfolder: mergekit reads repositories at their top; "
                f"name a copy of {listing.source.subfolder} on this disk"
            )
    for name in plan.inputs.tokenizer.made_heads:
        raise InputError(f"tasks.{name}.zero_shot: mergekit makes no heads; merge the models here")
    if plan.inputs.tokenizer.seen:
        raise InputError("tokenizer: models with several vocabularies are not exported to mergekit; merge them here")
    if base.untied:
        raise InputError("base: an expert holds apart what the base ties; mergekit would lose one of both")
    if base.statistics:
        raise InputError(f"base: holds statistics, {min(base.statistics)}, which mergekit merges as weights")
    if base.stored:
        name, stored = next(iter(base.stored.items()))
        raise InputError(f"base: holds {name} as {stored}, which mergekit cannot find; save it with transformers")
    for name, expert in experts.items():
        if expert.head:
            raise InputError(f"experts.{name}: has a head of its own, {min(expert.head)}; mergekit has nothing like it")
        if expert.pieces:
            raise InputError(
                f"experts.{name}: holds {min(expert.pieces)} in another form than the base; mergekit cannot read that"
            )
        if recipe.experts[name].config != "own" and expert.base_config:
            raise InputError(f"experts.{name}.config: mergekit has nothing like base; leave the expert out")


def _check_keys(recipe: Recipe) -> None:
    """Refuse keys of models and tokenizer that are not understood here."""
    known = {"model", "config", "subfolder"}
    parts: dict[str, Mapping[str, Any]] = {
        f"experts.{name}": {key: value for key, value in one.model_dump(exclude_unset=True).items() if key not in known}
        for name, one in recipe.experts.items()
    }
    dumped = recipe.tokenizer.model_dump(exclude_unset=True)
    parts["tokenizer"] = {key: value for key, value in dumped.items() if key != "source"}
    for where, keys in parts.items():
        for key, value in keys.items():
            raise InputError(f"{where}.{key}: {shown(value)} is not exported to mergekit; leave it out")


def _made(plan: Plan, variant: str) -> Made:
    """Return what a variant's weights are made of.

    Raises:
        InputError: that is not known before the recipe runs; tensors of several dtypes.
    """
    step, base = plan.step("merge", variant), plan.inputs.base
    job = step.job
    assert isinstance(job, MergeJob), "application se has been refused"
    layers = group_by_layer(name for name in base.weights if name not in base.statistics)
    is_known = not (job.tuned or isinstance(job.coefficients, SensCoefficients))
    if not is_known and plan.store.manifest(step.key) is None:
        raise InputError(f"merges.{variant}: its coefficients are not in --store {plan.store}; run the recipe first")
    if job.tuned is not None:
        plan.store.fetch(plan.step("tune", variant).key, (TUNE,))
        job = job.having(job.settings.having(chosen_values(job.tuned.folder)))
    if is_known:
        weights = job.weights()
    else:
        plan.store.fetch(step.key, (COEFFICIENTS,))
        weights = read_json(plan.store.folder(step.key) / COEFFICIENTS)["weights"]
    dtypes = sorted({str(base.dtype(name)).removeprefix("torch.") for name in base.weights})
    if job.out_dtype is None and len(dtypes) > 1:
        raise InputError(f"merges.{variant}.out_dtype: the base's tensors are {', '.join(dtypes)}; choose one dtype")
    return Made(job.method, job.varying, weights, layers, job.out_dtype or dtypes[0])


def _reference(plan: Plan, name: str) -> Reference:
    """Return what mergekit calls a model: a folder, the id of a repository at a commit, or an adapter on the base."""
    listing = plan.inputs.listings[name]
    place = str(listing.source).removeprefix("hub:").partition("@")[0] if listing.revision else str(listing.folder)
    expert = plan.inputs.networks.experts.get(name)
    whole = f"{place}@{listing.revision}" if listing.revision else place
    is_plain = listing.revision is not None or not set("+@") & set(place)
    if expert is None or not expert.is_adapter:
        return whole if is_plain else {"model": {"path": place}}
    base = _reference(plan, "base")
    if is_plain and isinstance(base, str):
        return f"{base}+{whole}"
    lora = {"path": place} | ({"revision": listing.revision} if listing.revision else {})
    return {"model": base["model"] if isinstance(base, dict) else base, "lora": lora}


def _donor(plan: Plan, method: Method) -> str | None:
    """Return the model whose tokenizer the configuration has to name; None where mergekit takes that by itself.

    It takes the base's, or of a configuration without a base that of any of its models.

    Raises:
        InputError: no model has the merged models' tokenizer, or mergekit would change the embedding to fit it.
    """
    inputs, asked = plan.inputs, f"tokenizer.source: {plan.recipe.tokenizer.source}"
    merged = _tokenizer_files(inputs.tokenizer.folder)
    owners = {name: "base" if one.is_adapter else name for name, one in inputs.networks.experts.items()}
    taken = ["base"] if has_base(method) else list(owners.values())
    candidates = dict.fromkeys([*taken, *owners.values(), "base"])
    same = {name: _tokenizer_files(inputs.listings[name].folder) == merged for name in candidates}
    is_found = has_base(method) or "base" not in taken  # beside an adapter it finds none
    if is_found and all(same[name] for name in taken):
        return None
    found = next((name for name, is_same in same.items() if is_same), None)
    if found is None:
        raise InputError(
            f"{asked} gives merged models a tokenizer that no model of the recipe has; set tokenizer.source: {taken[0]}"
        )
    own = load_tokenizer(inputs.listings[found].folder).get_vocab()
    rows = inputs.networks.base.config.get_text_config().vocab_size
    if own != load_tokenizer(inputs.base.folder).get_vocab() or len(own) != rows:
        raise InputError(
            f"{asked}: mergekit would move or cut the {rows:,} rows of the embedding to fit the {len(own):,} tokens of "
            f"{found}; set tokenizer.source: {taken[0]}"
        )
    return found


def _tokenizer_files(folder: Path) -> dict[str, str]:
    return {name: sha256_file(path) for name, path in companions(folder).items() if is_tokenizer_file(name)}


def _remarks(plan: Plan, made: Made) -> list[str]:
    """Return what a user of the configuration should know: a line each."""
    lines = []
    if hasattr(made.method, "seed"):
        lines.append("mergekit draws other random masks; --random-seed repeats its own")
    if any(one.is_adapter for one in plan.inputs.networks.experts.values()):
        lines.append("run with --lora-merge-cache FOLDER --lora-merge-dtype float32: it merges adapters beforehand")
    return lines
