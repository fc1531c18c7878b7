"""Models that are opened once, and anew when their files are others."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sensmerge.tasks.artifacts import Artifact
from sensmerge.tasks.networks.opened import opened_base, opened_expert, opened_reader
from tests.conftest import make_llama, perturbed

WEIGHTS = "model.safetensors"


def test_models_are_opened_once_and_their_files_each_time(tmp_path: Path, save: Callable[..., Path]) -> None:
    base = Artifact("base", save(make_llama(), "base", tmp_path))
    expert = Artifact("expert", save(perturbed(make_llama(), 1), "expert", tmp_path))
    first, second = opened_base(base), opened_base(base)
    assert first.names is second.names
    assert opened_reader(base, "texts") is opened_reader(base, "texts")
    one, other = (opened_expert(expert, base, False) for _ in range(2))
    assert one.config is other.config
    assert one.base.names is first.names
    assert one.config is not opened_expert(expert, base, True).config
    name = first.weights[0]
    for model, again in ((first, second), (one, other), (one.base, other.base)):
        read = model.read(name)
        expected = read.clone()
        read.zero_()  # what one has changed in place, the others do not see
        torch.testing.assert_close(again.read(name), expected, rtol=0, atol=0)


def test_other_files_are_another_model(tmp_path: Path, save: Callable[..., Path]) -> None:
    folder = save(make_llama(), "base", tmp_path)
    base, expert = Artifact("base", folder), Artifact("expert", save(perturbed(make_llama(), 1), "expert", tmp_path))
    before, of_before = opened_base(base), opened_expert(expert, base, False)
    name = before.weights[0]
    values = before.read(name).clone()
    save_file({key: one + 1 for key, one in load_file(folder / WEIGHTS).items()}, tmp_path / WEIGHTS, {"format": "pt"})
    (tmp_path / WEIGHTS).replace(folder / WEIGHTS)
    after = opened_base(base)
    assert after.names is not before.names
    torch.testing.assert_close(after.read(name), values + 1)
    assert opened_expert(expert, base, False).base.names is after.names
    assert of_before.base.names is before.names
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert opened_base(Artifact("base", copied)).names is not after.names
    assert opened_base(Artifact("another", folder)).names is not after.names


@pytest.mark.parametrize("target", ["freed", "base/pytorch_model.bin"], ids=["nowhere", "itself"])
def test_a_link_that_leads_to_no_file_is_none(target: str, tmp_path: Path, save: Callable[..., Path]) -> None:
    base = Artifact("base", save(make_llama(), "base", tmp_path))
    (base.folder / "pytorch_model.bin").symlink_to(tmp_path / target)
    assert opened_base(base).weights
