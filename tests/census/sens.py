"""Sensitivities and distances of the census, against plain autograd and plain logits."""

import copy
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from sensmerge.tasks.artifacts import read_json
from sensmerge.tasks.checkpoints.layers import layer_of
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.placement import Placement
from tests.census.cases import EXPERTS, Case
from tests.conftest import TaskRows, cross_task_job, do_job, measure_sensitivity

TOLERANCE = 2e-4
"""Of float32 numbers that are summed up in another order, relative."""
SENS = {"method": "task_arithmetic", "weight": 0.5, "coefficients": {"kind": "sens"}}
Row = Mapping[str, object]


def whole(case: Case) -> str:
    """Sensitivities of a network that runs whole."""
    return _accepted(case, "whole", lambda: _sensitivities(case, "whole"))


def streamed(case: Case) -> str:
    """Sensitivities of a network that runs block by block."""
    return _accepted(case, "streamed", lambda: _sensitivities(case, "streamed"))


def distances(case: Case) -> str:
    """Distances of the experts' logits."""
    return _accepted(case, "whole", lambda: _distances(case))


@cache
def _refusal(case: Case, placement: Placement) -> str:
    """Return why plan refuses sens coefficients; nothing if it does not."""
    try:
        case.plan(case.recipe("full", SENS, placement=placement), placement)
    except InputError as error:
        return f"refused: {error}"
    return ""


def _accepted(case: Case, placement: Placement, tried: Callable[[], str]) -> str:
    if said := _refusal(case, placement):
        return said
    try:
        return tried()
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"


def inputs_of(case: Case, row: Row) -> dict[str, Tensor]:
    """Return what a network reads of a row."""
    if case.reads_pictures:
        return {"pixel_values": case.pixels(row)}
    tokenizer = case.tokenizer
    if case.classifies or case.writes:
        ids = tokenizer(str(row["text" if case.classifies else "prompt"]))["input_ids"]
    else:
        prompt, completion = (tokenizer(str(row[key]))["input_ids"] for key in ("prompt", "completion"))
        ids = [*prompt, *completion, tokenizer.eos_token_id]
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}


def labels_of(case: Case, row: Row, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return what the loss of a row is taken on: its class, or its tokens with −100 where none counts."""
    if case.classifies:
        return torch.tensor([row["label"]])
    if case.writes:
        return torch.tensor([case.tokenizer(text_target=str(row["completion"]))["input_ids"]])
    labels = inputs["input_ids"].clone()
    labels[:, : len(case.tokenizer(str(row["prompt"]))["input_ids"])] = -100
    return labels


def _layers(case: Case, network: PreTrainedModel, folder: Path) -> dict[str, str]:
    """Return the layer of each parameter by the name that transformers saves it under: each is saved as its number.

    Of a classifier these are the parameters of its trunk, by their names there: the head is the expert's own.
    """
    marked, names = copy.deepcopy(network), [name for name, _ in network.named_parameters()]
    with torch.no_grad():
        for number, parameter in enumerate(marked.parameters()):
            parameter.fill_(number + 1000)  # no value of a buffer
    marked.save_pretrained(folder)
    prefix = f"{network.base_model_prefix}." if case.classifies else ""
    saved = {name: one for name, one in load_file(folder / "model.safetensors").items() if name.startswith(prefix)}
    numbers = {
        int(one): layer_of(name.removeprefix(prefix)) for name, tensor in saved.items() for one in tensor.unique()
    }
    return {name: numbers[number + 1000] for number, name in enumerate(names) if number + 1000 in numbers}


def _plain(case: Case, network: PreTrainedModel, name: str, layers: Mapping[str, str]) -> dict[str, float]:
    """Σ |p · ∂L/∂p| by layer, mean over rows; L is what transformers has labels for, without what a router adds."""
    network.config.use_cache = False
    if hasattr(network.config.get_text_config(), "output_router_logits"):
        network.config.get_text_config().output_router_logits = False
    totals: dict[str, float] = {}
    for row in case.rows[name]:
        network.zero_grad()
        inputs = inputs_of(case, row)
        network(**inputs, labels=labels_of(case, row, inputs)).loss.backward()
        for parameter_name, parameter in network.named_parameters():
            if parameter.grad is not None and parameter_name in layers:
                products = (parameter.detach().double() * parameter.grad.double()).abs().sum()
                layer = layers[parameter_name]
                totals[layer] = totals.get(layer, 0.0) + float(products) / len(case.rows[name])
    return totals


def _sensitivities(case: Case, placement: Placement) -> str:
    name = EXPERTS[0]
    expert, out = case.experts("full")[name], case.folder / f"sensitivity-{placement}"
    out.mkdir()
    found = measure_sensitivity(case.base, expert, case.task, [*case.rows[name]], out, placement=placement)
    network = case.network(expert)
    expected = _plain(case, network, name, _layers(case, network, out / "marked"))
    ours, theirs = ({key: value for key, value in one.items() if value} for one in (found, expected))
    if ours.keys() != theirs.keys():
        return f"wrong: {len(ours)} layers for {len(theirs)}: {sorted(ours.keys() ^ theirs.keys())[:4]}"
    worst = max(abs(ours[key] - value) / value for key, value in theirs.items())
    return "right" if worst < TOLERANCE else f"wrong: off by {worst:.1e}"


def _distances(case: Case) -> str:
    out, experts = case.folder / "distances", case.experts("full")
    out.mkdir()
    sets = {name: TaskRows(case.task, [*case.rows[name]]) for name in EXPERTS}
    do_job(cross_task_job(case.base, experts, sets), out)
    found = read_json(out / "distances.json")
    worst = 0.0
    for i, j in (EXPERTS, tuple(reversed(EXPERTS))):
        own = case.network(experts[j])
        other = with_head(case.network(experts[i]), own) if case.classifies else case.network(experts[i])
        norms = []
        for row in case.rows[j]:
            with torch.no_grad():
                inputs = inputs_of(case, row) | ({} if case.classifies else {"use_cache": False})
                inputs |= {"labels": labels_of(case, row, inputs)} if case.writes else {}
                apart = own(**inputs).logits - other(**inputs).logits
            norms.append(apart[0].double().norm(dim=-1).mean())
        expected = float(torch.stack(norms).mean())
        worst = max(worst, abs(found[i][j] - expected) / expected)
    return "right" if worst < TOLERANCE else f"wrong: off by {worst:.1e}"


def with_head(network: PreTrainedModel, head: PreTrainedModel) -> PreTrainedModel:
    """Return the trunk of a network with the head of another."""
    joined = copy.deepcopy(head)
    setattr(joined, joined.base_model_prefix, network.base_model)
    return joined
