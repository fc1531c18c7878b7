"""Synthetic Llama-shaped checkpoints for benchmarks: seeded random weights, a base and experts that differ from it."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig

from sensmerge.tasks.checkpoints.planned import CheckpointWriter, plan_checkpoint, preallocate

SHARD_SIZE = 5_000_000_000


@dataclass(frozen=True)
class Size:
    """A shape of Llama."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    key_value_heads: int
    vocabulary: int = 32_000


SIZES: Mapping[str, Size] = {
    "0.1B": Size(768, 8, 2048, 12, 4),
    "0.3B": Size(1024, 20, 2816, 16, 4),
    "1.1B": Size(2048, 22, 5632, 32, 4),
    "3B": Size(2560, 36, 8192, 32, 8),
    "7B": Size(4096, 32, 11008, 32, 32),
}
"""By number of parameters; 1.1B is TinyLlama's shape, 7B Llama 2's."""


def shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a Llama with an untied head."""
    key_value = size.hidden // size.heads * size.key_value_heads
    block = {
        "self_attn.q_proj": (size.hidden, size.hidden),
        "self_attn.k_proj": (key_value, size.hidden),
        "self_attn.v_proj": (key_value, size.hidden),
        "self_attn.o_proj": (size.hidden, size.hidden),
        "mlp.gate_proj": (size.intermediate, size.hidden),
        "mlp.up_proj": (size.intermediate, size.hidden),
        "mlp.down_proj": (size.hidden, size.intermediate),
        "input_layernorm": (size.hidden,),
        "post_attention_layernorm": (size.hidden,),
    }
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (size.vocabulary, size.hidden)}
    for layer in range(size.layers):
        found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    return found | {"model.norm.weight": (size.hidden,), "lm_head.weight": (size.vocabulary, size.hidden)}


def llama_config(size: Size, dtype: torch.dtype) -> LlamaConfig:
    """Return the config of a Llama with an untied head."""
    return LlamaConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        intermediate_size=size.intermediate,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        vocab_size=size.vocabulary,
        tie_word_embeddings=False,
        dtype=str(dtype).removeprefix("torch."),
        architectures=["LlamaForCausalLM"],
    )


def make_model(folder: Path, size: Size, expert: int | None, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a base (`expert` None) or an expert of it, unless the folder is there; return the folder.

    An expert is the base plus noise of a twentieth of its spread, of its own seed; sizes and layout as transformers
    would write them.
    """
    if folder.exists():
        return folder
    making = folder.with_name(f"{folder.name}.making")
    making.mkdir(parents=True, exist_ok=True)
    tensors = shapes(size)
    plan = plan_checkpoint({name: (dtype, shape) for name, shape in tensors.items()}, SHARD_SIZE)
    preallocate(plan, making)
    with CheckpointWriter(plan, making) as writer:
        for number, (name, shape) in enumerate(tensors.items()):
            writer.write(name, _values(number, shape, expert).to(dtype))
    config = llama_config(size, dtype)
    (making / "config.json").write_text(json.dumps(config.to_dict(), indent=2))
    return making.rename(folder)


def _values(number: int, shape: tuple[int, ...], expert: int | None) -> torch.Tensor:
    """Return a tensor of the base, or of an expert of it, float32."""
    if len(shape) == 1:
        base = torch.ones(shape)
        scale = 0.05
    else:
        scale = 1 / math.sqrt(shape[-1])
        base = _noise(number, shape) * scale
    return base if expert is None else base + _noise(1_000_000 * (expert + 1) + number, shape) * (scale / 20)


def _noise(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_models(folder: Path, size: str, experts: int) -> Iterator[Path]:
    """Write a base and experts below a folder, as far as they are not there, and yield their folders, base first."""
    for expert in (None, *range(experts)):
        name = "base" if expert is None else f"expert-{expert}"
        yield make_model(folder / size / name, SIZES[size], expert)
