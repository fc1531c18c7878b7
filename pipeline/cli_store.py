"""Commands that look after a store."""

from itertools import chain
from typing import Annotated

import typer

from sensmerge.pipeline.arguments import DEFAULT_STORE, StoreOption, WaitOption
from sensmerge.pipeline.console import console_of
from sensmerge.pipeline.store.store import Store
from sensmerge.pipeline.tracking.uri import TRACKING_URI
from sensmerge.tasks.errors import InputError


def verify(
    store: StoreOption = DEFAULT_STORE,
    remove: Annotated[bool, typer.Option("--delete", help="delete whatever is damaged; a run makes it again")] = False,
    wait: WaitOption = 0,
) -> None:
    """Check all artifacts and downloaded models against their digests. Exit status 1: something is damaged."""
    from sensmerge.pipeline.store.verify import find_damage

    check_exists(store)
    console, count, damaged = console_of(), 0, 0
    with store.lock(wait):
        for folder, wrong in find_damage(store):
            count += 1
            damaged += bool(wrong)
            for what in wrong:
                console.print(f"{folder.relative_to(store.root)}: {what}", highlight=False, soft_wrap=True)
            if wrong and remove:
                store.remove(folder)
    said = f", {damaged} of them damaged" if damaged else ", all intact"
    done = "; deleted, run the recipe again" if remove else "; delete them with --delete, and run the recipe again"
    console.print(f"{count} artifacts{said}{done if damaged else ''}", highlight=False)
    if damaged:
        raise typer.Exit(1)


def collect_garbage(
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: Annotated[
        str | None,
        typer.Option(
            "--tracking-uri",
            metavar="URI",
            help=f"MLflow server or database with the champions; default: all that runs used, and {TRACKING_URI}",
        ),
    ] = None,
    keep: Annotated[int, typer.Option(min=1, metavar="N", help="keep what the last N runs of each recipe need")] = 3,
    remove: Annotated[bool, typer.Option("--delete", help="delete what is listed")] = False,
    wait: WaitOption = 0,
) -> None:
    """List the artifacts that no alias, pinned version or recent run needs; --delete deletes them."""
    from rich.filesize import decimal

    from sensmerge.pipeline.store.garbage import delete, find_garbage, needed_artifacts
    from sensmerge.pipeline.tracking.versions import known_versions, mark_deleted

    check_exists(store)
    console = console_of()
    with store.lock(wait):
        versions = known_versions(store, tracking_uri)
        needed = needed_artifacts(store, keep, chain.from_iterable(versions.values()))
        garbage = find_garbage(store, needed)
        for name, size in garbage.freed.items():
            console.print(f"{name}: {decimal(size)}", highlight=False, soft_wrap=True)
        marked = mark_deleted(store, delete(store, garbage), versions) if remove else []
    for one in marked:
        console.print(f"{one.recipe}/{one.number}: its weights are deleted", highlight=False, soft_wrap=True)
    total = decimal(sum(garbage.freed.values()))
    for why in sorted(set(needed.values())):
        console.print(f"kept: {why}", highlight=False, soft_wrap=True)
    done = "freed" if remove else "can be freed with --delete"
    console.print(f"{total} {done}", highlight=False)


def check_exists(store: Store) -> None:
    """Refuse a store in a folder that is not there.

    Raises:
        InputError: there is no such folder.
    """
    if store.remote is None and not store.root.is_dir():
        raise InputError(f"--store {store}: no such folder; name the store of earlier runs")
