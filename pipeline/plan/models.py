"""The models that a recipe names, listed file by file; nothing of them is read but what listing them takes."""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from sensmerge.pipeline.recipe.schema import Recipe
from sensmerge.tasks.artifacts import canonical, sha256_text
from sensmerge.tasks.checkpoints.listing import Listing, UrlModel, parse_model_id
from sensmerge.tasks.checkpoints.source import resolve
from sensmerge.tasks.errors import InputError


def list_models(recipe: Recipe, folder: Path, cache: Path) -> dict[str, Listing]:
    """List the files of base and experts, several models at once, without reading weights (`hash_models` does).

    Args:
        recipe: the recipe.
        folder: what its relative paths are relative to.
        cache: the hub's cache.

    Raises:
        InputError: as `resolve`, or an expert stands there twice; it names the recipe's key.
    """
    models = recipe.models()

    def listing(name: str) -> Listing:
        with _about_model(name):
            one = models[name]
            return resolve(parse_model_id(one.model, folder, one.subfolder), cache)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        listings = dict(zip(models, pool.map(listing, models), strict=True))
    _check_distinct(listings)
    return listings


def unhashed_bytes(listings: Mapping[str, Listing]) -> dict[str, int]:
    """Return the size of the weights that nobody has read yet, by model; models without any are left out."""
    sizes = {name: sum(file.size for file in listing.unhashed()) for name, listing in listings.items()}
    return {name: size for name, size in sizes.items() if listings[name].unhashed()}


def hash_models(
    listings: Mapping[str, Listing], cache: Path, advance: Callable[[int], None] = lambda size: None
) -> dict[str, Listing]:
    """Return the models with the digests of all files: the weights that nobody has read yet are read.

    Args:
        listings: from `list_models`.
        cache: the hub's cache, where digests are kept.
        advance: told the size of every file that was read.

    Raises:
        InputError: a file changes meanwhile, or an expert stands there twice; it names the recipe's key.
    """
    hashed = dict(listings)
    for name, listing in listings.items():
        for file in listing.unhashed():
            with _about_model(name):
                hashed[name] = hashed[name].hashed(file.name, cache)
            advance(file.size)
    _check_distinct(hashed)
    return hashed


def model_digest(listing: Listing) -> str:
    """Return the content digest of a model: its files' names, sizes and digests, and no path or revision."""
    return sha256_text(canonical([[file.name, file.size, file.digest] for file in listing.files]))


def is_lost(listing: Listing) -> bool:
    """Return whether files of a model are gone from this machine; those of one at a URL come with what reads them."""
    return not isinstance(listing.source, UrlModel) and bool(listing.missing())


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


def _about_model(name: str) -> AbstractContextManager[None]:
    return about("base" if name == "base" else f"experts.{name}")


def _check_distinct(listings: Mapping[str, Listing]) -> None:
    seen: dict[str, str] = {}
    for name, listing in listings.items():
        if listing.unhashed():
            continue
        digest = model_digest(listing)
        if digest in seen and "base" not in (name, seen[digest]):
            raise InputError(f"experts.{name}: the same files as experts.{seen[digest]}; expected every expert once")
        seen[digest] = name
