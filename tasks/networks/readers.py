"""What reads rows for a network: a tokenizer, or an image processor."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from sensmerge.tasks.networks.networks import load_tokenizer
from sensmerge.tasks.networks.pictures import PIXELS, Reads, load_image_processor


def load_reader(folder: Path, reads: Reads) -> Any:
    """Load the tokenizer, or the image processor, of a model folder; raises InputError as these."""
    return load_image_processor(folder) if reads == "pictures" else load_tokenizer(folder)


def vision_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the part of a config that is about what reads pictures."""
    found: PretrainedConfig = getattr(config, "vision_config", config)
    return found


def width_of(config: PretrainedConfig) -> int:
    """Return how wide the hidden states of a network are, behind its last block where that changes."""
    part = vision_config(config) if hasattr(config, "vision_config") else config.get_text_config()
    widths = getattr(part, "hidden_sizes", None)
    return int(widths[-1] if widths else part.hidden_size)


def random_pictures(config: PretrainedConfig, count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return random inputs of a network that reads pictures, of the size that its config names, float32."""
    vision = vision_config(config)
    size = getattr(vision, "image_size", None) or 224
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = getattr(vision, "num_channels", 3)
    return {PIXELS: torch.randn(count, channels, height, width, generator=generator)}


def read_by(network: type[PreTrainedModel] | PreTrainedModel) -> Reads:
    """Return what a network, or a class of them, reads; of those that write texts, only these are used."""
    return "pictures" if network.main_input_name == PIXELS and not network.can_generate() else "texts"
