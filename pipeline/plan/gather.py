"""What a recipe names from outside, read as far as headers go, and checked against each other."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from sensmerge.pipeline.plan.inputs import Inputs
from sensmerge.pipeline.plan.kept_models import find_models, is_plain, keep_models, models_name
from sensmerge.pipeline.plan.kinship import other_bases
from sensmerge.pipeline.plan.opened import Opened
from sensmerge.pipeline.recipe.schema import Recipe
from sensmerge.pipeline.store.store import Store
from sensmerge.tasks.checkpoints.layers import group_by_layer
from sensmerge.tasks.checkpoints.listing import Listing
from sensmerge.tasks.checkpoints.weights import BaseWeights
from sensmerge.tasks.coefficients import ExplicitCoefficients, matches
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.urls import public_text

if TYPE_CHECKING:  # transformers takes seconds, which a merge of weights alone does not wait for
    from sensmerge.pipeline.plan.rows import TaskRows

_NORMALIZE = ("normalize", "normalize_weights")
"""Settings by which methods divide weights by their sum."""


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
    opened = _opened(recipe, listings, store)
    _check_layers(recipe, opened.base)
    _check_totals(recipe, opened.base)
    if opened.by_name:
        _check_order(recipe)
    notes = [*opened.notes, *other_bases(opened.experts, listings).values(), *_idle_weights(recipe)]
    if opened.base.statistics:
        notes.append(
            f"base: of {len(opened.base.statistics)} buffers with statistics, such as {min(opened.base.statistics)}, "
            "merged models have the experts' mean, whatever the method"
        )
    data: Mapping[str, TaskRows] = {}
    if recipe.tasks:
        from sensmerge.pipeline.plan.networks import gather_data  # see above

        data, said = gather_data(recipe, opened, folder)
        notes += said
    else:
        notes += opened.about_tokenizer
    said_of = {field.name: getattr(opened, field.name) for field in fields(opened)}
    return Inputs(**said_of | {"notes": tuple(map(public_text, notes))}, listings=listings, data=data)


def _opened(recipe: Recipe, listings: Mapping[str, Listing], store: Store) -> Opened:
    """Return base and experts: opened anew, or, where there is nothing but weights to merge, as they were before."""
    name = models_name(recipe, listings) if is_plain(recipe) else None
    opened = None if name is None else find_models(name)
    if opened is None:
        from sensmerge.pipeline.plan.opening import open_models  # see above

        opened = open_models(recipe, listings, store)
        if name is not None:
            keep_models(name, opened)
    return opened


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
