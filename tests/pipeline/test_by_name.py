"""Models that no class of transformers reads, merged by the names of their tensors."""

import json
import shutil
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from sensmerge.pipeline.plan.plan import Plan
from sensmerge.tasks.checkpoints.checkpoint import open_checkpoint
from sensmerge.tasks.checkpoints.planned import CheckpointWriter, plan_checkpoint, preallocate
from sensmerge.tasks.errors import InputError
from tests.conftest import command_line, do_steps, make_adapter, make_llama, plan_of, write_recipe
from tests.here import run_here
from tests.hub_server import HubServer

Tensors = dict[str, Tensor]
EXPERTS = ("a", "b")
TASK_ARITHMETIC = {"method": "task_arithmetic", "weight": 0.3}


class Block(nn.Module):
    """A block of a convolutional network, as timm's: convolution, norm over batches, convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 1)


class ConvNet(nn.Module):
    """A network as timm's resnets name theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.layer1 = nn.Sequential(Block(8), Block(8))
        self.layer2 = nn.Sequential(*(Block(8) for _ in range(11)))
        self.fc = nn.Linear(8, 5)


def tensors_of(seed: int) -> Tensors:
    """The tensors of a network that is fine-tuned; its counts of batches are those of no other."""
    torch.manual_seed(0)
    state = ConvNet().state_dict()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in state.items():
        if tensor.is_floating_point():
            tensor += 0.1 * torch.rand(tensor.shape, generator=generator)
        else:
            tensor += seed
        assert name
    return dict(state)


def write_model(
    folder: Path, tensors: Tensors, config: Mapping[str, Any] | None, file: str = "model.safetensors"
) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_models(folder: Path, config: Mapping[str, Any] | None, file: str = "model.safetensors") -> dict[str, Tensors]:
    """Write base and experts; return their tensors."""
    found = {name: tensors_of(seed) for seed, name in enumerate(("base", *EXPERTS))}
    for name, tensors in found.items():
        write_model(folder / name, tensors, config, file)
    return found


def recipe_for(**changes: Any) -> dict[str, Any]:
    recipe = {
        "name": "by-name",
        "base": "base",
        "experts": {name: {"model": name} for name in EXPERTS},
        "merges": {"m": TASK_ARITHMETIC},
    }
    return recipe | changes


def merge(folder: Path, recipe: dict[str, Any]) -> tuple[Plan, Path]:
    plan = plan_of(folder, recipe)
    do_steps(plan)
    return plan, plan.artifact("merge", "m")


def merged_tensors(folder: Path) -> Tensors:
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def assert_arithmetic(found: Tensors, models: Mapping[str, Tensors], weight: float = 0.3) -> None:
    """Assert that all is the sum of base and weighted task vectors in float64, and counts are the base's."""
    base = models["base"]
    assert found.keys() == base.keys()
    for name, tensor in base.items():
        if not tensor.is_floating_point():
            assert torch.equal(found[name], tensor), name
            continue
        share = 1 / len(EXPERTS) if "running_" in name else weight
        expected = tensor.double() + sum(share * (models[one][name].double() - tensor.double()) for one in EXPERTS)
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-6, atol=1e-6)


TIMM = {
    "architecture": "resnet_tiny",
    "num_classes": 5,
    "num_features": 8,
    "pretrained_cfg": {"tag": "a1_in1k", "input_size": [3, 224, 224]},
}
UNKNOWN = {
    "model_type": "not-yet-known",
    "architectures": ["NotYetKnownForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_new.NotYetKnownForCausalLM"},
    "hidden_size": 8,
}
DIFFUSERS = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30.0", "sample_size": 8}


@pytest.mark.parametrize(
    ("config", "file", "why"),
    [
        (None, "model.safetensors", "has no config.json"),
        (TIMM, "model.safetensors", "names no model_type"),
        (UNKNOWN, "model.safetensors", "no model_type 'not-yet-known'"),
        (DIFFUSERS, "diffusion_pytorch_model.safetensors", "names no model_type"),
        (None, "consolidated.safetensors", "has no config.json"),
        (None, "open_clip_model.safetensors", "has no config.json"),
    ],
)
def test_any_folder_of_safetensors_is_merged(
    config: Mapping[str, Any] | None, file: str, why: str, tmp_path: Path
) -> None:
    models = write_models(tmp_path, config, file)
    plan, merged = merge(tmp_path, recipe_for())
    assert_arithmetic(merged_tensors(merged), models)
    assert (merged / file).is_file()
    said = [note for note in plan.inputs.notes if "names of tensors are taken as they are" in note]
    assert [why in note and "13 of them numbered" in note for note in said] == [True]
    if config is None:
        assert not (merged / "config.json").exists()
    else:
        expected = {key: value for key, value in config.items() if key != "auto_map"}
        assert json.loads((merged / "config.json").read_text()) == expected


