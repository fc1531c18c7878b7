import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.foreign import KEYS, check_foreign
from sensmerge.tasks.networks.networks import load_config, load_tokenizer
from tests.conftest import llama_config, make_tokenizer

SOURCE = Path(transformers.__file__).parent
LOADERS = {
    "get_kernel",
    "lazy_load_kernel",
    "load_and_register_attn_kernel",
    "load_and_register_msa_kernel",
    "get_class_from_dynamic_module",
}
"""Functions of transformers that fetch code and run it."""
CALLERS = {
    "trust_remote_code, which is false here": [
        "models/auto/auto_factory.py",
        "models/auto/configuration_auto.py",
        "models/auto/feature_extraction_auto.py",
        "models/auto/image_processing_auto.py",
        "models/auto/processing_auto.py",
        "models/auto/tokenization_auto.py",
        "models/auto/video_processing_auto.py",
        "pipelines/__init__.py",
    ],
    "attn_implementation": [
        "integrations/hub_kernels.py",
        "integrations/msa_attention.py",
        "modeling_flash_attention_utils.py",
        "utils/import_utils.py",
    ],
    "experts_implementation": ["integrations/deepgemm.py", "integrations/sonicmoe.py"],
    "quantization_config, which is refused": [
        "integrations/eetq.py",
        "integrations/fbgemm_fp8.py",
        "integrations/finegrained_fp8.py",
        "integrations/metal_quantization.py",
        "integrations/mxfp4.py",
        "integrations/nvfp4.py",
    ],
    "gguf_file": ["integrations/gguf/kernels.py"],
    "a network's own class, from transformers' own organisation, if the package kernels is there": [
        "models/mra/modeling_mra.py",
        "models/rwkv/modeling_rwkv.py",
        "models/sam3_video/modeling_sam3_video.py",
        "models/yoso/modeling_yoso.py",
    ],
}
"""Modules that call them, by what leads there."""
SUSPECT = re.compile(
    r"_?(auto_map|custom_\w+|\w+_implementation(_internal)?|use_(hub_)?kernels?|kernel_config|\w*remote_code"
    r"|\w*quantization_config|compression_config|(gguf|fast_tokenizer|configuration)_files?)"
)
HARMLESS = {
    *("auto_map", "_auto_map"),  # passed over, and left out of merged models
    *("quantization_config",),  # refused by `load_config`
    "cache_implementation",  # of a generation config, of which only the end tokens are used
    *("custom_generate", "custom_supported_devices"),  # arguments
}


def names(node: ast.AST) -> Iterator[str]:
    """The name of the function that a call calls."""
    if isinstance(node, ast.Call):
        match node.func:
            case ast.Name(id=name) | ast.Attribute(attr=name):
                yield name


def test_every_way_to_fetch_code_is_known() -> None:
    """A module more means a new way: find the key that leads there, and whether a model's files can hold it."""
    found = set()
    for path in SOURCE.rglob("*.py"):
        text = path.read_text()
        if any(name in text for name in LOADERS) and any(
            LOADERS.intersection(names(node)) for node in ast.walk(ast.parse(text))
        ):
            found.add(path.relative_to(SOURCE).as_posix())
    assert found == {module for modules in CALLERS.values() for module in modules}


def test_every_key_that_could_fetch_code_is_known() -> None:
    """A key more is to be refused in `KEYS`, or to be called harmless here, and why."""
    found = set()
    rooms = [SOURCE.glob("*.py"), *((SOURCE / room).glob("*.py") for room in ("generation", "models/auto"))]
    for path in (path for room in rooms for path in room):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and SUSPECT.fullmatch(node.value):
                found.add(node.value)
    assert found == KEYS.keys() | HARMLESS


def model(folder: Path, **changes: Any) -> Path:
    make_tokenizer().save_pretrained(folder)
    config = llama_config().to_dict() | {"architectures": ["LlamaForCausalLM"]} | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("key", sorted(key for key in KEYS if "implementation" in key))
@pytest.mark.parametrize("value", ["a/kernels", "flash_attention_2", "paged|sdpa", 5, {"": "a/b"}, ["sdpa"]], ids=str)
@pytest.mark.parametrize("place", ["top", "text_config", "list"])
def test_kernels_from_elsewhere_are_refused(key: str, value: object, place: str, tmp_path: Path) -> None:
    changes = {"top": {key: value}, "text_config": {"text_config": {key: value}}, "list": {"some": [{key: value}]}}
    folder = model(tmp_path, **changes[place])
    with pytest.raises(InputError, match=rf"config\.json: {key} is .*; expected eager"):
        load_config(folder)


@pytest.mark.parametrize("value", [None, "eager", "sdpa", {"": "sdpa", "text_config": "eager"}], ids=str)
def test_what_torch_has_itself_is_taken(value: object, tmp_path: Path) -> None:
    assert load_config(model(tmp_path, attn_implementation=value)).hidden_size == 32


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_kernels", True),
        ("kernel_config", {"a": "b/c"}),
        ("trust_remote_code", True),
        ("gguf_file", "x.gguf"),
        ("configuration_files", ["../other/config.4.0.0.json"]),
        ("fast_tokenizer_files", ["../other/tokenizer.4.0.0.json"]),
    ],
)
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_files_from_elsewhere_are_not_read(file: str, key: str, value: object, tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").rename(tmp_path / "other" / "tokenizer.4.0.0.json")
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | {key: value}))
    with pytest.raises(InputError, match=f"{file}: {key} is "):
        load_tokenizer(folder)
    with pytest.raises(InputError, match=f"{file}: {key} is "):
        check_foreign(folder / file)
