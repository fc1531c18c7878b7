"""Merges of adapters that are to be adapters: whether they can be, and what their job has beside other merges."""

from collections.abc import Collection
from typing import Any

from sensmerge.pipeline.plan.inputs import Inputs
from sensmerge.pipeline.recipe.variant import Variant
from sensmerge.tasks.checkpoints.listing import HubModel, Listing, LocalModel, UrlModel
from sensmerge.tasks.checkpoints.weights import layer_groups
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.adapted import AdaptedNetwork
from sensmerge.tasks.networks.adapter_files import AdapterForm
from sensmerge.tasks.networks.expert import Expert
from sensmerge.tasks.stages.merge_adapter import AdaptedWeight, MergeAdapterJob


def adapter_job(key: str, variant: Variant, inputs: Inputs, fields: dict[str, Any]) -> MergeAdapterJob:
    """Return the job that merges a variant of adapters into an adapter.

    Args:
        key: of the variant, for messages.
        variant: the variant, with `adapter`.
        inputs: the recipe's models.
        fields: of its `VariantJob`.

    Raises:
        InputError: an expert that is no adapter, or holds what no factors can; the rank is missing.
    """
    assert variant.adapter is not None
    base, experts = inputs.networks
    for name in inputs.tokenizer.made_heads:
        raise InputError(f"{key}.adapter: experts.{name} is a whole vision tower; leave adapter out")
    if inputs.tokenizer.seen:
        raise InputError(
            f"{key}.adapter: merged models have another vocabulary than the base ({', '.join(inputs.tokenizer.seen)}), "
            "which no adapter of it can; leave adapter out"
        )
    source = inputs.listings["base"].source
    if isinstance(source, HubModel) and source.subfolder:
        raise InputError(
            f"{key}.adapter: no adapter's config can say that its base is in {source.subfolder} of {source.repo}; "
            "leave adapter out, or name a copy of the base on this disk"
        )
    network = AdaptedNetwork(base)
    for name, expert in experts.items():
        _check_expert(f"{key}.adapter", name, expert, network)
    if inputs.base.untied:
        raise InputError(f"{key}.adapter: an expert unties what the base ties, which no adapter can; leave adapter out")
    adapted = {
        tensor: AdaptedWeight(network.module(tensor), network.is_transposed(tensor))
        for tensor in inputs.base.weights
        if any(tensor in expert.low_rank for expert in inputs.experts.values())
    }
    whole = _stored_whole(f"{key}.adapter", inputs, network, {one.module for one in adapted.values()})
    names = {tensor: name for module in whole.values() for name, tensor in module.items()}
    tied = {alias: name for alias, name in network.tied.items() if name in names.values()}
    groups = [[name for name in group if name in adapted or name in names] for group in layer_groups(fields["base"])]
    job = MergeAdapterJob(
        **fields | {"shard_size": 0, "layout": None, "groups": tuple(tuple(group) for group in groups if group)},
        adapter=variant.adapter,
        out_dtype=variant.out_dtype or "float32",
        form=AdapterForm(*base_of(inputs.listings["base"]), network.task_type, tuple(whole), bool(tied)),
        adapted=adapted,
        whole=names,
        tied=tied,
    )
    try:
        job.check_rank()
    except InputError as error:
        raise InputError(f"{key}.{error}") from None
    return job


def base_of(listing: Listing) -> tuple[str, str | None]:
    """Return what an adapter's config calls its base, and the base's commit: a hub id; a folder or URL has none."""
    source = listing.source
    match source:
        case HubModel():
            return source.repo, listing.revision
        case UrlModel():
            return source.url, None
        case LocalModel():
            return str(source.folder), None


def written_bytes(inputs: Inputs, job: MergeAdapterJob) -> int:
    """Return the size of an adapter's factors."""
    total = 0
    for tensor in job.adapted:
        ranks = [
            one.source.tensors[one.low_rank[tensor].first].shape[0]
            for one in inputs.experts.values()
            if tensor in one.low_rank
        ]
        total += (job.adapter.rank or sum(ranks)) * sum(inputs.base.info(tensor).shape)
    return total * (4 if job.out_dtype == "float32" else 2) + sum(inputs.base.info(one).nbytes for one in job.whole)


def _stored_whole(
    key: str, inputs: Inputs, network: AdaptedNetwork, adapted: Collection[str]
) -> dict[str, dict[str, str]]:
    """Return the modules that some experts store whole, each with its tensors by their names in the network."""
    found = {}
    for name, expert in inputs.experts.items():
        for tensor in expert.own:
            module = network.whole_module(tensor, adapted)
            if module is None or not set(module[1].values()) <= {*inputs.base.weights} - inputs.base.statistics:
                raise InputError(
                    f"{key}: experts.{name} stores {tensor} whole (modules_to_save), but not all experts do, or it "
                    "belongs to no module that the merge can store whole; leave adapter out"
                )
            found[module[0]] = module[1]
    return found


def _check_expert(key: str, name: str, expert: Expert, network: AdaptedNetwork) -> None:
    where = f"{key}: experts.{name}"
    if not expert.is_adapter:
        raise InputError(f"{where} is a whole model; expected LoRA adapters (`extract` makes one of it)")
    if expert.head:
        raise InputError(f"{where} has a head of its own, {min(expert.head)}; leave adapter out")
    if expert.pieces:
        raise InputError(
            f"{where} adapts parts of {min(expert.pieces)}, which the base holds stacked; leave adapter out"
        )
    for tensor in expert.low_rank:
        if why := network.why_not(tensor):
            raise InputError(f"{where} adapts {tensor}, of which the merge can have no factors: {why}")
