"""The folder of a dynamic model: base, compact task vectors, heads, route, and the digests of it all.

The base is a checkpoint in a folder of its own. The folder itself looks like none, so what loads checkpoints refuses it
instead of taking the base for the merge.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from transformers import PreTrainedModel

from sensmerge.tasks.artifacts import canonical, load_object, sha256_file, sha256_text, write_json
from sensmerge.tasks.checkpoints.weights import HEADS
from sensmerge.tasks.dynamic.network import DynamicNetwork
from sensmerge.tasks.dynamic.parameters import by_parameter
from sensmerge.tasks.dynamic.router import RouterSettings, Rule
from sensmerge.tasks.dynamic.sense import check_heads, check_vectors
from sensmerge.tasks.dynamic.trial import try_network
from sensmerge.tasks.dynamic.vectors import BASE, VECTORS, Vector, load_vectors
from sensmerge.tasks.errors import InputError, shown
from sensmerge.tasks.networks.base import Base, open_base
from sensmerge.tasks.networks.expert import load_network
from sensmerge.tasks.networks.heads import DetachedHead, SavedHead
from sensmerge.tasks.networks.networks import Head

MANIFEST = "dynamic.json"
"""A folder without it is no dynamic model."""
STATISTICS = "statistics.safetensors"
FORMAT = 3
"""Version of the folder."""


class Manifest(BaseModel):
    """What the folder holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int
    experts: Annotated[list[str], Field(min_length=1)]
    """in the order of coefficients"""
    head: Annotated[Head, Field(pattern="^(causal_lm|seq2seq_lm|classification|token_classification)$")]
    """what the network ends in"""
    dtype: Annotated[str, Field(pattern="^(float16|bfloat16|float32|float64)$")]
    """torch name of the dtype that the route was made in"""
    rule: Rule
    router: RouterSettings
    tasks: dict[str, dict[str, Any]]
    """what is kept of the experts' tasks, to be asked as they ask, see `kept_settings`"""
    files: dict[str, str]
    """sha256 of every other file, by its path in the folder"""

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if len(set(self.experts)) < len(self.experts):
            raise ValueError("an expert stands twice in experts")
        if self.rule.layer < 1:
            raise ValueError(f"rule.layer is {self.rule.layer}; expected at least 1")
        return self


def write_manifest(folder: Path, manifest: Manifest) -> str:
    """Write a folder's manifest, sealed by its own digest, which is returned."""
    content = manifest.model_dump(mode="json")
    digest = sha256_text(canonical(content))
    write_json(folder / MANIFEST, content | {"digest": digest})
    return digest


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a dynamic model's folder.

    Raises:
        InputError: there is none, it is altered, or it is of another version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(
            f"{folder}: no {MANIFEST} in it; expected the folder of a variant with application se; "
            "StaticModel loads a static merge, and `sensmerge predict` answers with either"
        )
    try:
        content = load_object(path)
        version, digest = content["version"], content.pop("digest")
    except KeyError as error:
        raise InputError(f"{path}: not the manifest of a dynamic model ({error!r}); copy the folder again") from error
    if version != FORMAT:
        found = shown(version)
        raise InputError(f"{path}: has format {found}, but this sensmerge reads {FORMAT}; run the recipe again")
    if sha256_text(canonical(content)) != digest:
        raise InputError(f"{path}: was altered: its digest does not match its content; copy the folder again")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        reason = ": ".join([*(str(part) for part in first["loc"][:1]), str(first["msg"]).removeprefix("Value error, ")])
        raise InputError(f"{path}: not the manifest of a dynamic model ({reason}); copy the folder again") from error


def check_files(folder: Path, manifest: Manifest) -> None:
    """Check every file of a dynamic model against its digest.

    Raises:
        InputError: a file is missing, altered, or named outside the folder.
    """
    for name, digest in manifest.files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{folder / MANIFEST}: names {name!r}, which lies outside the folder")
        if not path.is_file():
            raise InputError(f"{path}: is missing; copy the folder again")
        try:
            found = sha256_file(path)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); copy the folder again") from error
        if found != digest:
            raise InputError(f"{path}: was altered: its sha256 is not the one in {MANIFEST}; copy the folder again")


def check_names(folder: Path, manifest: Manifest) -> None:
    """Check that the places that a model is loaded from hold nothing else: it would answer with that too.

    Raises:
        InputError: a file that the manifest does not name.
    """
    for place in (BASE, VECTORS, HEADS):
        for path in sorted((folder / place).rglob("*")):
            if path.is_file() and path.relative_to(folder).as_posix() not in manifest.files:
                raise InputError(f"{path}: {MANIFEST} does not name it; remove it, or copy the folder again")


def load_network_with_heads(
    folder: Path, experts: Sequence[str], head: Head, dtype: str, device: str
) -> tuple[DynamicNetwork, dict[str, DetachedHead]]:
    """Return the network of a folder with base and vectors, and the heads of its experts.

    Args:
        folder: as stage merge writes it for SE-Merging.
        experts: their names, in the order of coefficients.
        head: `causal_lm`, `seq2seq_lm`, `classification` or `token_classification`.
        dtype: torch name of the dtype.
        device: torch device.

    Raises:
        InputError: what is in the folder does not fit together.
    """
    check_heads(folder, experts, head)
    base = open_base(folder / BASE)
    torch_dtype = getattr(torch, dtype)
    saved = {name: SavedHead(folder / HEADS / name) for name in experts if (folder / HEADS / name).is_dir()}
    first = next(iter(saved.values()), None)
    network = load_network(base, head, torch_dtype, device, first)
    heads = {name: DetachedHead.load(one, torch_dtype, device) for name, one in saved.items()}
    vectors = parameter_vectors(folder, base, network, experts)
    trial = try_network(network.config, network, vectors, str(folder))
    return DynamicNetwork(network, vectors, len(experts), trial.written), heads


def parameter_vectors(
    folder: Path, base: Base, network: PreTrainedModel, experts: Sequence[str]
) -> dict[str, dict[int, Vector]]:
    """Return a folder's task vectors by the network's parameter names and the experts' indices, in its dtype."""
    vectors: dict[str, dict[str, Vector]] = {}
    for path in sorted((folder / VECTORS).glob("*.safetensors")):
        vectors |= load_vectors(path)
    check_vectors(folder, experts, vectors, base)
    return by_parameter(base, network, vectors, experts)
