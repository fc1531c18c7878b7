"""Tiny CLIPs: a base with both towers and a tokenizer, and vision towers that are fine-tuned from it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection, PreTrainedTokenizerFast

from tests.conftest import perturbed
from tests.pictures import SHAPE, save_model

ZERO_SHOT: dict[str, dict[str, Any]] = {
    "reds": {"classes": ["bright red", "dark red"], "templates": ["a photo of a {}.", "{}"]},
    "blues": {"classes": ["sky", "sea at night", "ink"], "templates": ["a photo of a {}."]},
}
"""By expert."""
_WORDS = ["a", "photo", "of", "bright", "dark", "red", "sky", "sea", "at", "night", "ink", "."]


def tokenizer() -> PreTrainedTokenizerFast:
    """Word by word, between begin and end token."""
    special = ["<|startoftext|>", "<|endoftext|>", "<unk>"]
    vocabulary = {word: number for number, word in enumerate([*_WORDS, *special])}
    made = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    begin, end = ((word, vocabulary[word]) for word in special[:2])
    made.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[begin, end]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=begin[0], eos_token=end[0], pad_token=end[0], unk_token="<unk>"
    )


def clip_config() -> CLIPConfig:
    """Both towers have two layers; directions are 8 numbers."""
    reader = tokenizer()
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    text |= {"vocab_size": len(reader), "max_position_embeddings": 12, "pad_token_id": reader.pad_token_id}
    text |= {"bos_token_id": reader.bos_token_id, "eos_token_id": reader.eos_token_id}
    return CLIPConfig(text_config=text, vision_config=SHAPE | {"intermediate_size": 48}, projection_dim=8)


def make_clip(seed: int = 0) -> CLIPModel:
    """The base or, with another seed, a fine-tune of both of its towers."""
    torch.manual_seed(0)
    clip = perturbed(CLIPModel(clip_config()), 0, 0.1)
    return (perturbed(clip, seed, 0.03) if seed else clip).eval()


def save_clip(clip: CLIPModel, folder: Path) -> Path:
    """Save both towers."""
    tokenizer().save_pretrained(save_model(clip, folder))
    return folder


def save_vision(clip: CLIPModel, folder: Path, with_projection: bool = False) -> Path:
    """Save the vision tower alone."""
    if not with_projection:
        tower = CLIPVisionModel(clip.config.vision_config)
        tower.load_state_dict(clip.vision_model.state_dict())
        return save_model(tower, folder)
    config = clip.config.vision_config
    config.projection_dim = clip.config.projection_dim
    network = CLIPVisionModelWithProjection(config)
    network.load_state_dict({name: one for name, one in clip.state_dict().items() if name.startswith("vis")})
    return save_model(network, folder)


def expected_rows(clip: CLIPModel, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """The rows of a head, each text read alone, as transformers has its direction and the factor of all logits."""
    rows = []
    with torch.no_grad():
        for name in classes:
            texts = [tokenizer()(template.replace("{}", name), return_tensors="pt") for template in templates]
            pixels = torch.zeros(1, 3, 12, 12)
            found = torch.cat([clip(pixel_values=pixels, **one).text_embeds for one in texts])
            mean = found.double().mean(0)
            rows.append(mean / mean.norm())
        return (torch.stack(rows) * clip.logit_scale.double().exp()).float()
