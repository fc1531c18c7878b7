import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

from sensmerge.pipeline.report import card
from sensmerge.pipeline.store.earlier import EarlierArtifacts
from sensmerge.pipeline.store.store import Key, Store
from sensmerge.tasks.artifacts import Artifact, read_json
from sensmerge.tasks.checkpoints.checkpoint import open_checkpoint
from sensmerge.tasks.checkpoints.layers import layer_of
from sensmerge.tasks.checkpoints.planned import preallocate
from sensmerge.tasks.checkpoints.weights import layer_groups
from sensmerge.tasks.coefficients import ExplicitCoefficients, Lines, SensCoefficients, UniformCoefficients
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.completion import CompletionTask
from sensmerge.tasks.methods.contract import TaskVector, method_of
from sensmerge.tasks.methods.kernels.delta import Whole
from sensmerge.tasks.networks.base import open_base
from sensmerge.tasks.networks.expert import load_network, open_expert
from sensmerge.tasks.stages import merge, staging
from sensmerge.tasks.stages.merge import MergeJob
from sensmerge.tasks.stages.written import weights_digest
from tests.conftest import (
    TaskRows,
    cross_task_job,
    do_job,
    make_adapter,
    make_bert_expert,
    make_bert_trunk,
    make_llama,
    measure_sensitivity,
    perturbed,
)
from tests.merged import assert_loads
from tests.tasks.methods.pieces import whole_tensor
from tests.tasks.stages.test_task_vectors import altered, measured, poison

Save = Callable[..., Path]
TASK = CompletionTask(kind="completion")
ROWS = [{"prompt": "1+2=", "completion": "3"}, {"prompt": "def f(", "completion": "x): pass"}]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make_job(
    folder: Path,
    base: Path,
    experts: dict[str, Path],
    method: str = "task_arithmetic",
    settings: dict[str, Any] | None = None,
    **changes: Any,
) -> MergeJob:
    """A job for the experts, their task vectors measured in `folder`; the method's settings as in a recipe."""
    opened_base = open_base(base)
    opened = {name: open_expert(expert, opened_base, f"experts.{name}") for name, expert in experts.items()}
    weights = opened_base.only_weights()
    artifacts: dict[str, Path] = {}
    for name in experts if "task_vectors" not in changes else ():
        artifacts[name] = folder / f"task-vector-{name}"
        if not artifacts[name].exists():
            artifacts[name].mkdir(parents=True)
            measured(opened[name], name, artifacts[name])
    defaults = {
        "models": dict.fromkeys(("base", *experts), ""),
        "base": weights,
        "experts": {name: one.only_weights(weights) for name, one in opened.items()},
        "head_configs": {name: one.config.to_json_string() for name, one in opened.items() if one.head},
        "task_vectors": {name: Artifact("", folder) for name, folder in artifacts.items()},
        "method": method_of({"method": method} | (settings or {}) | ({"seed": 7} if method.startswith("dare") else {})),
        "weight": 0.5,
        "coefficients": UniformCoefficients(),
        "companions": "",
        "tokenizer": weights.folder,
        "shard_size": 10**9,
        "groups": layer_groups(weights, 16 * 2**10),
    }
    return MergeJob(**{**defaults, "out_dtype": None, **changes})


@pytest.fixture
def job(llamas: dict[str, Path], tmp_path: Path) -> Callable[..., MergeJob]:
    """Makes jobs for the tiny Llamas."""

    def make(method: str = "task_arithmetic", settings: dict[str, Any] | None = None, **changes: Any) -> MergeJob:
        experts = {name: llamas[name] for name in ("math", "code")}
        return make_job(tmp_path, llamas["base"], experts, method, settings, **changes)

    return make


def merged(job: MergeJob, out: Path) -> dict[str, Any]:
    """Run all pieces of a merge."""
    for group in job.parts():
        job.run(group, out)
    found = job.finish(out)
    assert_loads(out, job.base.folder)
    return found


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def at(density: Any, method: str) -> dict[str, Any]:
    """The setting `density`, for a method that has it."""
    return {"density": density} if method in ("ties", "dare_linear", "dare_ties") else {}


VARIANTS: list[tuple[str, float]] = [
    ("linear", 1.0),
    ("task_arithmetic", 1.0),
    ("ties", 0.3),
    ("dare_linear", 0.3),
    ("dare_ties", 0.6),
    ("tsv_m", 1.0),
    ("iso_c", 1.0),
]


