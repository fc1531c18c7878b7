"""Which models classes of transformers read."""

import json
from pathlib import Path
from typing import Any

import pytest

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.known import known_config, lacking_package, why_unknown
from tests.conftest import llama_config

LLAMA = {**json.loads(llama_config().to_json_string()), "model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def written(folder: Path, config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_network_that_transformers_has(tmp_path: Path) -> None:
    assert why_unknown(written(tmp_path, LLAMA)) is None
    quantised = LLAMA | {"quantization_config": {"quant_method": "fp8"}}
    assert why_unknown(written(tmp_path, quantised)) is None  # what is refused is not its class
    config = known_config(tmp_path)
    assert config is not None
    assert config.model_type == "llama"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model_type": None}, "config.json names no model_type"),
        ({"model_type": ["llama"]}, "no model_type ['llama']"),
        ({"model_type": "new"}, "transformers has no model_type 'new'"),
        ({"architectures": ["MyLlama"]}, "architectures = ['MyLlama'] names no network"),
        ({"architectures": None}, "architectures = None names no network"),
    ],
)
def test_networks_that_it_has_not(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    assert why in str(why_unknown(written(tmp_path, LLAMA | changes)))
    assert (known_config(tmp_path) is None) == ("model_type" in changes)


def test_folders_without_config(tmp_path: Path) -> None:
    assert str(why_unknown(tmp_path)).endswith("has no config.json")
    assert known_config(tmp_path) is None
    (tmp_path / "adapter_config.json").write_text("{}")
    assert why_unknown(tmp_path) is None  # an adapter's network is the base's


def test_a_config_that_makes_no_sense_is_no_reason(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="hidden size"):
        why_unknown(written(tmp_path, LLAMA | {"hidden_size": -1}))


def test_only_a_package_that_is_not_here_is_one() -> None:
    error = InputError("no network can be built")
    assert lacking_package(error) is None
    error.__cause__ = InputError("of its settings")
    error.__cause__.__cause__ = ImportError("X requires the timm library. Install it")
    assert lacking_package(error) == "the class of transformers cannot be used here (X requires the timm library)"
