from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sensmerge.tasks.artifacts import read_json
from sensmerge.tasks.checkpoints.weights import ExpertWeights, layer_groups
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.methods.kernels.delta import Whole
from sensmerge.tasks.methods.kernels.sparsify import histogram_of
from sensmerge.tasks.networks.base import open_base
from sensmerge.tasks.networks.expert import open_expert
from sensmerge.tasks.stages.task_vectors import TaskVectorsJob, read_histogram
from tests.conftest import make_adapter, make_llama

Save = Callable[..., Path]
Change = Callable[[torch.Tensor], object]


def measured(expert: ExpertWeights, name: str, out: Path, group_bytes: int = 16 * 2**10) -> dict[str, Any]:
    """Run all pieces of the stage."""
    job = make_job(expert, name, group_bytes)
    for group in job.parts():
        assert job.run(group, out)
    return job.finish(out)


def make_job(expert: ExpertWeights, name: str, group_bytes: int) -> TaskVectorsJob:
    groups = layer_groups(expert.base, group_bytes)
    return TaskVectorsJob("base", "expert", untied=False, name=name, weights=expert, groups=groups)


def of_folders(base: Path, expert: Path, name: str, out: Path) -> dict[str, Any]:
    return measured(open_expert(expert, open_base(base), f"experts.{name}"), name, out)


def altered(folder: Path, changes: dict[str, Change], file: str = "model.safetensors") -> Path:
    """Change single tensors of a saved model in place."""
    tensors = load_file(folder / file)
    for name, change in changes.items():
        change(tensors[name])
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return folder


def poison(value: float, count: int = 1) -> Change:
    return lambda tensor: tensor.view(-1)[:count].fill_(value)


def test_histograms(llamas: dict[str, Path], tmp_path: Path) -> None:
    found = of_folders(llamas["base"], llamas["math"], "math", tmp_path)
    base, expert = (load_file(llamas[name] / "model.safetensors") for name in ("base", "math"))
    table = read_json(tmp_path / "task_vector.json")
    assert set(table) == set(base)
    for name, entry in table.items():
        delta = expert[name].double() - base[name].double()
        assert entry == {"changed": True, "max": pytest.approx(float(delta.abs().max()), rel=1e-5)}
        histogram = read_histogram(tmp_path, name)
        assert histogram is not None
        assert int(histogram.sum()) == delta.numel()
        assert torch.equal(histogram, histogram_of(Whole((expert[name] - base[name]).flatten()), base[name].flatten()))
    assert found == {"tensors": len(base), "changed": len(base)}


def test_unchanged_tensors(save: Save, tmp_path: Path) -> None:
    base = save(make_llama(), "base", tmp_path)
    one = "model.layers.1.mlp.up_proj.weight"
    expert = altered(save(make_llama(), "expert", tmp_path), {one: lambda tensor: tensor.view(-1)[3].add_(0.5)})
    count = len(load_file(base / "model.safetensors"))
    assert of_folders(base, expert, "expert", tmp_path) == {"tensors": count, "changed": 1}
    table = read_json(tmp_path / "task_vector.json")
    assert [name for name, entry in table.items() if entry["changed"]] == [one]
    assert table["model.norm.weight"] == {"changed": False, "max": 0.0}
    assert read_histogram(tmp_path, "model.norm.weight") is None
    histogram = read_histogram(tmp_path, one)
    assert histogram is not None
    assert histogram[0] == histogram.sum() - 1


def test_an_expert_that_is_the_base(save: Save, tmp_path: Path) -> None:
    base = save(make_llama(), "base", tmp_path)
    assert of_folders(base, base, "same", tmp_path)["changed"] == 0


def test_adapter(save: Save, tmp_path: Path) -> None:
    base = save(make_llama(), "base", tmp_path)
    adapter = make_adapter(make_llama(), tmp_path / "adapter", 1, target_modules=["q_proj", "down_proj"])
    of_folders(base, adapter, "lora", tmp_path)
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    table = read_json(tmp_path / "task_vector.json")
    changed = {name for name, entry in table.items() if entry["changed"]}
    assert changed == {f"model.layers.{i}.{m}.weight" for i in (0, 1) for m in ("self_attn.q_proj", "mlp.down_proj")}
    weights = load_file(base / "model.safetensors")
    for name in changed:
        delta = merged.state_dict()[name].double() - weights[name].double()
        assert table[name]["max"] == pytest.approx(float(delta.abs().max()), rel=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_in_an_expert(value: float, save: Save, llamas: dict[str, Path], tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    expert = altered(save(make_llama(), "expert", tmp_path), {name: poison(value, 2)})
    with pytest.raises(InputError, match=rf"experts\.math: tensor {name} of .*expert has 2 NaN or Inf of 512 values"):
        of_folders(llamas["base"], expert, "math", tmp_path)
    assert not (tmp_path / "task_vector.json").exists()


def test_numbers_that_are_none_in_an_adapter(save: Save, llamas: dict[str, Path], tmp_path: Path) -> None:
    adapter = make_adapter(make_llama(), tmp_path / "adapter", 1, target_modules=["q_proj"])
    factor = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    altered(adapter, {factor: poison(float("nan"))}, "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"experts\.lora: tensor model\.layers\.0\.self_attn\.q_proj\.weight of .*NaN"):
        of_folders(llamas["base"], adapter, "lora", tmp_path)


def test_half_precision_is_measured_in_float32(save: Save, tmp_path: Path) -> None:
    base = save(make_llama().bfloat16(), "base", tmp_path)
    # 1 + 2⁻⁷ is the next number after 1 that bfloat16 has.
    one = "model.norm.weight"
    expert = altered(save(make_llama().bfloat16(), "expert", tmp_path), {one: poison(1 + 2**-7)})
    of_folders(base, expert, "expert", tmp_path)
    assert read_json(tmp_path / "task_vector.json")[one] == {"changed": True, "max": 2**-7}


def test_groups_change_nothing_and_are_not_measured_twice(llamas: dict[str, Path], tmp_path: Path) -> None:
    expert = open_expert(llamas["math"], open_base(llamas["base"]), "experts.math")
    folders = [tmp_path / name for name in ("one", "many", "continued")]
    for folder in folders:
        folder.mkdir()
    found = [measured(expert, "math", folders[0], 1 << 40), measured(expert, "math", folders[1], 1)]
    job = make_job(expert, "math", 1)
    # What an interrupted run leaves: some groups, and half of another.
    assert job.run(1, folders[2])
    (folders[2] / ".group-0.safetensors").write_bytes(b"half")
    assert [job.run(group, folders[2]) for group in job.parts()].count(False) == 1
    found.append(job.finish(folders[2]))
    assert found[0] == found[1] == found[2]
    names = {"task_vector.json", "histograms.safetensors"}
    for folder in folders:
        assert {path.name for path in folder.iterdir()} == names
        for name in names:
            assert (folder / name).read_bytes() == (folders[0] / name).read_bytes()
