"""Models that are opened once, and anew when their files are others."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sensmerge.tasks.artifacts import Artifact
from sensmerge.tasks.networks.opened import opened_base, opened_expert, opened_tokenizer
from tests.conftest import make_llama, perturbed

WEIGHTS = "model.safetensors"


def test_models_are_opened_once(tmp_path: Path, save: Callable[..., Path]) -> None:
    base = Artifact("base", save(make_llama(), "base", tmp_path))
    expert = Artifact("expert", save(perturbed(make_llama(), 1), "expert", tmp_path))
    assert opened_base(base) is opened_base(base)
    assert opened_tokenizer(base) is opened_tokenizer(base)
    first = opened_expert(expert, base, "math", False)
    assert first is opened_expert(expert, base, "math", False)
    assert first is not opened_expert(expert, base, "math", True)
    assert first.base is opened_base(base)


def test_other_files_are_another_model(tmp_path: Path, save: Callable[..., Path]) -> None:
    folder = save(make_llama(), "base", tmp_path)
    base, expert = Artifact("base", folder), Artifact("expert", save(perturbed(make_llama(), 1), "expert", tmp_path))
    before, of_before = opened_base(base), opened_expert(expert, base, "math", False)
    name = before.weights[0]
    values = before.read(name).clone()
    save_file({key: one + 1 for key, one in load_file(folder / WEIGHTS).items()}, tmp_path / WEIGHTS, {"format": "pt"})
    (tmp_path / WEIGHTS).replace(folder / WEIGHTS)
    after = opened_base(base)
    assert after is not before
    torch.testing.assert_close(after.read(name), values + 1)
    assert opened_expert(expert, base, "math", False).base is after
    assert of_before.base is before
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert opened_base(Artifact("base", copied)) is not after
    assert opened_base(Artifact("another", folder)) is not after
