"""The same α and g of classifiers of pictures whether they run whole, block by block, or on actors."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification

from sensmerge.tasks.kinds.image_classification import ImageClassificationTask
from sensmerge.tasks.networks.placement import Actors
from tests.conftest import TaskRows
from tests.pictures import in_base64, picture, pixels_of, save_classifiers
from tests.tasks.networks.owners import owners_here as owners_here
from tests.tasks.networks.test_streaming import same_as_whole, sensitivity_of

LABELS = {"math": 2, "code": 3}
TASK = ImageClassificationTask(kind="image_classification")


def sets() -> dict[str, TaskRows]:
    return {
        name: TaskRows(TASK, [{"image": in_base64(picture(i, count)), "label": i % count} for i in range(3)])
        for name, count in zip(LABELS, (1, 2), strict=True)
    }


@pytest.mark.parametrize("network", ["vit", "dinov2", "clip"])
def test_streamed(network: str, tmp_path: Path) -> None:
    folders = save_classifiers(network, tmp_path, LABELS)
    experts = {name: folders[name] for name in LABELS}
    same_as_whole(folders["base"], experts, sets(), {"streamed": "streamed"}, tmp_path)


def test_sensitivity_is_that_of_the_loss(tmp_path: Path) -> None:
    """α is by Σ |θ · ∂L/∂θ| over each layer; the head of the expert's own is no layer."""
    folders = save_classifiers("vit", tmp_path, LABELS)
    found = sensitivity_of("math", folders["base"], {"math": folders["math"]}, sets(), "whole", tmp_path / "out")
    network = AutoModelForImageClassification.from_pretrained(folders["math"], dtype=torch.float64)
    total: dict[str, float] = {}
    for number, row in enumerate(sets()["math"].rows):
        network.zero_grad()
        pixels = pixels_of(picture(number, 1))[None].double()
        network(pixel_values=pixels, labels=torch.tensor([row["label"]])).loss.backward()
        for name, parameter in network.named_parameters():
            key = name.removeprefix("vit.")
            layer = ".".join(key.split(".")[:2]) if key.startswith("layers.") else key.split(".")[0]
            total[layer] = total.get(layer, 0.0) + float((parameter * parameter.grad).abs().sum()) / 3
    del total["classifier"]
    assert sum(found.values()) == pytest.approx(sum(total.values()), rel=1e-4)
    blocks = {name: value for name, value in total.items() if name.startswith("layers.")}
    assert sorted(blocks.values()) == pytest.approx(sorted(found[one] for one in found if one[-1].isdigit()), rel=1e-4)


@pytest.mark.parametrize("network", ["vit", "dinov2"])
def test_shared_out(network: str, tmp_path: Path, owners_here: None) -> None:
    folders = save_classifiers(network, tmp_path, LABELS)
    experts = {name: folders[name] for name in LABELS}
    same_as_whole(folders["base"], experts, sets(), {"2": Actors(2, 1, 0)}, tmp_path)
