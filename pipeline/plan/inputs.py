"""The models and data that a recipe names, resolved, read as far as headers go, and checked against each other."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sensmerge.pipeline.plan.few import few_rows
from sensmerge.pipeline.plan.kinds import check_kinds
from sensmerge.pipeline.plan.kinship import other_bases
from sensmerge.pipeline.plan.opening import open_models
from sensmerge.pipeline.plan.rows import RowUse, TaskRows, Tuning, gather_rows
from sensmerge.pipeline.plan.statistics import takes_losses
from sensmerge.pipeline.plan.tokenizer import Tokenizer
from sensmerge.pipeline.recipe.schema import Recipe
from sensmerge.pipeline.recipe.variant import Variant
from sensmerge.pipeline.store.store import Store
from sensmerge.tasks.checkpoints.layers import group_by_layer
from sensmerge.tasks.checkpoints.listing import Listing
from sensmerge.tasks.checkpoints.weights import BaseWeights, ExpertWeights
from sensmerge.tasks.coefficients import ExplicitCoefficients, matches
from sensmerge.tasks.dynamic.application import SeApplication
from sensmerge.tasks.dynamic.network import trunk_blocks
from sensmerge.tasks.dynamic.parameters import holdings
from sensmerge.tasks.dynamic.trial import try_network
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.methods.settings import WIDENED, combinations
from sensmerge.tasks.networks.base import Base
from sensmerge.tasks.networks.classes import class_names
from sensmerge.tasks.networks.expert import Expert
from sensmerge.tasks.networks.networks import load_tokenizer, skeleton, trunk_name
from sensmerge.tasks.networks.readers import load_reader
from sensmerge.tasks.urls import public_text

_NORMALIZE = ("normalize", "normalize_weights")
"""Settings by which methods divide weights by their sum."""


class Networks(NamedTuple):
    """Base and experts, read by classes of transformers."""

    base: Base
    experts: Mapping[str, Expert]


@dataclass(frozen=True)
class Inputs:
    """All that a recipe names from outside."""

    base: BaseWeights
    experts: Mapping[str, ExpertWeights]
    listings: Mapping[str, Listing]
    """of base and experts by name"""
    data: Mapping[str, TaskRows]
    tokenizer: Tokenizer
    """which all models use"""
    notes: tuple[str, ...] = ()
    """what a user should know of the models and data that are accepted: a line each"""
    classes: tuple[str, ...] = ()
    """what the experts call the classes of a base that does not name them"""

    @property
    def by_name(self) -> bool:
        """Whether tensors are matched by name, by no class of transformers; then there are no networks."""
        return not isinstance(self.base, Base)

    @property
    def networks(self) -> Networks:
        """Base and experts as networks."""
        experts = {name: one for name, one in self.experts.items() if isinstance(one, Expert)}
        assert isinstance(self.base, Base), "models that are merged by name have no tasks"
        return Networks(self.base, experts)

    @property
    def heads(self) -> dict[str, Expert]:
        """The experts that have a head of their own."""
        return {name: one for name, one in self.experts.items() if isinstance(one, Expert) and one.head}

    @property
    def head_configs(self) -> dict[str, str]:
        """Of each of them the JSON of its config; it is loaded in the dtype of the merged trunk, not the expert's."""
        configs = {name: json.loads(one.config.to_json_string()) for name, one in self.heads.items()}
        return {name: json.dumps(_without(one, "dtype"), indent=2) + "\n" for name, one in configs.items()}

    def only_weights(self) -> tuple[BaseWeights, dict[str, ExpertWeights]]:
        """Return base and experts as far as merging needs to know them: small, and read without transformers."""
        base = self.base.only_weights()
        return base, {name: expert.only_weights(base) for name, expert in self.experts.items()}


