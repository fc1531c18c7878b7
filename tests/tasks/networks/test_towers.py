"""Zero-shot heads: their logits are those of transformers' CLIP."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPModel

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.towers import check_texts, class_rows
from sensmerge.tasks.networks.zero_shot import CLIPZeroShotClassifier
from tests.clips import ZERO_SHOT, expected_rows, make_clip, save_clip, tokenizer


@pytest.fixture(scope="module")
def clip() -> CLIPModel:
    return make_clip()


@pytest.fixture(scope="module")
def folder(clip: CLIPModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(clip, tmp_path_factory.mktemp("clip"))


def classifier(clip: CLIPModel, rows: torch.Tensor) -> CLIPZeroShotClassifier:
    config = clip.config.vision_config
    config.projection_dim, config.num_labels = rows.shape[1], len(rows)
    network = CLIPZeroShotClassifier(config)
    vision = {name: one for name, one in clip.state_dict().items() if name.startswith("vis")}
    network.load_state_dict(vision | {"classifier.weight": rows})
    return network.eval()


def test_one_template_gives_the_logits_of_transformers(clip: CLIPModel, folder: Path) -> None:
    names = ZERO_SHOT["blues"]["classes"]
    rows = class_rows(folder, names, ["a photo of {}."])
    pixels = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    texts = tokenizer()([f"a photo of {name}." for name in names], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = clip(pixel_values=pixels, **texts).logits_per_image
        found = classifier(clip, rows)(pixel_values=pixels, labels=torch.tensor([0, 1, 2, 0]))
    assert rows.dtype == torch.float32
    torch.testing.assert_close(found.logits, expected, atol=1e-5, rtol=1e-5)
    wanted = torch.nn.functional.cross_entropy(expected, torch.tensor([0, 1, 2, 0]))
    torch.testing.assert_close(found.loss, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("expert", ["reds", "blues"])
def test_rows_are_mean_directions_of_texts_that_were_read_alone(expert: str, clip: CLIPModel, folder: Path) -> None:
    names, templates = ZERO_SHOT[expert]["classes"], ["a photo of a {}.", "{}", "dark {} at night of a photo"]
    found = class_rows(folder, names, templates)
    torch.testing.assert_close(found, expected_rows(clip, names, templates), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.norm(dim=1), clip.logit_scale.exp().expand(len(names)))


def test_texts_that_are_too_long(clip: CLIPModel, folder: Path) -> None:
    arguments: dict[str, Any] = {"folder": folder, "config": clip.config, "key": "tasks.reds.zero_shot"}
    check_texts(names=["red"], templates=[9 * "a " + "{}"], **arguments)
    with pytest.raises(InputError, match=r"^tasks\.reds\.zero_shot: 'a .* red' has 13 tokens, and .* takes 12; expec"):
        check_texts(names=["red"], templates=[10 * "a " + "{}"], **arguments)
