"""The models that a recipe names, listed file by file; nothing of them is read but what listing them takes."""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from sensmerge.pipeline.recipe.schema import Recipe
from sensmerge.tasks.artifacts import canonical, sha256_text
from sensmerge.tasks.checkpoints.listing import Listing, parse_model_id
from sensmerge.tasks.checkpoints.source import resolve
from sensmerge.tasks.errors import InputError


def list_models(recipe: Recipe, folder: Path, cache: Path) -> dict[str, Listing]:
    """List the files of base and experts, several models at once: files of folders are hashed.

    Args:
        recipe: the recipe.
        folder: what its relative paths are relative to.
        cache: the hub's cache.

    Raises:
        InputError: as `resolve`, or an expert stands there twice; it names the recipe's key.
    """
    texts = {"base": recipe.base} | {name: one.model for name, one in recipe.experts.items()}

    def listing(name: str) -> Listing:
        with about("base" if name == "base" else f"experts.{name}"):
            return resolve(parse_model_id(texts[name], folder), cache)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        listings = dict(zip(texts, pool.map(listing, texts), strict=True))
    _check_distinct(listings)
    return listings


def model_digest(listing: Listing) -> str:
    """Return the content digest of a model: its files' names, sizes and digests, and no path or revision."""
    return sha256_text(canonical([[file.name, file.size, file.digest] for file in listing.files]))


def weight_bytes(listing: Listing) -> int:
    """Return the size of a model's weight files."""
    return sum(file.size for file in listing.files if file.name.endswith(".safetensors"))


@contextmanager
def about(key: str) -> Iterator[None]:
    """Name the recipe key in what is said of bad input."""
    try:
        yield
    except InputError as error:
        if str(error).startswith(key):
            raise
        raise InputError(f"{key}: {error}") from error


def _check_distinct(listings: Mapping[str, Listing]) -> None:
    seen: dict[str, str] = {}
    for name, listing in listings.items():
        digest = model_digest(listing)
        if digest in seen and "base" not in (name, seen[digest]):
            raise InputError(f"experts.{name}: the same files as experts.{seen[digest]}; expected every expert once")
        seen[digest] = name
