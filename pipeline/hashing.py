"""The digests of weights that nobody has read yet, with a word on how long they take where that is worth saying."""

from collections.abc import Mapping
from concurrent.futures import CancelledError
from threading import Event

from rich.console import Console
from rich.filesize import decimal

from sensmerge.pipeline.execute.progress import byte_progress
from sensmerge.pipeline.plan.models import hash_models, unhashed_bytes
from sensmerge.pipeline.store.store import Store
from sensmerge.tasks.checkpoints.digests import bytes_per_second
from sensmerge.tasks.checkpoints.listing import Listing

WORTH_SAYING = 10**9
"""Bytes; fewer take less than a second or two."""
SAMPLE = 2**26
"""Bytes by which is told how long all of them take."""


def hashed(
    listings: Mapping[str, Listing], store: Store, console: Console, stopped: Event | None = None
) -> dict[str, Listing]:
    """Return models with the digests of all their files, which the store then keeps for all who share it.

    Args:
        listings: from `list_models`.
        store: where digests are kept.
        console: told what is read and how long it takes, with progress, from `WORTH_SAYING` on.
        stopped: set by another thread when nobody waits for the digests any more.

    Raises:
        CancelledError: it is set, and a file has just been read; its digest is kept.
        InputError: as `hash_models`.
    """
    sizes = unhashed_bytes(listings)
    total = sum(sizes.values())
    if total < WORTH_SAYING:
        found = hash_models(listings, store.hub_cache)
    else:
        size, path = max(
            (file.size, listing.folder / file.name) for listing in listings.values() for file in listing.unhashed()
        )
        seconds = max(1, round(total / bytes_per_second(path, min(size, SAMPLE))))
        line = f"{said_of(sizes)}: read once for it, about {seconds} s"
        console.print(line, highlight=False, soft_wrap=True)
        with byte_progress(console, total, "digests") as advance:

            def read(size: int) -> None:
                advance(size)
                if stopped is not None and stopped.is_set():
                    raise CancelledError

            found = hash_models(listings, store.hub_cache, read)
    store.upload_digests()
    return found


def said_of(sizes: Mapping[str, int]) -> str:
    """Return how much of which models nobody has read yet; sizes as from `unhashed_bytes`."""
    return f"{decimal(sum(sizes.values()))} of {', '.join(sizes)} without a digest yet"
