"""Mergekit 0.1.5 itself, in a folder of its own; tests that ask for it are skipped where pip cannot fetch it."""

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

PACKAGES = ("mergekit==0.1.5", "immutables==0.20")
"""What it needs beside what is installed here."""
MERGE = """
import sys
from pathlib import Path
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

options = MergeOptions(write_model_card=False, copy_tokenizer=True, lora_merge_cache="adapted")
for name in sys.argv[1:]:
    config = MergeConfiguration.model_validate(yaml.safe_load(Path(f"{name}.yml").read_text()))
    run_merge(config, f"{name}-out", options)
"""


@pytest.fixture(scope="session")
def mergekit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with mergekit alone, which uses the torch and transformers that are installed here."""
    folder = tmp_path_factory.mktemp("mergekit")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", f"--target={folder}", *PACKAGES]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip cannot fetch {PACKAGES[0]}")
    return folder


def merge(mergekit: Path, folder: Path, names: Iterable[str]) -> None:
    """Have mergekit merge what the configurations `NAME.yml` of a folder say, into `NAME-out` there."""
    command = [sys.executable, "-c", MERGE, *names]
    environment = os.environ | {"PYTHONPATH": str(mergekit)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def assert_equal_weights(
    ours: Path, theirs: Path, tolerance: float = 1e-5, moved: Mapping[int, int] | None = None
) -> None:
    """Check that two checkpoints hold the same tensors, up to a tolerance relative to each tensor's largest number.

    Args:
        ours: a checkpoint.
        theirs: the other one.
        tolerance: relative to a tensor's largest number.
        moved: our row ← their row of the embedding, of tokens.
    """

    def read(folder: Path) -> dict[str, Tensor]:
        return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}

    found, expected = read(ours), read(theirs)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape), key
        if moved is not None and key == "model.embed_tokens.weight":
            value[list(moved)] = value[list(moved.values())]
        assert (found[key] - value).abs().max() <= tolerance * max(1, value.abs().max()), key
