"""What the census looks at: of one architecture a base with two full fine-tunes and two LoRA adapters, on disk."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sensmerge.pipeline.plan.plan import Plan
from tests.census.zoo import tiny_network
from tests.conftest import make_adapter, make_tokenizer, perturbed, plan_of, write_rows

EXPERTS = ("first", "second")
ROWS: Mapping[str, list[dict[str, object]]] = {
    "first": [{"prompt": "1+2=", "completion": "3"}, {"prompt": "a longer prompt: ", "completion": "yes or no"}],
    "second": [{"prompt": "def f(x):", "completion": " return x"}, {"prompt": "xyz", "completion": "abc"}],
}


@dataclass(frozen=True)
class Case:
    """One architecture."""

    name: str
    """of the class of its networks"""
    folder: Path

    @property
    def base(self) -> Path:
        """The base with its tokenizer."""
        return self.folder / "base"

    def experts(self, kind: str) -> dict[str, Path]:
        """Folders by name; `kind` is `full` or `lora`."""
        return {name: self.folder / kind / name for name in EXPERTS}

    def network(self, folder: Path) -> PreTrainedModel:
        """A full fine-tune or the base, as transformers loads it."""
        import transformers

        return getattr(transformers, self.name).from_pretrained(folder).eval()

    def recipe(self, kind: str, merge: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
        """A recipe that merges the experts."""
        sets = {name: {"path": "json", "data_files": str(self.folder / f"{name}.jsonl")} for name in EXPERTS}
        return {
            "name": "census",
            "base": str(self.base),
            "experts": {name: {"model": str(folder)} for name, folder in self.experts(kind).items()},
            "tasks": {name: {"kind": "completion", "calibration": one} for name, one in sets.items()},
            "merges": {"merged": dict(merge)},
            "dtype": "float32",
            **settings,
        }

    def plan(self, recipe: dict[str, Any], name: str) -> Plan:
        """Plan a recipe in a folder of its own."""
        folder = self.folder / f"plan-{name}"
        folder.mkdir()
        return plan_of(folder, recipe)


def make_case(name: str, folder: Path, lora: bool = True) -> Case:
    """Make base and experts of a class of networks.

    Raises:
        Exception: transformers or peft cannot.
    """
    case = Case(name, folder)
    network = _with_padding(tiny_network(name))
    tokenizer = make_tokenizer()
    network.save_pretrained(case.base)
    tokenizer.save_pretrained(case.base)
    for seed, expert in enumerate(EXPERTS, start=1):
        write_rows(folder / f"{expert}.jsonl", ROWS[expert])
        full = case.experts("full")[expert]
        _with_padding(perturbed(case.network(case.base), seed, 0.05)).save_pretrained(full)
        tokenizer.save_pretrained(full)
        if lora:
            _make_adapter(case, case.experts("lora")[expert], seed)
    return case


def _with_padding(network: PreTrainedModel) -> PreTrainedModel:
    """Give the padding token the zeros that no training changes and some networks get whenever they are loaded."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0
    return network


def _make_adapter(case: Case, folder: Path, seed: int) -> None:
    """Save an adapter of the base's linear layers.

    Of mixtures, peft takes layers that are called as those of their experts for parameters of all experts in one
    (`target_parameters`), which plan refuses by name: they are left out.
    """
    network = case.network(case.base)
    make_adapter(network, folder, seed, target_modules=_linear(network))
    config = json.loads((folder / "adapter_config.json").read_text())
    if config["target_parameters"]:
        make_adapter(case.network(case.base), folder, seed, target_modules=config["target_modules"])


def _linear(network: PreTrainedModel) -> list[str]:
    """Return the linear layers that adapters are made for: all, but for the head and what peft refuses in Mambas."""
    head = network.get_output_embeddings()
    model_type = network.config.get_text_config().model_type
    refused = ("out_proj",) if model_type in ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h") else ()
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and not name.endswith(refused)
    ]


Column = Callable[[Case], str]
"""Tries one thing with a case; returns `right`, or `wrong`, `refused` or `failed` with a reason behind a colon."""