def gather_inputs(recipe: Recipe, listings: Mapping[str, Listing], folder: Path, store: Store) -> Inputs:
    """Resolve the data of a recipe and check all that headers, configs and rows tell.

    Args:
        recipe: the recipe.
        listings: its models, from `list_models`.
        folder: what its relative paths are relative to.
        store: whose cache has what comes from the hub.

    Raises:
        InputError: models that cannot be merged, data that does not fit its task; it names the recipe's key.
    """
    opened = open_models(recipe, listings, store)
    _check_layers(recipe, opened.base)
    _check_totals(recipe, opened.base)
    notes = [*opened.notes, *other_bases(opened.experts, listings).values(), *_idle_weights(recipe)]
    if opened.base.statistics:
        notes.append(
            f"base: of {len(opened.base.statistics)} buffers with statistics, such as {min(opened.base.statistics)}, "
            "merged models have the experts' mean, whatever the method"
        )
    if not isinstance(opened.base, Base):
        _check_order(recipe)
        notes = [public_text(note) for note in (*notes, *opened.about_tokenizer)]
        return Inputs(opened.base, opened.experts, listings, {}, opened.tokenizer, tuple(notes))
    base, tokenizer = opened.base, opened.tokenizer
    experts = {name: one for name, one in opened.experts.items() if isinstance(one, Expert)}
    classes = _agreed_classes(base, experts)
    check_kinds(recipe.tasks, experts)
    for name, variant in recipe.merges.items():
        if isinstance(variant.application, SeApplication):
            notes += _check_application(f"merges.{name}.application", variant, recipe, base, experts)
    notes += opened.about_tokenizer
    readers = _readers(recipe, tokenizer)
    use = RowUse(bool(recipe.se_variants()), _tuning(recipe), takes_losses(recipe))
    data, said = gather_rows(recipe.tasks, experts, readers, folder, use)
    notes += [*said, *few_rows(data), *_tuning_passes(recipe, data)]
    return Inputs(base, experts, listings, data, tokenizer, tuple(map(public_text, notes)), tuple(classes))


def _readers(recipe: Recipe, tokenizer: Tokenizer) -> dict[str, list[Any]]:
    """Return what reads each task: its expert's tokenizer, if that is another, and that of merged models."""
    tasks = recipe.tasks
    if not tasks:
        return {}
    merged = load_reader(tokenizer.folder, recipe.reads)
    own = {name: load_tokenizer(one.folder) for name, one in tokenizer.readers.items() if name in tasks}
    return {name: [own[name], merged] if name in own else [merged] for name in tasks}


def _check_order(recipe: Recipe) -> None:
    """Refuse what needs more than names: which layers without a number come before the others, or an adapter's base."""
    for name, variant in recipe.merges.items():
        if variant.adapter is not None:
            raise InputError(
                f"merges.{name}.adapter: the experts are whole models, merged by the names of their tensors; leave "
                "adapter out"
            )
        if variant.lines is not None:
            raise InputError(
                f"merges.{name}.lines grows from the first layer to the last, and names alone do not tell whether a "
                "layer without a number is before or behind the others; give the numbered ones weights that change "
                "with depth instead, as coefficients explicit"
            )


def _idle_weights(recipe: Recipe) -> list[str]:
    """Return a line for each variant whose `weight` changes nothing: its method divides weights by their sum."""
    idle = {
        name: one.settings
        for name, one in recipe.merges.items()
        if one.settings.weight not in (0, 1) and not one.settings.depends_on_weight
    }
    return [
        f"merges.{name}.weight: {one.weight:g} changes nothing, for {one.method.name} as it is set divides weights by "
        f"their sum; leave it out{''.join(f', or set {key}: false' for key in _NORMALIZE if hasattr(one.method, key))}"
        for name, one in idle.items()
    ]


def _tuning(recipe: Recipe) -> Tuning:
    """Return what is tuned: how good a variant is cannot be told by the rows that it was made of."""
    splits = {recipe.merges[name].tuning_split for name in recipe.tuned_variants()}
    return "apart" if "held_out" in splits else "on_calibration" if splits else "none"


