"""A store that is not there yet, looked at by what makes none: plans, and drafts of recipes."""

import os
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from sensmerge.pipeline.store.store import Store, cache_folder
from sensmerge.tasks.artifacts import sha256_text
from sensmerge.tasks.checkpoints.listing import DIGESTS
from sensmerge.tasks.errors import InputError

EARLY = "planned"
"""Folder, among a user's caches, of what was read before there was a store."""


def looked_at(store: Store) -> Store:
    """Return a store to read with, which makes no folder of its own for that.

    Where it has none yet, files of the hub and digests that are taken meanwhile are kept among this user's caches. A
    store at a URL is always looked at by way of its folder there.

    Raises:
        InputError: its folder cannot be made.
    """
    if store.remote is not None:
        store.make()
    if store.root.is_dir():
        return store
    nearest = next(one for one in (store.root, *store.root.parents) if one.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(
            f"--store {store.root}: cannot be made ({nearest} is no folder that can be written to); choose another "
            "folder"
        )
    return replace(store, cache=_early(store))


def take_over(store: Store) -> None:
    """Give a store, which has been made, the digests that were taken before, and forget all else that was read."""
    early = _early(store)
    if early.is_dir():
        with suppress(OSError):  # without them, the files are read once more
            shutil.copytree(early / DIGESTS, store.hub_cache / DIGESTS, dirs_exist_ok=True)
        shutil.rmtree(early, ignore_errors=True)


def _early(store: Store) -> Path:
    return cache_folder().absolute() / EARLY / f"{store.root.name}-{sha256_text(str(store.root))[:8]}"
