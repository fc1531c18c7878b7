"""SE-Merging of the census, against weights that are written out for each sample."""

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from sensmerge.tasks.dynamic.model import DynamicModel, Routes
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.generation import generate
from sensmerge.tasks.networks.tokens import Inputs
from tests.census.cases import Case, do, statistics

SE = {"method": "task_arithmetic", "weight": 0.5, "application": {"kind": "se", "fallback": 0}}
TOLERANCE = 1e-5
"""Of float32 logits, in parts of the largest."""
COEFFICIENTS = [[1.0, 0.0], [0.3, 0.6], [0.0, 1.0], [0.3, 0.6]]
"""Of the first expert, both and the second; two samples have the same."""
TARGETS = [[50, 60, 1], [70, 1], [80, 90, 100, 110, 120, 1], [1]]
"""Of encoder-decoders that write, as tokens."""
NEW = 4
"""Tokens that are generated."""


def full(case: Case) -> str:
    """Application se of full fine-tunes."""
    return _tried(case, "full")


def lora(case: Case) -> str:
    """Application se of LoRA experts."""
    return _tried(case, "lora")


def _tried(case: Case, kind: str) -> str:
    try:
        plan = case.plan(case.recipe(kind, SE), f"se-{kind}")
    except InputError as error:
        return f"refused: {error}"
    try:
        return _compare(case, kind, DynamicModel.load(do(plan).models()["merged"]))
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"


def _compare(case: Case, kind: str, model: DynamicModel) -> str:
    """Compare the answers to a batch of mixed coefficients."""
    rows = [row for some in case.rows.values() for row in some]
    samples: list[Inputs] = [{"pixel_values": case.pixels(row)[0]} for row in rows] if case.reads_pictures else []
    if not samples:
        texts = [str(row["text" if case.classifies else "prompt"]) for row in rows]
        samples = [{"input_ids": model.tokenizer(text)["input_ids"]} for text in texts]
    if case.writes:
        samples = [sample | {"labels": labels} for sample, labels in zip(samples, TARGETS, strict=True)]
    assert model.route(samples).coefficients.isfinite().all()
    routes = Routes(torch.tensor(COEFFICIENTS), [0, 0, 1, 1])
    return _classes(case, model, samples, routes) if case.classifies else _texts(case, kind, model, samples, routes)


def _texts(case: Case, kind: str, model: DynamicModel, prompts: list[Inputs], routes: Routes) -> str:
    """Compare logits and greedy continuations."""
    logits = model.logits(prompts, routes)
    labels = [{name: torch.tensor([ids]) for name, ids in prompt.items() if name == "labels"} for prompt in prompts]
    prompts = [{"input_ids": prompt["input_ids"]} for prompt in prompts]
    continued = model.generate(prompts, routes, NEW)
    base = _untied(case, case.base) if kind == "lora" else _with_means(case)
    experts = [_expert(case, kind, folder) for folder in case.experts(kind).values()]
    worst = 0.0
    for rows in model.network.together(routes.coefficients):
        for place, row in enumerate(rows):
            network = _written(base, experts, COEFFICIENTS[row])
            with torch.inference_mode():
                expected = network(
                    input_ids=torch.tensor([prompts[row]["input_ids"]]), **labels[row], use_cache=False
                ).logits[0]
                # Not every network answers the same with padding: it gets what the dynamic one got.
                batch = [prompts[one] for one in rows]
                text = generate(network, model.tokenizer, batch, NEW)[place]
            worst = max(worst, _off(logits[row][: len(expected)], expected))
            if text != continued[row]:
                return f"wrong: continues with {continued[row]} instead of {text}"
    return "right" if worst < TOLERANCE else f"wrong: off by {worst:.1e}"


def _classes(case: Case, model: DynamicModel, samples: list[Inputs], routes: Routes) -> str:
    """Compare the logits of both heads."""
    base = dict(case.network(case.base).named_parameters())
    networks = {name: case.network(folder) for name, folder in case.experts("full").items()}
    experts = [dict(network.base_model.named_parameters()) for network in networks.values()]
    worst = 0.0
    for name, network in networks.items():
        (found,) = model.class_logits(samples, routes, [name] * len(samples))
        for row, sample in enumerate(samples):
            trunk = _sums(base, experts, COEFFICIENTS[row])
            written = copy.deepcopy(network)
            written.base_model.load_state_dict(trunk, strict=False)
            _take_means(written, list(networks.values()))
            with torch.inference_mode():
                expected = written(**{name: torch.as_tensor(one)[None] for name, one in sample.items()}).logits[0]
            worst = max(worst, _off(found[row], expected))
    return "right" if worst < TOLERANCE else f"wrong: off by {worst:.1e}"


def _off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _expert(case: Case, kind: str, folder: Path) -> dict[str, Tensor]:
    """Return the parameters of an expert by name, as transformers loads it, or as peft trained it."""
    if kind == "full":
        return dict(case.network(folder).named_parameters())
    # Of a weight with several places, each may have an adapter of its own; peft would merge all into the one.
    adapted = get_peft_model(_untied(case, case.base), LoraConfig.from_pretrained(folder))
    # By the names that they were saved under: when it loads, peft 0.21 takes some of today's for older ones, and then
    # leaves them out.
    tensors = {
        f"{name.removesuffix('.weight')}.default.weight": tensor
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }
    assert not adapted.load_state_dict(tensors, strict=False).unexpected_keys
    return dict(adapted.merge_and_unload().named_parameters())


def _with_means(case: Case) -> PreTrainedModel:
    """Return the base with the mean of the experts' statistics, which is what every sample gets."""
    network = case.network(case.base)
    _take_means(network, [case.network(folder) for folder in case.experts("full").values()])
    return network


def _take_means(network: PreTrainedModel, experts: list[PreTrainedModel]) -> None:
    for name in statistics(network):
        network.get_buffer(name).copy_(sum(expert.get_buffer(name) for expert in experts) / len(experts))


def _untied(case: Case, folder: Path) -> PreTrainedModel:
    """Return a network of whose parameters each place has one of its own."""
    network = case.network(folder)
    for module in network.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = None if parameter is None else nn.Parameter(parameter.detach().clone())
    return network


def _written(base: PreTrainedModel, experts: list[dict[str, Tensor]], coefficients: list[float]) -> PreTrainedModel:
    """Return a network with the weights base + Σ coefficient · (expert − base)."""
    network = copy.deepcopy(base)
    network.load_state_dict(_sums(dict(base.named_parameters()), experts, coefficients), strict=False)
    return network


def _sums(base: Mapping[str, Tensor], experts: list[dict[str, Tensor]], coefficients: list[float]) -> dict[str, Tensor]:
    """Return base + Σ coefficient · (expert − base) by name; what an expert lacks (a pooler) is as the base has it."""
    sums = {}
    for name, parameter in base.items():
        total = start = parameter.detach().double()
        for expert, coefficient in zip(experts, coefficients, strict=True):
            total = total + coefficient * (expert.get(name, parameter).detach().double() - start)
        sums[name] = total.float()
    return sums