def _tuning_passes(recipe: Recipe, data: Mapping[str, TaskRows]) -> list[str]:
    """Return a line for each variant that is tuned: what is run for it at most."""
    lines = []
    for name in recipe.tuned_variants():
        variant = recipe.merges[name]
        rows = sum(len(getattr(one, variant.tuning_split)) for one in data.values())
        asked = len(combinations(variant.grid(), variant.default()))
        most = asked + WIDENED * len(variant.tune)
        lines.append(
            f"merges.{name}.tune: {asked} candidates, {most} if the best is at the end of a grid, answer "
            f"{rows} rows each: {asked * rows:,} to {most * rows:,} samples, beside those of the experts"
        )
    return lines


def _without(settings: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != key}


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


def _check_layers(recipe: Recipe, base: BaseWeights) -> None:
    layers = list(group_by_layer(base.weights))
    for name, variant in recipe.merges.items():
        if not isinstance(variant.coefficients, ExplicitCoefficients):
            continue
        for expert, setting in variant.coefficients.weights.items():
            for pattern in setting if isinstance(setting, dict) else ():
                if not any(matches(pattern, layer) for layer in layers):
                    raise InputError(
                        f"merges.{name}.coefficients.weights.{expert}: no layer matches {pattern!r}; "
                        f"the base has {layers[0]} … {layers[-1]}"
                    )
            for layer in layers:
                if isinstance(setting, dict) and not any(matches(pattern, layer) for pattern in setting):
                    raise InputError(
                        f"merges.{name}.coefficients.weights.{expert}: no pattern matches layer {layer}; "
                        'add one for all others first: "*": NUMBER'
                    )


def _check_totals(recipe: Recipe, base: BaseWeights) -> None:
    """Check that statistics by tensor, which are taken in each expert's own network, are of the merged model's tensors.

    An expert that ties what the merged model holds apart has one total for both.
    """
    for name, variant in recipe.merges.items():
        if base.untied and variant.method.statistics:
            raise InputError(
                f"merges.{name}.method: {variant.method.name} reads {', '.join(variant.method.statistics)} of each "
                "tensor, but not all experts tie their embedding and head as the base does; use a method without "
                "statistics, or leave out the experts that do not tie them"
            )


def _check_application(
    key: str, variant: Variant, recipe: Recipe, base: Base, experts: Mapping[str, Expert]
) -> list[str]:
    """Check that the network can be run with coefficients per sample, and has the layer that the route looks at.

    Returns:
        What a user should know of it.
    """
    application, is_calibrated = variant.application, variant.calibrate is not None
    assert isinstance(application, SeApplication)
    head = next(task.head for task in recipe.tasks.values())  # all tasks have one: the schema refuses others
    config = next((expert.config for expert in experts.values() if expert.head), base.config)
    network = skeleton(config, head, base.folder)
    _check_heads(key, trunk_name(network), experts)
    changed = [
        name
        for holding in holdings(base, network)
        if is_calibrated or any(one.touches(tensor) for one in experts.values() for tensor in holding.tensors)
        for name in holding.parameters.values()
    ]
    trial = try_network(config, network, changed, key)
    blocks = len(trunk_blocks(network))
    if application.layer != "auto" and not 1 <= application.layer <= blocks:
        raise InputError(f"{key}.layer is {application.layer}; the model has {blocks} blocks, 1 to {blocks}")
    return trial.notes(network, key)


def _check_heads(key: str, trunk: str, experts: Mapping[str, Expert]) -> None:
    """Check that the experts share one trunk, and that each has a head of its own or none has."""
    lacking = [name for name, expert in experts.items() if not expert.head]
    for name, expert in experts.items():
        own = [parameter for parameter in expert.head if parameter.startswith(f"{trunk}.")]
        if own:
            raise InputError(
                f"{key}: experts.{name} has {own[0]}, which the base lacks, as one that was saved without a pooler "
                "does; take a base that has it, or application: {kind: static}, which keeps each expert's own in heads/"
            )
        if expert.head and lacking:
            raise InputError(
                f"{key}: experts.{name} has its own head, but the head of experts.{lacking[0]} is merged; "
                "use application: {kind: static}"
            )
