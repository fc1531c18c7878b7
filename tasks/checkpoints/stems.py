"""Which safetensors files of a folder are a model's weights: those whose names begin alike, with its stem.

A stem is what transformers, diffusers, Mistral or others call the file: `STEM.safetensors`, or shards that
`STEM.safetensors.index.json` lists.
"""

from collections.abc import Collection

SAFETENSORS = ".safetensors"
INDEXED = ".safetensors.index.json"
MODEL = "model"
"""Stem of transformers, timm and others."""
DIFFUSION = "diffusion_pytorch_model"
"""Stem of diffusers."""
CONSOLIDATED = "consolidated"
"""Stem of Mistral's own layout."""
ADAPTER = "adapter_model"
"""Stem of a PEFT adapter, which is no model."""
SHARDED = (MODEL, DIFFUSION)
"""Stems of which readers know shards and their index."""


def find_stem(names: Collection[str]) -> str | None:
    """Return the stem of a model's weights; None where there are none, or several files of which none is known.

    Of several, the first of transformers', diffusers' and Mistral's counts; any other must be alone.

    Args:
        names: of the files in the folder.
    """
    stems = single_stems(names)
    for known in (MODEL, DIFFUSION, CONSOLIDATED):
        if known in stems:
            return known
    indexed = sorted(name.removesuffix(INDEXED) for name in names if name.endswith(INDEXED) and "/" not in name)
    others = indexed or stems
    return others[0] if len(others) == 1 else None


def single_stems(names: Collection[str]) -> list[str]:
    """Return the stems that files of a folder may have, those of adapters apart."""
    top = [name for name in names if "/" not in name]
    stems = {name.removesuffix(end) for end in (INDEXED, SAFETENSORS) for name in top if name.endswith(end)}
    return sorted(stems - {ADAPTER})


def is_of_stem(name: str, stem: str) -> bool:
    """Return whether a file is one of a stem: its only one, a shard, or the index."""
    return name in (f"{stem}{SAFETENSORS}", f"{stem}{INDEXED}") or (
        name.startswith(f"{stem}-") and name.endswith(SAFETENSORS)
    )