@pytest.mark.skipif(find_spec("timm") is not None, reason="the package is here")
def test_a_class_that_needs_a_package_which_is_not_here(tmp_path: Path) -> None:
    models = write_models(tmp_path, {"model_type": "timm_wrapper", **TIMM})
    plan, merged = merge(tmp_path, recipe_for())
    assert_arithmetic(merged_tensors(merged), models)
    assert any("requires the timm library" in note and "taken as they are" in note for note in plan.inputs.notes)


def test_one_file_stays_one(tmp_path: Path) -> None:
    models = write_models(tmp_path, None, "consolidated.safetensors")
    plan, merged = merge(tmp_path, recipe_for(merges={"m": TASK_ARITHMETIC | {"shard_size": 10_000}}))
    assert_arithmetic(merged_tensors(merged), models)
    assert [path.name for path in merged.glob("*.safetensors*")] == ["consolidated.safetensors"]
    assert any("merges.m.shard_size: merged models are in one file" in note for note in plan.inputs.notes)


def test_numbered_layers_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    write_models(tmp_path, TIMM)
    rising = {"kind": "explicit", "weights": {"a": [0.0, 1.0], "b": [1.0, 0.0]}}
    plan = plan_of(tmp_path, recipe_for(merges={"m": {"method": "linear", "normalize": False, "coefficients": rising}}))
    table = plan.step("merge", "m").job.coefficient_table()["weights"]  # type: ignore[attr-defined]
    found = [layer for layer in table if layer.startswith("layer2")]
    assert found == [f"layer2.{number}" for number in range(11)]
    assert table["layer2.3"]["a"] == pytest.approx(0.3)
    assert (table["layer1.1"]["a"], table["fc"]["a"]) == (1, 0)


