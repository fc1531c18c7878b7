"""SE-Merging of the census, against weights that are written out for each sample."""

import copy
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from sensmerge.pipeline.plan.plan import Plan
from sensmerge.pipeline.store.store import Store
from sensmerge.tasks.dynamic.model import DynamicModel, Routes
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.generation import generate
from sensmerge.tasks.networks.tokens import Inputs, pad_token
from tests.census.cases import ROWS, Case

TOLERANCE = 1e-5
"""Of float32 logits, in parts of the largest."""
COEFFICIENTS = [[1.0, 0.0], [0.3, 0.6], [0.0, 1.0], [0.3, 0.6]]
"""Of the first expert, both and the second; two samples have the same."""
NEW = 4
"""Tokens that are generated."""


def full(case: Case) -> str:
    """Application se of full fine-tunes."""
    return _tried(case, "full")


def lora(case: Case) -> str:
    """Application se of LoRA experts."""
    return _tried(case, "lora")


def _tried(case: Case, kind: str) -> str:
    merge = {"method": "task_arithmetic", "weight": 0.5, "application": {"kind": "se", "fallback": 0}}
    try:
        plan = case.plan(case.recipe(kind, merge), f"se-{kind}")
    except InputError as error:
        return f"refused: {error}"
    try:
        return _compare(case, kind, DynamicModel.load(_routed(plan, case.folder / f"plan-se-{kind}")))
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"


def _routed(plan: Plan, folder: Path) -> Path:
    """Run the steps up to the dynamic model and return its folder."""
    store = Store(folder / "store")
    plan.write_rows()
    for step in plan.steps:
        out = store.partial(step.key)
        out.mkdir(parents=True)
        for part in step.job.parts():
            step.job.run(part, out)
        store.publish(step.key, step.job.finish(out))
    (route,) = (step for step in plan.steps if step.stage == "route")
    return store.folder(route.key)


def _compare(case: Case, kind: str, model: DynamicModel) -> str:
    """Compare logits and greedy continuations of a batch of mixed coefficients."""
    prompts: list[Inputs] = [
        {"input_ids": model.tokenizer(str(row["prompt"]))["input_ids"]} for rows in ROWS.values() for row in rows
    ]
    assert model.route(prompts).coefficients.isfinite().all()
    routes = Routes(torch.tensor(COEFFICIENTS), [0, 0, 1, 1])
    logits = model.logits(prompts, routes)
    continued = model.generate(prompts, routes, NEW)
    base = _untied(case, case.base) if kind == "lora" else case.network(case.base)
    experts = [_expert(case, kind, folder) for folder in case.experts(kind).values()]
    pad_id, worst = pad_token(base, model.tokenizer), 0.0
    for rows in model.network.together(routes.coefficients):
        for place, row in enumerate(rows):
            network = _written(base, experts, COEFFICIENTS[row])
            with torch.inference_mode():
                expected = network(input_ids=torch.tensor([prompts[row]["input_ids"]]), use_cache=False).logits[0]
                # Not every network answers the same with padding: it gets what the dynamic one got.
                batch = [prompts[one] for one in rows]
                text = generate(network, model.tokenizer, batch, NEW, pad_id, "cpu")[place]
            worst = max(worst, float((logits[row][: len(expected)] - expected).abs().max() / expected.abs().max()))
            if text != continued[row]:
                return f"wrong: continues with {continued[row]} instead of {text}"
    return "right" if worst < TOLERANCE else f"wrong: off by {worst:.1e}"


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
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            total = parameter.double()
            for expert, coefficient in zip(experts, coefficients, strict=True):
                total = total + coefficient * (expert[name].double() - parameter.double())
            parameter.copy_(total)
    return network
