"""Tiny networks that read pictures, their image processor, and pictures that they can tell apart."""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from tests.conftest import perturbed

SIZE, WIDTH = 12, 32
SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": 4,
}
PROCESSOR = ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.25] * 3)


def vit_config(labels: int = 2) -> ViTConfig:
    return ViTConfig(**SHAPE, intermediate_size=48, num_labels=labels)


def dinov2_config(labels: int = 2) -> Dinov2Config:
    return Dinov2Config(**SHAPE, mlp_ratio=2, num_labels=labels)


def clip_config(labels: int = 2) -> CLIPConfig:
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text |= {"vocab_size": 99, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    vision = SHAPE | {"intermediate_size": 48}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=8, num_labels=labels)


def convnext_config(labels: int = 2) -> ConvNextConfig:
    return ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=SIZE, num_labels=labels)


Make = Callable[[int], PreTrainedModel]
"""a classifier with so many classes"""
CLASSIFIERS: dict[str, tuple[Callable[[], PreTrainedModel], Make]] = {
    "vit": (
        lambda: ViTModel(vit_config(), add_pooling_layer=False),
        lambda labels: ViTForImageClassification(vit_config(labels)),
    ),
    "dinov2": (
        lambda: Dinov2Model(dinov2_config()),
        lambda labels: Dinov2ForImageClassification(dinov2_config(labels)),
    ),
    "clip": (
        lambda: CLIPForImageClassification(clip_config(5)),
        lambda labels: CLIPForImageClassification(clip_config(labels)),
    ),
    "convnext": (
        lambda: ConvNextModel(convnext_config()),
        lambda labels: ConvNextForImageClassification(convnext_config(labels)),
    ),
}
"""By name a base, and classifiers that have its tensors under their own names."""


def trunk_of_classifier(network: PreTrainedModel) -> PreTrainedModel:
    own = getattr(network, network.base_model_prefix, None)
    trunk: PreTrainedModel = network.vision_model if own is None else own
    return trunk


def save_classifiers(name: str, folder: Path, labels: dict[str, int]) -> dict[str, Path]:
    """Save a base and classifiers that are fine-tuned from it, each with a head for so many classes of its own."""
    make_base, make = CLASSIFIERS[name]
    torch.manual_seed(0)
    base = perturbed(make_base(), 0, 0.05)
    folders = {"base": save_model(base, folder / "base")}
    own = trunk_of_classifier(base).state_dict() if name == "clip" else base.state_dict()
    for seed, (expert, count) in enumerate(labels.items(), start=1):
        torch.manual_seed(seed)
        network = make(count)
        trunk_of_classifier(network).load_state_dict(own)
        folders[expert] = save_model(perturbed(network, seed), folder / expert)
    return folders


def save_model(network: PreTrainedModel, folder: Path) -> Path:
    network.save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return folder


def picture(number: int, colour: int, form: str = "PNG") -> bytes:
    """A picture of noise in one colour (0 red, 1 green, 2 blue), brighter in its upper half for even numbers."""
    random = np.random.default_rng(1000 * colour + number)
    pixels = random.integers(0, 80, (10, 14, 3))
    pixels[..., colour] += 120
    pixels[:5] += 40 * (1 - number % 2)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, form)
    return file.getvalue()


def in_base64(file: bytes) -> str:
    return base64.b64encode(file).decode()


def pixels_of(file: bytes) -> torch.Tensor:
    """What a network reads of a picture, (3, SIZE, SIZE), by the formula: resized by Pillow, (x ÷ 255 − 0.5) ÷ 0.25."""
    with Image.open(io.BytesIO(file)) as image:
        resized = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return torch.from_numpy((np.asarray(resized) / 255 - 0.5) / 0.25).float().permute(2, 0, 1)