# The weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "density"), VARIANTS)
def test_merge_is_the_method_on_whole_state_dicts(
    method: str, density: float, job: Callable[..., MergeJob], tmp_path: Path
) -> None:
    patterns: dict[str, Any] = {"*": 1.0, "model.layers.1": 0.25}
    coefficients = ExplicitCoefficients(kind="explicit", weights={"math": patterns, "code": 0.6})
    one = job(method, at({"math": density, "code": min(1.0, density * 1.5)}, method), coefficients=coefficients)
    merged(one, tmp_path / "out")
    base, *experts = (weights_of(model.folder) for model in (one.base, *one.experts.values()))
    torch.set_num_threads(1)
    expected = {}
    for name in base:
        weights = {"math": 0.5 * (0.25 if "layers.1." in name else 1.0), "code": 0.3}
        vectors = [
            TaskVector(expert, name, Whole((weights_of_expert[name] - base[name]).view(-1)), weights[expert])
            for expert, weights_of_expert in zip(one.experts, experts, strict=True)
        ]
        expected[name] = whole_tensor(base[name], vectors, one.method)
    assert equal(weights_of(tmp_path / "out"), expected)


@pytest.mark.parametrize(("method", "density"), VARIANTS)
def test_half_precision_is_merged_in_float32(method: str, density: float, save: Save, tmp_path: Path) -> None:
    base = save(make_llama().bfloat16(), "base", tmp_path)
    experts = {
        name: save(perturbed(make_llama(), seed).bfloat16(), name, tmp_path) for seed, name in enumerate("xy", 1)
    }
    merged(make_job(tmp_path, base, experts, method, at(density, method)), tmp_path / "half")
    wide = {
        name: save(AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32), f"{name}-wide", tmp_path)
        for name, f in {"base": base, **experts}.items()
    }
    wide_base = wide.pop("base")
    merged(make_job(tmp_path / "wide", wide_base, wide, method, at(density, method)), tmp_path / "full")
    expected = {name: tensor.bfloat16() for name, tensor in weights_of(tmp_path / "full").items()}
    assert equal(weights_of(tmp_path / "half"), expected)


DEVICES = ["cpu:0", pytest.param("cuda", marks=pytest.mark.gpu)]
"""Devices that tensors are sent to; the first is this CPU."""


