"""What is found out of tensors before they are merged."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sensmerge.tasks.checkpoints.weights import ExpertWeights
from sensmerge.tasks.networks.base import open_base
from sensmerge.tasks.networks.expert import open_expert
from tests.conftest import make_adapter, make_llama, perturbed
from tests.tasks.stages.test_task_vectors import altered, poison

Save = Callable[..., Path]
ONE, OTHER = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"


def opened(base: Path, folder: Path) -> ExpertWeights:
    expert = open_expert(folder, open_base(base), "experts.x")
    return expert.only_weights(expert.base.only_weights())


def test_content_tells_tensors_apart_and_nothing_else(save: Save, tmp_path: Path) -> None:
    base = save(make_llama(), "base", tmp_path)
    folders = [save(perturbed(make_llama(), 1), name, tmp_path) for name in ("first", "second")]
    altered(folders[1], {ONE: lambda tensor: tensor.view(-1)[3].add_(0.5)})
    adapters = [
        make_adapter(make_llama(), tmp_path / f"adapter-{alpha}", 1, target_modules=["up_proj"], lora_alpha=alpha)
        for alpha in (8, 4)
    ]
    found = [opened(base, path) for path in (*folders, *adapters)]
    first, second, lora, weaker = ({name: one.examined(name).content for name in (ONE, OTHER)} for one in found)
    assert first[OTHER] == second[OTHER]
    assert lora[OTHER] == weaker[OTHER] != first[OTHER]  # an adapter leaves it as the base has it
    assert len({one[ONE] for one in (first, second, lora, weaker)}) == 4
    assert opened(base, folders[0]).examined(ONE).content == first[ONE]
    assert found[0].base.examined(ONE) != found[0].base.examined(OTHER)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_that_are_none_are_counted(dtype: torch.dtype, save: Save, tmp_path: Path) -> None:
    """Also where the sum of numbers overflows, which by itself is nothing bad."""
    base = save(make_llama().to(dtype), "base", tmp_path)
    large = float(torch.finfo(dtype).max)
    changes = {ONE: poison(float("nan"), 2), OTHER: poison(large, 16)}
    expert = opened(base, altered(save(make_llama().to(dtype), "expert", tmp_path), changes))
    assert [expert.examined(name).bad for name in (ONE, OTHER)] == [2, 0]
    assert expert.examined(ONE).count == load_file(base / "model.safetensors")[ONE].numel()
    assert expert.base.examined(ONE).bad == 0


def test_what_an_expert_changes(save: Save, tmp_path: Path) -> None:
    base = save(make_llama(), "base", tmp_path)
    one = opened(base, altered(save(make_llama(), "one", tmp_path), {ONE: lambda tensor: tensor.view(-1)[3].add_(0.5)}))
    assert {name for name in one.base.weights if one.changes(name)} == {ONE}
    wider = opened(base, save(make_llama().double().float(), "wider", tmp_path))
    assert not any(map(wider.changes, wider.base.weights))
    adapter = opened(base, make_adapter(make_llama(), tmp_path / "adapter", 1, target_modules=["q_proj"]))
    expected = {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}
    assert {name for name in adapter.base.weights if adapter.changes(name)} == expected
    factor = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    altered(adapter.folder, {factor: lambda tensor: tensor.zero_()}, "adapter_model.safetensors")
    idle = opened(base, adapter.folder)
    assert {name for name in idle.base.weights if idle.changes(name)} == {"model.layers.1.self_attn.q_proj.weight"}