def test_shards_of_diffusers_are_read_and_written(tmp_path: Path) -> None:
    models = {name: tensors_of(seed) for seed, name in enumerate(("base", *EXPERTS))}
    for name, tensors in models.items():
        folder = tmp_path / name / "unet"
        shapes = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
        plan = plan_checkpoint(shapes, 20_000, "diffusion_pytorch_model")
        preallocate(plan, folder)
        with CheckpointWriter(plan, folder) as writer:
            for key, tensor in tensors.items():
                writer.write(key, tensor.reshape(-1))
        (folder / "config.json").write_text(json.dumps(DIFFUSERS))
        write_model(tmp_path / name / "vae", {"other": torch.ones(2)}, {"_class_name": "AutoencoderKL"})
        (tmp_path / name / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    recipe = recipe_for(
        base={"model": "base", "subfolder": "unet"},
        experts={name: {"model": name, "subfolder": "unet"} for name in EXPERTS},
        merges={"m": TASK_ARITHMETIC | {"shard_size": 20_000}},
    )
    _, merged = merge(tmp_path, recipe)
    assert_arithmetic(merged_tensors(merged), models)
    index = json.loads((merged / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert all(file.startswith("diffusion_pytorch_model-0000") for file in index["weight_map"].values())
    with pytest.raises(InputError, match=r"base: .* or name one of the folders unet, vae with .* subfolder: unet}"):
        plan_of(tmp_path, recipe_for())
    with pytest.raises(InputError, match=r"experts.a: .* has no subfolder transformer; its folders: unet, vae"):
        plan_of(tmp_path, recipe, "experts.a.subfolder=transformer")


@pytest.mark.parametrize("beside", [{"params.json": b"{}"}, {}])
def test_a_repository_without_config(beside: dict[str, bytes], hub: HubServer, tmp_path: Path) -> None:
    models = {name: tensors_of(seed) | {"places": torch.arange(4)} for seed, name in enumerate(("base", *EXPERTS))}
    for name, tensors in models.items():
        hub.add_repo(f"org/{name}", {"consolidated.safetensors": save(tensors), **beside})
    recipe = recipe_for(base="hub:org/base", experts={name: {"model": f"hub:org/{name}"} for name in EXPERTS})
    _, merged = merge(tmp_path, recipe)
    assert_arithmetic(merged_tensors(merged), models)
    assert (merged / "consolidated.safetensors").is_file()
    assert (merged / "params.json").is_file() == bool(beside)


def test_one_folder_of_a_repository_is_fetched(hub: HubServer, tmp_path: Path) -> None:
    models = write_models(tmp_path / "files", DIFFUSERS, "diffusion_pytorch_model.safetensors")
    for name in models:
        files = {f"unet/{path.name}": path.read_bytes() for path in (tmp_path / "files" / name).iterdir()}
        other = {"model_index.json": b"{}", "vae/diffusion_pytorch_model.safetensors": b"never fetched"}
        hub.add_repo(f"org/{name}", files | other)
    recipe = recipe_for(
        base={"model": "hub:org/base", "subfolder": "unet"},
        experts={name: {"model": f"hub:org/{name}", "subfolder": "unet"} for name in EXPERTS},
    )
    _, merged = merge(tmp_path, recipe)
    assert_arithmetic(merged_tensors(merged), models)
    assert {one.path for one in hub.requests if "/vae/" in one.path} == set()
    with pytest.raises(InputError, match=r"base: .* has no such subfolder; its folders: unet, vae"):
        plan_of(tmp_path, recipe | {"base": {"model": "hub:org/base", "subfolder": "text_encoder"}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("fc.bias"), r"experts.b: .*/b: has no tensor fc.bias; expected the base's tensors"),
        (lambda t: t.update(more=torch.ones(2)), r"experts.b: .*/b: has tensor more, which the base has not"),
        (
            lambda t: t.update({"fc.bias": torch.ones(6)}),
            r"tensor fc.bias is F32 of shape \(6,\), the base's .* \(5,\)",
        ),
        (lambda t: t.update({"fc.bias": torch.ones(5, dtype=torch.int8)}), r"tensor fc.bias is I8 of shape"),
        (lambda t: t.update({"places": torch.arange(4) + 1}), r"tensor places \(I64 .*\) differs from the base's"),
        (lambda t: t.update({"fc.qweight": torch.ones(5)}), "tensor fc.qweight belongs to a quantised format"),
    ],
)
def test_other_tensors_are_refused_by_name(change: Callable[[Tensors], Any], message: str, tmp_path: Path) -> None:
    for seed, name in enumerate(("base", *EXPERTS)):
        tensors = tensors_of(seed) | {"places": torch.arange(4)}
        if name == "b":
            change(tensors)
        write_model(tmp_path / name, tensors, TIMM)
    with pytest.raises(InputError, match=message):
        plan_of(tmp_path, recipe_for())


def test_other_settings_are_refused_unless_they_are_to_be_the_bases(tmp_path: Path) -> None:
    models = write_models(tmp_path, UNKNOWN)
    (tmp_path / "b/config.json").write_text(json.dumps(UNKNOWN | {"rope": {"type": "yarn"}, "torch_dtype": "float32"}))
    with pytest.raises(
        InputError, match=r"experts.b: .* other settings .*: rope .*yarn.*; .* set experts.b.config: base"
    ):
        plan_of(tmp_path, recipe_for())
    recipe = recipe_for(experts={"a": {"model": "a"}, "b": {"model": "b", "config": "base"}})
    plan, merged = merge(tmp_path, recipe)
    assert any("the base's settings, not its rope" in note for note in plan.inputs.notes)
    assert_arithmetic(merged_tensors(merged), models)


def test_what_needs_a_network_is_refused(llama_recipe: dict[str, Any], tmp_path: Path) -> None:
    base = shutil.copytree(llama_recipe["base"], tmp_path / "unknown")
    config = json.loads((base / "config.json").read_text()) | {"model_type": "not-yet-known"}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"tasks: base: transformers has no model_type .* leave tasks out, and all"):
        plan_of(tmp_path, llama_recipe | {"base": str(base)})


def test_lines_is_refused_and_adapters_are(llamas: dict[str, Path], tmp_path: Path) -> None:
    write_models(tmp_path, None)
    with pytest.raises(InputError, match=r"merges.m.lines grows .* names alone do not tell"):
        plan_of(tmp_path, recipe_for(merges={"m": TASK_ARITHMETIC | {"lines": {"first": 0.1, "last": 1.0}}}))
    with pytest.raises(InputError, match=r"merges.m.adapter: the experts are whole models, .* leave adapter out"):
        plan_of(tmp_path, recipe_for(merges={"m": TASK_ARITHMETIC | {"adapter": {}}}))
    make_adapter(make_llama(), tmp_path / "adapter", 1)
    with pytest.raises(InputError, match=r"experts.a: .*/adapter is an adapter, which needs a network"):
        plan_of(tmp_path, recipe_for(experts={"a": {"model": "adapter"}, "b": {"model": "b"}}))


def test_known_networks_without_their_classes_in_the_config(llamas: dict[str, Path], tmp_path: Path) -> None:
    for name in ("base", "math", "code"):
        folder = shutil.copytree(llamas[name], tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        del config["architectures"]
        (folder / "config.json").write_text(json.dumps(config))
    experts = {name: {"model": name} for name in ("math", "code")}
    plan, merged = merge(tmp_path, recipe_for(experts=experts))
    assert any("architectures = None names no network" in note for note in plan.inputs.notes)
    states = {name: load_file(tmp_path / name / "model.safetensors") for name in ("base", "math", "code")}
    for name, tensor in merged_tensors(merged).items():
        vectors = sum(0.3 * (states[one][name].double() - states["base"][name].double()) for one in experts)
        torch.testing.assert_close(tensor.double(), states["base"][name].double() + vectors, rtol=1e-6, atol=1e-6)
    assert (merged / "tokenizer.json").is_file()


def test_an_expert_in_mistrals_file(llamas: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(llamas["code"], tmp_path / "code")
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    recipe = recipe_for(
        base=str(llamas["base"]), experts={"math": {"model": str(llamas["math"])}, "code": {"model": "code"}}
    )
    plan, merged = merge(tmp_path, recipe)
    assert not any("taken as they are" in note for note in plan.inputs.notes)  # transformers has the class
    assert (merged / "model.safetensors").is_file()


def fp8(tensors: Tensors, block: tuple[int, int] | None) -> tuple[Tensors, Tensors]:
    """Return matrices in fp8 with scales, by block or one for each, and what they stand for in float64."""
    stored, meant = {}, {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or "embed" in name:
            stored[name], meant[name] = tensor, tensor.double()
            continue
        rows, columns = block or tuple(tensor.shape)
        scales = torch.empty(-(-tensor.shape[0] // rows), -(-tensor.shape[1] // columns))
        codes, whole = (
            torch.empty(tensor.shape, dtype=torch.float8_e4m3fn),
            torch.empty(tensor.shape, dtype=torch.float64),
        )
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                place = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
                scales[i, j] = tensor[place].abs().max() / 448
                codes[place] = (tensor[place] / scales[i, j]).to(torch.float8_e4m3fn)
                whole[place] = codes[place].double() * scales[i, j].double()
        stored[name], meant[name] = codes, whole
        stored[f"{name}_scale_inv" if block else f"{name}_scale"] = scales if block else scales.reshape(1)
    return stored, meant


@pytest.mark.parametrize("block", [(16, 20), None])
@pytest.mark.parametrize("where", ["a", "base"])
def test_fp8_is_read_where_the_recipe_allows_it(
    block: tuple[int, int] | None, where: str, llamas: dict[str, Path], tmp_path: Path
) -> None:
    names = {"base": "base", "a": "math", "b": "code"}
    meant: dict[str, Tensors] = {}
    for name, source in names.items():
        folder = shutil.copytree(llamas[source], tmp_path / name)
        tensors = load_file(folder / "model.safetensors")
        meant[name] = {key: tensor.double() for key, tensor in tensors.items()}
        if name == where:
            stored, meant[name] = fp8(tensors, block)
            save_file(stored, folder / "model.safetensors")
            config = json.loads((folder / "config.json").read_text())
            method = {"quant_method": "fp8", "weight_block_size": block} if block else {"quant_method": "fbgemm_fp8"}
            (folder / "config.json").write_text(json.dumps(config | {"quantization_config": method}))
    recipe = recipe_for()
    with pytest.raises(InputError, match=r"(base|experts.a): .* quantised.* set dequantize: true for this model"):
        plan_of(tmp_path, recipe)
    if where == "base":
        recipe["base"] = {"model": "base", "dequantize": True}
    else:
        recipe["experts"]["a"]["dequantize"] = True
    _, merged = merge(tmp_path, recipe)
    found = merged_tensors(merged)
    assert found.keys() == meant["b"].keys()
    for name, tensor in found.items():
        base = meant["base"][name]
        expected = base + sum(0.3 * (meant[one][name] - base) for one in EXPERTS)
        is_rounded = tensor.ndim == 2 and "embed" not in name
        assert tensor.dtype == (torch.bfloat16 if is_rounded and where == "base" else torch.float32)
        error = 2**-7 if is_rounded else 1e-6
        torch.testing.assert_close(tensor.double(), expected, rtol=error, atol=error * base.abs().max().item())
    config = json.loads((merged / "config.json").read_text())
    assert "quantization_config" not in config


def test_dequantize_is_for_fp8_and_for_merges_alone(llama_recipe: dict[str, Any], tmp_path: Path) -> None:
    llama_recipe["experts"]["math"]["dequantize"] = True
    with pytest.raises(InputError, match=r"tasks: experts.math.dequantize is set, so .* leave tasks out"):
        plan_of(tmp_path, llama_recipe)
    del llama_recipe["tasks"]
    llama_recipe["merges"] = {"m": TASK_ARITHMETIC}
    with pytest.raises(InputError, match=r"experts.math.dequantize: .* has no tensor in fp8; leave the key out"):
        plan_of(tmp_path, llama_recipe)


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({"w_scale": torch.ones(3)}, r"w_scale is F32 of shape \(3,\), which does not fit w of shape \(4, 4\)"),
        ({"w_scale": torch.ones(1, dtype=torch.uint8)}, "w_scale is U8"),
        ({"scale_weight": torch.ones(1)}, "other scales, such as scale_weight"),
    ],
)
def test_scales_that_are_not_understood(scales: Tensors, message: str, tmp_path: Path) -> None:
    for seed, name in enumerate(("base", *EXPERTS)):
        write_model(tmp_path / name, scales | {"w": torch.full((4, 4), seed).to(torch.float8_e4m3fn)}, None)
    experts = {name: {"model": name, "dequantize": True} for name in EXPERTS}
    with pytest.raises(InputError, match=message):
        plan_of(tmp_path, recipe_for(base={"model": "base", "dequantize": True}, experts=experts))


def test_fp8_without_scales_is_refused_unless_allowed(tmp_path: Path) -> None:
    models = {}
    for seed, name in enumerate(("base", *EXPERTS)):
        models[name] = {"w": tensors_of(seed)["fc.weight"].to(torch.float8_e5m2)}
    for name, tensors in models.items():
        write_model(tmp_path / name, tensors, None)
    with pytest.raises(InputError, match=r"base: .* tensor w has dtype F8_E5M2.* set dequantize: true for this model"):
        plan_of(tmp_path, recipe_for())
    experts = {name: {"model": name, "dequantize": True} for name in EXPERTS}
    _, merged = merge(tmp_path, recipe_for(base={"model": "base", "dequantize": True}, experts=experts))
    base = models["base"]["w"].double()
    expected = base + sum(0.3 * (models[one]["w"].double() - base) for one in EXPERTS)
    torch.testing.assert_close(merged_tensors(merged)["w"].double(), expected, rtol=2**-8, atol=0)


def test_a_run_is_recorded_as_safetensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = write_models(tmp_path, DIFFUSERS, "diffusion_pytorch_model.safetensors")
    path, store = write_recipe(tmp_path, recipe_for()), tmp_path / "store"
    assert run_here(path, "--store", store) == 0
    (folder,) = store.glob("merge/m-*/")
    assert_arithmetic(merged_tensors(folder), models)
    card = (folder / "README.md").read_text()
    assert "library_name" not in card
    (version,) = MlflowClient(f"sqlite:///{store / 'mlflow.db'}").search_model_versions("name = 'by-name'")
    assert version.description.startswith("Static: safetensors, merged by the names of their tensors.")
    capsys.readouterr()
    assert command_line("plan", path, "--store", store) == 0
    assert "names of tensors are taken as they are" in capsys.readouterr().out


def test_several_files_of_which_none_is_known(tmp_path: Path) -> None:
    write_models(tmp_path, None, "one.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "base/two.safetensors")
    with pytest.raises(InputError, match=r"base: .* several files of weights \(one, two\), .* a folder of its own"):
        plan_of(tmp_path, recipe_for())
