"""Which files of a folder are its weights."""

import pytest

from sensmerge.tasks.checkpoints.stems import find_stem, is_of_stem, single_stems


@pytest.mark.parametrize(
    ("names", "stem"),
    [
        (["model.safetensors", "config.json"], "model"),
        (["model.safetensors.index.json", "model-00001-of-00002.safetensors", "x.safetensors"], "model"),
        (["consolidated.safetensors", "model.safetensors"], "model"),
        (
            ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"],
            "diffusion_pytorch_model",
        ),
        (["diffusion_pytorch_model.fp16.safetensors"], "diffusion_pytorch_model.fp16"),
        (["consolidated.safetensors", "params.json"], "consolidated"),
        (["consolidated-00001-of-00002.safetensors", "consolidated.safetensors.index.json"], "consolidated"),
        (["open_clip_model.safetensors"], "open_clip_model"),
        (["one.safetensors", "two.safetensors"], None),
        (["unet/model.safetensors"], None),
        (["adapter_model.safetensors"], None),
        (["pytorch_model.bin"], None),
        ([], None),
    ],
)
def test_the_stem_of_a_folder(names: list[str], stem: str | None) -> None:
    assert find_stem(names) == stem


def test_the_files_of_a_stem() -> None:
    names = [
        "m.safetensors",
        "m-00001-of-00002.safetensors",
        "m.safetensors.index.json",
        "m.fp16.safetensors",
        "m-1.bin",
    ]
    assert [name for name in names if is_of_stem(name, "m")] == names[:3]
    assert single_stems([*names, "adapter_model.safetensors"]) == ["m", "m-00001-of-00002", "m.fp16"]