def no_loops(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a device compute as any but a CPU does, and tensors go there in many turns of the buffers."""
    if device != "cuda":
        monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda _: False), raising=False)
    monkeypatch.setattr(staging, "BUFFER", 1000)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("method", "density"), VARIANTS[:5])
def test_what_is_sent_to_a_device_has_the_same_bits(
    method: str, density: float, device: str, llamas: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(make_llama(), tmp_path / "adapter", 1, target_modules=["q_proj"])
    experts = {"math": llamas["math"], "code": llamas["code"], "adapter": adapter}
    one = make_job(tmp_path, llamas["base"], experts, method, at(density, method))
    expected = merged(one, tmp_path / "cpu")
    there = replace(one, device=device)
    no_loops(device, monkeypatch)
    assert there.identity() == one.identity()
    assert merged(there, tmp_path / "there") == expected
    assert equal(weights_of(tmp_path / "there"), weights_of(tmp_path / "cpu"))
    again = merged(replace(there, previous=tmp_path / "cpu", shard_size=30_000), tmp_path / "again")
    assert (again["digest"], again["taken_over"]) == (expected["digest"], len(one.base.weights))


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_that_are_none_are_found_as_a_tensor_is_sent(
    device: str, save: Save, llamas: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    expert = altered(save(perturbed(make_llama(), 1), "expert", tmp_path), {name: poison(float("nan"), 2)})
    experts = {"math": expert, "code": llamas["code"]}
    one = make_job(tmp_path, llamas["base"], experts, device=device, task_vectors={})
    no_loops(device, monkeypatch)
    with pytest.raises(InputError, match=rf"experts\.math: tensor {name} of .*expert has 2 NaN or Inf of 512 values"):
        merged(one, tmp_path / "out")


@pytest.mark.parametrize(("method", "density"), VARIANTS)
def test_every_order_of_groups_gives_the_same_bits(
    method: str, density: float, job: Callable[..., MergeJob], tmp_path: Path
) -> None:
    one = job(method, at(density, method))
    digests = set()
    assert len(one.groups) == 4
    for order in itertools.islice(itertools.permutations(range(4)), 0, 24, 7):
        out = tmp_path / f"out-{order}"
        for group in (*order, *order[:2]):
            one.run(group, out)
        digests.add(one.finish(out)["digest"])
    assert len(digests) == 1


@pytest.mark.parametrize("shard_size", [1, 40_000])
def test_shards_hold_the_same_values(shard_size: int, job: Callable[..., MergeJob], tmp_path: Path) -> None:
    expected = merged(job("ties", {"density": 0.3}), tmp_path / "one")
    found = merged(job("ties", {"density": 0.3}, shard_size=shard_size), tmp_path / "many")
    assert equal(weights_of(tmp_path / "one"), weights_of(tmp_path / "many"))
    index = read_json(tmp_path / "many" / "model.safetensors.index.json")
    assert set(index["weight_map"]) == set(weights_of(tmp_path / "one"))
    assert set(found.pop("by_tensor")) == set(index["weight_map"].values())
    assert expected.pop("by_tensor") == ["model.safetensors"]
    assert found == expected
    assert weights_digest(open_checkpoint(tmp_path / "many")) == expected["digest"]
    assert len(set(index["weight_map"].values())) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "many").state_dict()
    assert equal(loaded, AutoModelForCausalLM.from_pretrained(tmp_path / "one").state_dict())


@pytest.mark.parametrize("adapters", [False, True])
def test_number_of_threads_changes_nothing(adapters: bool, save: Save, tmp_path: Path) -> None:
    """With tensors so large that torch shares sums among its threads."""
    size = {"hidden_size": 256, "intermediate_size": 600, "num_hidden_layers": 1}
    base = save(make_llama(**size), "base", tmp_path)
    experts = {}
    for seed, name in enumerate("xy", 1):
        network = perturbed(make_llama(**size), seed)
        experts[name] = (
            make_adapter(network, tmp_path / name, seed, target_modules="all-linear", r=7)
            if adapters
            else save(network, name, tmp_path)
        )
    settings: dict[str, dict[str, Any]] = {key: {"density": 0.3, "rescale": True} for key in ("ties", "dare_ties")}
    for method in ("ties", "dare_ties", "tsv_m", "iso_c"):
        digests = set()
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            # Task vectors are measured anew as well: their histograms are part of what a merge reads.
            one = make_job(tmp_path / f"{method}-{number}", base, experts, method, settings.get(method))
            torch.set_num_threads(number)
            digests.add(merged(one, tmp_path / f"{method}-{number}" / "out")["digest"])
        assert len(digests) == 1


def test_untouched_tensors_and_integers_are_copied(save: Save, tmp_path: Path) -> None:
    base = save(make_bert_trunk(), "base", tmp_path)
    tensors = load_file(base / "model.safetensors")
    tensors["embeddings.position_ids"] = torch.arange(128)[None]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    network = make_bert_expert(make_bert_trunk(), 1, 2)
    adapter = make_adapter(network, tmp_path / "adapter", 1, task_type="SEQ_CLS", target_modules=["query"])
    experts = {"mood": adapter, "topic": save(make_bert_expert(make_bert_trunk(), 2, 3), "topic", tmp_path)}
    merged(make_job(tmp_path, base, {"mood": adapter, "other": adapter}), tmp_path / "adapters")
    found = weights_of(tmp_path / "adapters")
    assert torch.equal(found["embeddings.position_ids"], tensors["embeddings.position_ids"])
    changed = {name for name in tensors if not torch.equal(found[name], tensors[name])}
    assert changed == {f"encoder.layer.{i}.attention.self.query.weight" for i in (0, 1)}
    merged(make_job(tmp_path / "both", base, experts), tmp_path / "mixed")
    expert = load_file(experts["topic"] / "model.safetensors")
    name = "encoder.layer.0.output.dense.weight"
    expected = tensors[name] + 0.5 * (expert[f"bert.{name}"] - tensors[name])
    torch.testing.assert_close(weights_of(tmp_path / "mixed")[name], expected)


def test_linear_scales_untouched_tensors_as_well(save: Save, tmp_path: Path) -> None:
    base = save(make_llama(), "base", tmp_path)
    adapters = {
        name: make_adapter(make_llama(), tmp_path / name, seed, target_modules=["q_proj"])
        for seed, name in enumerate("xy", 1)
    }
    merged(
        make_job(tmp_path, base, adapters, "linear", {"normalize": False}, weight=0.25),
        tmp_path / "out",
    )
    name = "model.embed_tokens.weight"
    assert torch.equal(weights_of(tmp_path / "out")[name], weights_of(base)[name] / 2)


def test_adapters_merge_as_their_merged_checkpoints(save: Save, tmp_path: Path) -> None:
    base = save(make_llama(), "base", tmp_path)
    settings = {"x": {"target_modules": "all-linear"}, "y": {"target_modules": ["q_proj"], "use_rslora": True}}
    adapters = {
        name: make_adapter(make_llama(), tmp_path / name, seed, **settings[name]) for seed, name in enumerate("xy", 1)
    }
    full = {
        name: save(
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).merge_and_unload(),
            f"{name}-full",
            tmp_path,
        )
        for name, folder in adapters.items()
    }
    merged(make_job(tmp_path / "a", base, adapters, "ties", {"density": 0.4}), tmp_path / "from-adapters")
    merged(make_job(tmp_path / "b", base, full, "ties", {"density": 0.4}), tmp_path / "from-full")
    found, expected = weights_of(tmp_path / "from-adapters"), weights_of(tmp_path / "from-full")
    # Rounding may move an element or two across the threshold of the trim.
    for name in expected:
        close = torch.isclose(found[name], expected[name], atol=1e-6)
        assert (~close).sum() <= 2


def test_out_dtype(job: Callable[..., MergeJob], tmp_path: Path) -> None:
    merged(job(), tmp_path / "full")
    merged(job(out_dtype="bfloat16"), tmp_path / "half")
    expected = {name: tensor.bfloat16() for name, tensor in weights_of(tmp_path / "full").items()}
    assert equal(weights_of(tmp_path / "half"), expected)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "full").dtype == torch.float32


# Interrupted, damaged -------------------------------------------------------------------------------------------------


def test_a_killed_merge_continues_to_the_same_bits(job: Callable[..., MergeJob], tmp_path: Path) -> None:
    one = job("dare_ties", {"density": 0.3}, shard_size=40_000)
    expected = merged(one, tmp_path / "whole")
    out = tmp_path / "killed"
    for group in (0, 2):
        one.run(group, out)
    # A kill in the middle of group 1 leaves some of its bytes, no marker, and perhaps half an index.
    plan = merge.plan_merged(one.base, None, 40_000)
    preallocate(plan, out)
    name = one.groups[1][0]
    with (out / plan.tensors[name].file).open("r+b") as file:
        file.seek(plan.tensors[name].offset)
        file.write(b"\x7f" * 1000)
    index = out / "model.safetensors.index.json"
    index.write_text(index.read_text()[:100])
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob(".group-*")}
    assert set(finished) == {".group-0.json", ".group-2.json"}
    for group in one.parts():
        one.run(group, out)
    assert {path: (out / path).stat().st_mtime_ns for path in finished} == finished
    assert one.finish(out) == expected
    assert index.read_bytes() == (tmp_path / "whole" / index.name).read_bytes()


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_altered_bytes_are_found_and_merged_anew(job: Callable[..., MergeJob], tmp_path: Path) -> None:
    one = job()
    expected = merged(one, tmp_path / "whole")
    out = tmp_path / "out"
    for group in one.parts():
        one.run(group, out)
    plan = merge.plan_merged(one.base, None, one.shard_size)
    names = [group[-1] for group in one.groups[1:3]]
    for name in names:
        flip(out / plan.tensors[name].file, plan.tensors[name].offset + 5)
    with pytest.raises(OSError, match=rf"{re.escape(names[0])}, {re.escape(names[1])} read back differently"):
        one.finish(out)
    assert {path.name for path in out.glob(".group-*")} == {".group-0.json", ".group-3.json"}
    assert merged(one, out) == expected


@pytest.mark.parametrize("damage", ["truncated", "deleted", "header"])
def test_a_damaged_file_is_found_and_merged_anew(damage: str, job: Callable[..., MergeJob], tmp_path: Path) -> None:
    one = job()
    expected = merged(one, tmp_path / "whole")
    out = tmp_path / "out"
    for group in one.parts():
        one.run(group, out)
    file = out / "model.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    elif damage == "deleted":
        file.unlink()
    else:
        flip(file, 20)
    if damage != "header":  # that is written anew, and no group with it
        with pytest.raises(OSError, match="read back differently"):
            one.finish(out)
    assert merged(one, out) == expected


def test_lines_scales_what_is_added_with_depth(job: Callable[..., MergeJob], tmp_path: Path) -> None:
    explicit = ExplicitCoefficients(kind="explicit", weights={"math": 0.5, "code": 2.0})
    merged(job(coefficients=explicit), tmp_path / "even")
    one = job(coefficients=explicit, lines=Lines(first=0.25, last=3.0))
    merged(one, tmp_path / "growing")
    base, even, growing = (weights_of(folder) for folder in (one.base.folder, tmp_path / "even", tmp_path / "growing"))
    factors = {"model.embed_tokens": 0.25, "model.layers.0": 0.25, "model.layers.1": 3.0, "model.norm": 3.0}
    for name in base:
        expected = base[name] + factors[layer_of(name)] * (even[name] - base[name])
        torch.testing.assert_close(growing[name], expected, rtol=1e-5, atol=1e-6)
    table = read_json(tmp_path / "growing" / "coefficients.json")
    assert table["weights"]["model.layers.1"] == {"math": 0.75, "code": 3.0}
    # Where the factor is 1 as before, nothing is merged anew.
    again = job(coefficients=explicit, lines=Lines(first=0.25, last=1.0), previous=tmp_path / "growing")
    assert merged(again, tmp_path / "again")["taken_over"] == sum(factors[layer_of(name)] == 0.25 for name in base)
    assert job().identity() != job(lines=Lines(first=0.5)).identity()


def test_lines_needs_blocks(save: Save, job: Callable[..., MergeJob]) -> None:
    one = job(lines=Lines(first=0.5))
    bare = replace(one.base, weights=tuple(name for name in one.base.weights if ".layers." not in name))
    with pytest.raises(InputError, match=r"lines: \S+ has no numbered blocks"):
        replace(one, base=bare).weights()


def test_weights_that_sum_to_zero_are_no_divisor(job: Callable[..., MergeJob], tmp_path: Path) -> None:
    patterns: dict[str, Any] = {"*": 1.0, "model.layers.1": -1.0}
    one = job("linear", coefficients=ExplicitCoefficients(kind="explicit", weights={"math": 1.0, "code": patterns}))
    with pytest.raises(InputError, match=r"layer model\.layers\.1: the weights sum to 0, which linear"):
        merged(one, tmp_path / "out")


def test_weights_that_the_dtype_cannot_hold(job: Callable[..., MergeJob], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"task_arithmetic has NaN or Inf as torch\.float16; expected finite"):
        merged(job(out_dtype="float16", weight=1e7), tmp_path / "out")


# The folder -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["task_arithmetic", "linear", "dare_ties", "ties"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_are_found_whatever_the_method_drops(
    method: str, value: float, save: Save, llamas: dict[str, Path], tmp_path: Path
) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    expert = altered(save(perturbed(make_llama(), 1), "expert", tmp_path), {name: poison(value, 2)})
    experts = {"math": expert, "code": llamas["code"]}
    settings = {} if method in ("task_arithmetic", "linear") else {"density": 0.1}
    one = make_job(tmp_path, llamas["base"], experts, method, settings, task_vectors={})
    with pytest.raises(InputError, match=rf"experts\.math: tensor {name} of .*expert has 2 NaN or Inf of 512 values"):
        merged(one, tmp_path / "out")
    base = altered(save(make_llama(), "base", tmp_path), {name: poison(value)})
    one = make_job(tmp_path, base, {"code": llamas["code"], "math": llamas["math"]}, method, settings, task_vectors={})
    with pytest.raises(InputError, match=rf"^base: tensor {name} of .*base has 1 NaN or Inf of 512 values"):
        merged(one, tmp_path / "other")


def test_numbers_that_are_none_in_a_head(save: Save, berts: dict[str, Path], tmp_path: Path) -> None:
    mood = save(make_bert_expert(make_bert_trunk(), 1, 2), "mood", tmp_path)
    topic = save(make_bert_expert(make_bert_trunk(), 2, 3), "topic", tmp_path)
    altered(mood, {"classifier.bias": poison(float("inf"))})
    with pytest.raises(InputError, match=r"experts\.mood: tensor classifier\.bias of .*has 1 NaN or Inf of 2 values"):
        merged(make_job(tmp_path, berts["base"], {"mood": mood, "topic": topic}), tmp_path / "out")


def test_experts_that_change_nothing_are_named(save: Save, llamas: dict[str, Path], tmp_path: Path) -> None:
    same = save(make_llama(), "same", tmp_path)
    adapter = make_adapter(make_llama(), tmp_path / "adapter", 1, target_modules=["q_proj"])
    factor = "base_model.model.model.layers.{}.self_attn.q_proj.lora_B.weight"
    altered(adapter, {factor.format(i): lambda tensor: tensor.zero_() for i in (0, 1)}, "adapter_model.safetensors")
    experts = {"math": llamas["math"], "same": same, "idle": adapter}
    assert merged(make_job(tmp_path, llamas["base"], experts), tmp_path / "out")["unchanged"] == ["same", "idle"]


def test_a_merge_counts_itself_what_nobody_has_counted(job: Callable[..., MergeJob], tmp_path: Path) -> None:
    one = job("ties", {"density": 0.3})
    found = [
        merged(replace(one, task_vectors=counted), tmp_path / f"{number}")["digest"]
        for number, counted in enumerate((one.task_vectors, {}))
    ]
    assert found[0] == found[1]
    assert one.identity() == replace(one, task_vectors={}).identity()


def test_merged_folder_is_an_ordinary_model(save: Save, tmp_path: Path) -> None:
    network = make_llama()
    network.generation_config = GenerationConfig(max_new_tokens=7, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    base = save(network, "base", tmp_path)
    experts = {name: save(perturbed(make_llama(), seed), name, tmp_path) for seed, name in enumerate("xy", 1)}
    template = "{% for message in messages %}<{{ message.content }}>{% endfor %}"
    (base / "chat_template.jinja").write_text(template)
    (experts["y"] / "chat_template.jinja").write_text("of no concern: " + template)
    merged(make_job(tmp_path, base, experts), tmp_path / "out")

    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"config.json", "generation_config.json", "tokenizer.json", "coefficients.json"}
    assert not any(name.startswith(".") for name in names)
    assert not (tmp_path / "out" / "heads").exists()
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert read_json(tmp_path / "out" / "config.json") == read_json(base / "config.json")

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "1+2"}], tokenize=False)
    assert chat == "<1+2>"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, stored["model.embed_tokens.weight"])
    prompt = tokenizer("1+2=", return_tensors="pt")
    generated = model.generate(**prompt, do_sample=False)
    assert prompt["input_ids"].shape[1] < generated.shape[1] <= prompt["input_ids"].shape[1] + 7
    by_hand = make_llama()
    state = by_hand.state_dict()
    for folder in experts.values():
        for name, tensor in weights_of(folder).items():
            state[name] += 0.5 * (tensor - weights_of(base)[name])
    by_hand.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    with torch.no_grad():
        torch.testing.assert_close(model(**prompt).logits, by_hand.eval()(**prompt).logits, rtol=1e-4, atol=1e-4)


def test_untied_head_is_merged(save: Save, tmp_path: Path) -> None:
    base = save(make_llama(tie_word_embeddings=False), "base", tmp_path)
    experts = {
        name: save(perturbed(make_llama(tie_word_embeddings=False), seed), name, tmp_path)
        for seed, name in enumerate("xy", 1)
    }
    merged(make_job(tmp_path, base, experts), tmp_path / "out")
    heads = [weights_of(folder)["lm_head.weight"] for folder in (base, *experts.values())]
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").lm_head.weight
    torch.testing.assert_close(found.detach(), (heads[1] + heads[2]) / 2)


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_encoder_heads_lie_beside_the_trunk(kind: str, save: Save, tmp_path: Path) -> None:
    trunk = make_bert_trunk()
    base = save(trunk, "base", tmp_path)
    labels = {"mood": 2, "topic": 3}
    experts = {}
    for seed, (name, number) in enumerate(labels.items(), 1):
        network = make_bert_expert(trunk, seed, number)
        if kind == "adapter":
            network.bert.load_state_dict(trunk.state_dict())
            experts[name] = make_adapter(
                network, tmp_path / name, seed, task_type="SEQ_CLS", target_modules=["query", "value"]
            )
        else:
            experts[name] = save(network, name, tmp_path)
    out = tmp_path / "out"
    merged(make_job(tmp_path, base, experts), out)
    assert not any("classifier" in name for name in weights_of(out))
    ids = torch.tensor([[5, 17, 100, 42]])
    base_opened = open_base(base)
    with torch.no_grad():
        plain = AutoModel.from_pretrained(out).eval()(ids).last_hidden_state
        for task, number in labels.items():
            head_of = open_expert(experts[task], base_opened, f"experts.{task}")
            own = load_network(open_base(out), "classification", torch.float32, "cpu", head_of=head_of)
            expected = own(ids).logits
            torch.testing.assert_close(own.bert(ids).last_hidden_state, plain)
            # The code of the model card, as a user would paste it.
            code = (
                card._heads_text([task], "BertForSequenceClassification")
                .split("```python\n")[1]
                .split("```")[0]
                .replace("FOLDER", str(out))
            )
            names: dict[str, Any] = {}
            exec(code, names)
            torch.testing.assert_close(names["model"].eval()(ids).logits, expected)
            assert expected.shape == (1, number)
            stored = load_file(out / "heads" / task / "head.safetensors")
            assert set(stored) == {"classifier.weight", "classifier.bias"}
            if kind == "full":
                original = AutoModelForSequenceClassification.from_pretrained(experts[task])
                assert torch.equal(stored["classifier.weight"], original.classifier.weight)


# What an earlier merge had ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "density"), VARIANTS)
def test_tensors_whose_inputs_are_the_same_are_taken_over(
    method: str, density: float, llamas: dict[str, Path], tmp_path: Path
) -> None:
    experts = {name: shutil.copytree(llamas[name], tmp_path / name) for name in ("math", "code")}
    first = make_job(tmp_path / "1", llamas["base"], experts, method, at(density, method))
    assert merged(first, tmp_path / "first")["taken_over"] == 0
    changed = ["model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"]
    tensors = load_file(experts["code"] / "model.safetensors")
    for name in changed:
        tensors[name][3] *= 1.5
    save_file(tensors, experts["code"] / "model.safetensors", metadata={"format": "pt"})
    second = make_job(tmp_path / "2", llamas["base"], experts, method, at(density, method))
    anew, refreshed = (
        merged(replace(second, previous=previous, shard_size=shard_size), tmp_path / name)
        for previous, name, shard_size in ((None, "anew", 10**9), (tmp_path / "first", "refreshed", 30_000))
    )
    assert refreshed["digest"] == anew["digest"]
    assert refreshed["tensors"] - refreshed["taken_over"] == len(changed)
    assert equal(weights_of(tmp_path / "refreshed"), weights_of(tmp_path / "anew"))
    for name, tensor in weights_of(tmp_path / "first").items():
        assert torch.equal(tensor, weights_of(tmp_path / "anew")[name]) == (name not in changed)


@pytest.mark.parametrize(
    "change",
    [
        {"weight": 0.4},
        {"method": {"seed": 8}},
        {"method": {"density": {"math": 0.6, "code": 0.5}}},
        {"method": {"normalize": True}},
        {"out_dtype": "bfloat16"},
    ],
    ids=["weight", "seed", "density", "normalize", "out_dtype"],
)
def test_other_settings_take_nothing_over(change: dict[str, Any], job: Callable[..., MergeJob], tmp_path: Path) -> None:
    settings = {"method": "dare_ties", "density": 0.5, "seed": 7}
    one = job(method=settings["method"], settings=settings)
    merged(one, tmp_path / "first")
    assert merged(replace(one, previous=tmp_path / "first"), tmp_path / "same")["taken_over"] == len(one.base.weights)
    if "method" in change:
        change = {"method": method_of(settings | change["method"])}
    assert merged(replace(one, previous=tmp_path / "first", **change), tmp_path / "other")["taken_over"] == 0


def test_a_job_begins_with_what_the_newest_merge_has(job: Callable[..., MergeJob], tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    key = Key.of("variant", job())
    earlier = EarlierArtifacts(store, key)
    assert job().resumed(earlier).previous is None
    for age, weight in enumerate((0.3, 0.4)):
        folder = store.folder(Key.of("variant", job(weight=weight)))
        merged(job(weight=weight), folder)
        (folder / "manifest.json").write_text("{}")
        os.utime(folder / "manifest.json", (age, age))
    assert job().resumed(earlier).previous == folder
    assert job().resumed(earlier).identity() == job().identity()


def test_a_damaged_tensor_is_merged_anew(job: Callable[..., MergeJob], tmp_path: Path) -> None:
    one = job()
    merged(one, tmp_path / "first")
    damaged = tmp_path / "first" / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    found = merged(replace(one, previous=tmp_path / "first"), tmp_path / "second")
    assert found["tensors"] - found["taken_over"] == 1
    assert 0 < found["taken_over_bytes"] < found["tensor_bytes"]
    assert found["digest"] == merged(one, tmp_path / "anew")["digest"]


@pytest.mark.parametrize("table", ["", "[]", "{", '{"model.norm.weight": 5}', '{"model.norm.weight": {}}'])
def test_an_earlier_merge_whose_table_is_damaged_is_left_alone(
    table: str, job: Callable[..., MergeJob], tmp_path: Path
) -> None:
    one = job()
    merged(one, tmp_path / "first")
    (tmp_path / "first" / "tensors.json").write_text(table)
    assert merged(replace(one, previous=tmp_path / "first"), tmp_path / "second")["taken_over"] == 0


@pytest.mark.parametrize("left", [None, 100], ids=["gone", "cut"])
def test_an_earlier_merge_without_its_weights_is_left_alone(
    left: int | None, job: Callable[..., MergeJob], tmp_path: Path
) -> None:
    one = job()
    first = merged(one, tmp_path / "first")
    file = tmp_path / "first" / "model.safetensors"
    if left is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-left])
    again = merged(replace(one, previous=tmp_path / "first"), tmp_path / "second")
    assert again["taken_over"] == again["taken_over_bytes"] == 0
    assert again["digest"] == first["digest"]


# Coefficients -----------------------------------------------------------------------------------------------------


def sens_job(job: Callable[..., MergeJob], llamas: dict[str, Path], folder: Path, **settings: Any) -> MergeJob:
    names = ("math", "code")
    base, out = llamas["base"], folder / "sens"
    for name in (*names, "cross"):
        (out / name).mkdir(parents=True)
    for name in names:
        measure_sensitivity(base, llamas[name], TASK, ROWS, out / name)
    sets = {name: TaskRows(TASK, ROWS) for name in names}
    do_job(cross_task_job(base, {name: llamas[name] for name in names}, sets), out / "cross")
    return job(
        coefficients=SensCoefficients(kind="sens", **settings),
        statistics={name: Artifact("", out / name) for name in names},
        distances=Artifact("", out / "cross"),
    )


@pytest.mark.parametrize("direction", ["distance", "similarity"])
def test_sens_end_to_end(direction: str, job: Callable[..., MergeJob], llamas: dict[str, Path], tmp_path: Path) -> None:
    one = sens_job(job, llamas, tmp_path, temperature=0.1, direction=direction)
    merged(one, tmp_path / "out")
    table = read_json(tmp_path / "out" / "coefficients.json")
    assert set(table) == {"weights", "tau", "sigma"}

    # The formulas written out.
    raw = {name: read_json(one.statistics[name].folder / "sensitivity.json")["sensitivity"] for name in one.experts}
    g = read_json(tmp_path / "sens" / "cross" / "distances.json")
    rows = {"math": g["math"]["code"], "code": g["code"]["math"]}
    if direction == "similarity":
        rows = {name: 1 / (1 + value) for name, value in rows.items()}
    tau = {name: value / sum(rows.values()) for name, value in rows.items()}
    assert table["tau"] == pytest.approx(tau)
    for layer, weights in table["weights"].items():
        exponents = {}
        for name, s in raw.items():
            alpha = s[layer] / math.sqrt(sum(value**2 for value in s.values()))
            exponents[name] = math.exp(alpha * tau[name] / 0.1)
        sigma = {name: value / sum(exponents.values()) for name, value in exponents.items()}
        assert table["sigma"][layer] == pytest.approx(sigma)
        assert weights == pytest.approx({name: 0.5 * 2 * value for name, value in sigma.items()})
    assert table["weights"].keys() == raw["math"].keys()

    base, found = weights_of(one.base.folder), weights_of(tmp_path / "out")
    for tensor, layer in (
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0"),
        ("model.layers.1.self_attn.o_proj.weight", "model.layers.1"),
        ("model.norm.weight", "model.norm"),
    ):
        mixed = sum(
            table["weights"][layer][name] * (weights_of(expert.folder)[tensor] - base[tensor])
            for name, expert in one.experts.items()
        )
        torch.testing.assert_close(found[tensor], base[tensor] + mixed)


def test_weights_average_to_the_variants_weight(
    job: Callable[..., MergeJob], llamas: dict[str, Path], tmp_path: Path
) -> None:
    one = sens_job(job, llamas, tmp_path, temperature=0.05)
    for job_ in (one, replace(one, coefficients=UniformCoefficients())):
        for row in job_.weights().values():
            assert sum(row.values()) / len(row) == pytest.approx(0.5)
    rows = one.weights()
    assert any(abs(row["math"] - row["code"]) > 1e-3 for row in rows.values())


def test_very_high_temperature_is_the_plain_method(
    job: Callable[..., MergeJob], llamas: dict[str, Path], tmp_path: Path
) -> None:
    merged(sens_job(job, llamas, tmp_path, temperature=1e9), tmp_path / "sens-out")
    merged(job(), tmp_path / "plain")
    for name, tensor in weights_of(tmp_path / "plain").items():
        torch.testing.assert_close(weights_of(tmp_path / "sens-out")[name], tensor)


def test_groups_are_whole_layers_and_cover_all(llamas: dict[str, Path]) -> None:
    base = open_base(llamas["base"])
    groups = layer_groups(base, 16 * 2**10)
    assert [name for group in groups for name in group] == list(base.weights)
    blocks = [{name.split(".")[2] for name in group if ".layers." in name} for group in groups]
    assert blocks == [set(), {"0"}, {"1"}, set()]
    assert layer_groups(base, 1 << 40) == (base.weights,)


def test_coefficients_file_is_json_for_everyone(job: Callable[..., MergeJob], tmp_path: Path) -> None:
    merged(job(), tmp_path / "out")
    table = json.loads((tmp_path / "out" / "coefficients.json").read_text())
    assert table == {
        "weights": {
            layer: {"math": 0.5, "code": 0.5}
            for layer in ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm")
        }
    }
