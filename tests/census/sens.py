"""Sensitivities and distances of the census, against plain autograd and plain logits."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from sensmerge.tasks.artifacts import read_json
from sensmerge.tasks.checkpoints.layers import layer_of
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.completion import CompletionTask
from sensmerge.tasks.networks.placement import Placement
from tests.census.cases import EXPERTS, ROWS, Case
from tests.conftest import TaskRows, cross_task_job, do_job, make_tokenizer, measure_sensitivity

TOLERANCE = 2e-4
"""Of float32 numbers that are summed up in another order, relative."""
TASK = CompletionTask(kind="completion")
SENS = {"method": "task_arithmetic", "weight": 0.5, "coefficients": {"kind": "sens"}}


def whole(case: Case) -> str:
    """Sensitivities of a network that runs whole."""
    return _accepted(case, "whole", lambda: _sensitivities(case, "whole"))


def streamed(case: Case) -> str:
    """Sensitivities of a network that runs block by block."""
    return _accepted(case, "streamed", lambda: _sensitivities(case, "streamed"))


def distances(case: Case) -> str:
    """Distances of the experts' logits."""
    return _accepted(case, "whole", lambda: _distances(case))


def _accepted(case: Case, placement: str, tried: Callable[[], str]) -> str:
    try:
        case.plan(
            case.recipe("full", SENS, placement=placement),
            tried.__qualname__.replace("<", "").replace(">", "") + placement,
        )
    except InputError as error:
        return f"refused: {error}"
    try:
        return tried()
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"


def _batch(row: Mapping[str, object], labels: bool) -> dict[str, torch.Tensor]:
    tokenizer = make_tokenizer()
    prompt, completion = (tokenizer(str(row[key]))["input_ids"] for key in ("prompt", "completion"))
    ids = torch.tensor([[*prompt, *completion, tokenizer.eos_token_id]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if labels:
        batch["labels"] = ids.clone()
        batch["labels"][:, : len(prompt)] = -100
    return batch


def _layers(network: PreTrainedModel, folder: Path) -> dict[str, str]:
    """Return the layer of each parameter by the name that transformers saves it under: each is saved as its number."""
    marked, names = copy.deepcopy(network), [name for name, _ in network.named_parameters()]
    with torch.no_grad():
        for number, parameter in enumerate(marked.parameters()):
            parameter.fill_(number + 1000)  # no value of a buffer
    marked.save_pretrained(folder)
    saved = load_file(folder / "model.safetensors")
    numbers = {int(one): layer_of(name) for name, tensor in saved.items() for one in tensor.unique().tolist()}
    return {name: numbers[number + 1000] for number, name in enumerate(names)}


def _plain(network: PreTrainedModel, rows: list[dict[str, object]], layers: Mapping[str, str]) -> dict[str, float]:
    """Σ |p · ∂L/∂p| by layer, mean over rows; L is what transformers has labels for, without what a router adds."""
    network.config.use_cache = False
    if hasattr(network.config.get_text_config(), "output_router_logits"):
        network.config.get_text_config().output_router_logits = False
    totals: dict[str, float] = {}
    for row in rows:
        network.zero_grad()
        network(**_batch(row, labels=True)).loss.backward()
        for name, parameter in network.named_parameters():
            if parameter.grad is not None:
                products = (parameter.detach().double() * parameter.grad.double()).abs().sum()
                totals[layers[name]] = totals.get(layers[name], 0.0) + float(products) / len(rows)
    return totals


def _sensitivities(case: Case, placement: Placement) -> str:
    name = EXPERTS[0]
    expert, out = case.experts("full")[name], case.folder / f"sensitivity-{placement}"
    out.mkdir()
    found = measure_sensitivity(case.base, expert, TASK, ROWS[name], out, placement=placement)
    network = case.network(expert)
    expected = _plain(network, ROWS[name], _layers(network, out / "marked"))
    ours, theirs = ({key: value for key, value in one.items() if value} for one in (found, expected))
    if ours.keys() != theirs.keys():
        return f"wrong: {len(ours)} layers for {len(theirs)}: {sorted(ours.keys() ^ theirs.keys())[:4]}"
    worst = max(abs(ours[key] - value) / value for key, value in theirs.items())
    return "right" if worst < TOLERANCE else f"wrong: off by {worst:.1e}"


def _distances(case: Case) -> str:
    out, experts = case.folder / "distances", case.experts("full")
    out.mkdir()
    do_job(cross_task_job(case.base, experts, {name: TaskRows(TASK, ROWS[name]) for name in EXPERTS}), out)
    found = read_json(out / "distances.json")
    first, second = (case.network(folder) for folder in experts.values())
    worst = 0.0
    for i, j in (EXPERTS, reversed(EXPERTS)):
        norms = []
        for row in ROWS[j]:
            with torch.no_grad():
                a, b = (one(**_batch(row, labels=False), use_cache=False).logits for one in (first, second))
                apart = a - b
            norms.append(apart[0].double().norm(dim=-1).mean())
        expected = float(torch.stack(norms).mean())
        worst = max(worst, abs(found[i][j] - expected) / expected)
    return "right" if worst < TOLERANCE else f"wrong: off by {worst:.1e}"
