"""LoRA adapters as peft stores them: names of tensors, and configuration."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sensmerge.tasks.artifacts import write_json
from sensmerge.tasks.methods.kernels.low_rank import LowRankMatrix
from sensmerge.tasks.networks.adapter import ADAPTER_WEIGHTS
from sensmerge.tasks.networks.adapter_config import ADAPTER_CONFIG

PREFIX = "base_model.model."
"""What peft puts before the names of a network's modules."""


@dataclass(frozen=True)
class AdapterForm:
    """What an adapter's config says beside the modules that it adapts."""

    base: str
    """id on the hub, or folder, of the base"""
    revision: str | None
    """commit of the base on the hub"""
    task_type: str | None
    """what peft calls the kind of network; None: any"""
    modules_to_save: tuple[str, ...] = ()
    """names of modules that are stored whole"""
    ties: bool = False
    """whether parameters that the base ties to those of such modules stay tied"""


def factor_tensors(module: str, factors: LowRankMatrix) -> dict[str, Tensor]:
    """Return the factors of one module's task vector, second · first of shape (out, in), under peft's names."""
    return {
        f"{PREFIX}{module}.lora_A.weight": factors.first.contiguous(),
        f"{PREFIX}{module}.lora_B.weight": factors.second.contiguous(),
    }


def config_of(ranks: Mapping[str, int], form: AdapterForm) -> dict[str, Any]:
    """Return the config of an adapter whose factors are not scaled: alpha is the rank.

    Args:
        ranks: of the factors of each module, by its name in the network.
        form: the rest.
    """
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in sorted(ranks.items()) if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": form.task_type,
        "base_model_name_or_path": form.base,
        "revision": form.revision,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "modules_to_save": sorted(form.modules_to_save) or None,
        "ensure_weight_tying": form.ties,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write an adapter's two files to a folder; the same tensors give the same bytes."""
    save_file(dict(sorted(tensors.items())), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    write_json(folder / ADAPTER_CONFIG, dict(config))
