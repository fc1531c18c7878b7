"""How near experts are to their base, by a few of their values."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sensmerge.tasks.checkpoints.kinship import kinship
from sensmerge.tasks.networks.base import open_base
from sensmerge.tasks.networks.expert import Expert, open_expert
from tests.conftest import make_adapter, make_llama, perturbed


def opened(folder: Path, base: Path) -> Expert:
    return open_expert(folder, open_base(base), "experts.x")


def test_a_fine_tune_is_near_and_another_network_is_not(save: Callable[..., Path], tmp_path: Path) -> None:
    networks = {
        "base": make_llama(),
        "near": perturbed(make_llama(), 1, scale=0.002),
        "far": make_llama(seed=7),
    }
    folders = {name: save(network, name, tmp_path) for name, network in networks.items()}
    found = {name: kinship(opened(folder, folders["base"])) for name, folder in folders.items()}
    cosines = {name: one[0] for name, one in found.items() if one is not None and one[1] == 8}
    assert cosines["base"] == pytest.approx(1.0)
    assert cosines["near"] > 0.9
    assert abs(cosines["far"]) < 0.1


def test_what_cannot_be_compared_is_not(save: Callable[..., Path], tmp_path: Path) -> None:
    base = save(make_llama(), "base", tmp_path)
    assert kinship(opened(make_adapter(make_llama(), tmp_path / "adapter", 1), base)) is None
    weights = base / "model.safetensors"
    zeros = {name: torch.zeros_like(one) for name, one in load_file(weights).items()}
    save_file(zeros, weights, {"format": "pt"})
    expert = opened(base, base)
    assert kinship(expert) is None
    weights.unlink()  # as before it is fetched
    assert kinship(expert) is None
