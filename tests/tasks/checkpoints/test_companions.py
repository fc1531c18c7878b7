"""Which files travel into merged models, and what is left out of them."""

import json
from pathlib import Path

import pytest

from sensmerge.tasks.checkpoints.companions import (
    LARGEST,
    companions,
    copy_companions,
    has_tokenizer,
    is_companion,
    is_plain,
)
from sensmerge.tasks.errors import InputError


@pytest.mark.parametrize(
    "name",
    [
        "generation_config.json",
        "tokenizer.json",
        "spiece.model",
        "tekken.json",
        "qwen.tiktoken",
        "processor_config.json",
        "video_preprocessor_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
        "modules.json",
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
        "LICENSE",
        "NOTICE.md",
        "setting_of_next_year.json",
    ],
)
def test_small_files_travel(name: str) -> None:
    assert is_companion(name, 10)
    assert not is_companion(name, LARGEST + 1)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "consolidated.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "training_args.bin",
        "hf_quant_config.json",
        "quantize_config.json",
        "openvino_model.xml",
        "imatrix.dat",
        "recipe.yaml",
        "model.safetensors.index.json.bak",
        "LICENSE.zip",
        "optimizer.pt",
        "adapter_config.json",
        "README.md",
        ".gitattributes",
        "modeling_x.py",
        "events.out.tfevents.17",
        "onnx/config.json",
        "1_Pooling/pooling.py",
        "2_Dense/pytorch_model.bin",
        "additional_chat_templates/inner/x.jinja",
        "coefficients.json",
    ],
)
def test_leftovers_stay(name: str) -> None:
    assert not is_companion(name, 10)


@pytest.mark.parametrize(
    "name", ["", "..", "../a", "/a", "a\\b", "C:a", "1_Pooling/..", "1_Pooling//a", "a/b", "1_a/../b"]
)
def test_names_that_lie_elsewhere(name: str) -> None:
    assert not is_plain(name)


def test_code_is_left_out_at_any_depth(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "additional_chat_templates").mkdir(parents=True)
    target.mkdir()
    processor = {"auto_map": {"AutoProcessor": "p.P"}, "size": 3, "inner": {"auto_map": {"x": "y.Z"}, "keep": [1]}}
    (source / "processor_config.json").write_text(json.dumps(processor))
    (source / "plain.json").write_text('{"as":  "it is"}')
    (source / "p.py").write_text("raise SystemExit")
    (source / "additional_chat_templates" / "rag.jinja").write_text("{{ 'auto_map' }}")
    copy_companions(companions(source), target)
    names = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert names == {"processor_config.json", "plain.json", "additional_chat_templates/rag.jinja"}
    assert json.loads((target / "processor_config.json").read_text()) == {"size": 3, "inner": {"keep": [1]}}
    assert (target / "plain.json").read_text() == '{"as":  "it is"}'


def test_damaged_file_that_names_code(tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text('{"auto_map": ')
    with pytest.raises(InputError, match=r"processor_config\.json: not valid JSON .* get the file again"):
        copy_companions(companions(tmp_path), tmp_path)


def test_folders_that_are_links_are_not_followed(tmp_path: Path) -> None:
    outside, model = tmp_path / "outside", tmp_path / "model"
    outside.mkdir()
    model.mkdir()
    (outside / "secret.json").write_text("{}")
    (model / "1_Pooling").symlink_to(outside)
    assert companions(model) == {}


@pytest.mark.parametrize(
    "name", ["sentencepiece.bpe.model", "spiece.model", "tekken.json", "vocab.txt", "tokenizer.json"]
)
def test_tokenizers_of_all_kinds(name: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert not has_tokenizer(tmp_path)
    (tmp_path / name).write_text("x")
    assert has_tokenizer(tmp_path)
