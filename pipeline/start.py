"""How a command that reads a recipe begins: what takes seconds goes on side by side."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from threading import Event
from typing import Literal

from rich.console import Console

from sensmerge.pipeline.execute.address import LOCAL, cluster_address
from sensmerge.pipeline.execute.stop import stoppable
from sensmerge.pipeline.hashing import hashed, said_of
from sensmerge.pipeline.options import Options
from sensmerge.pipeline.plan.kept import find, inputs_digest, keep, kept_table
from sensmerge.pipeline.plan.models import list_models, unhashed_bytes
from sensmerge.pipeline.recipe.load import load_recipe
from sensmerge.pipeline.recipe.schema import Recipe
from sensmerge.pipeline.store.store import Key, Store
from sensmerge.pipeline.store.unmade import looked_at, take_over
from sensmerge.pipeline.tracking.uri import check_server
from sensmerge.pipeline.unchanged import say_unchanged
from sensmerge.tasks.checkpoints.listing import Listing
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.stages.download import DownloadJob


def print_plan(recipe: Path, overrides: Sequence[str], store: Store, console: Console, quick: bool = False) -> None:
    """Print every step, RUN or SKIP and why, the bytes to read and write, and what is to be said of the input.

    Args:
        recipe: path of the recipe.
        overrides: of its values.
        store: where artifacts are looked for.
        console: where the plan goes.
        quick: read no weights; steps that depend on digests which nobody has computed yet may be undecided.

    Raises:
        InputError: bad input.
    """
    loaded, folder = load_recipe(recipe, overrides), recipe.absolute().parent
    store = looked_at(store)
    store.look()
    listings: Mapping[str, Listing] = list_models(loaded, folder, store.hub_cache)
    kept = find(loaded, folder, store, listings)
    if kept is not None:
        console.print(kept_table(kept))
        for line in kept.lines:
            console.print(line, highlight=False, soft_wrap=True)
        return
    with ThreadPoolExecutor(1) as beside, _quick_imports():
        # Files are hashed while transformers is imported, which takes seconds as well. They are hashed in this thread,
        # the one that Ctrl-C reaches.
        planning = beside.submit(_import_planning, loaded, listings)
        if not quick:
            listings = hashed(listings, store, console)
        planning.result()

    from sensmerge.pipeline.plan.changes import model_changes
    from sensmerge.pipeline.plan.plan import make_plan, plan_table

    made_from = inputs_digest(loaded, folder, store, listings)
    planned = make_plan(loaded, folder, store, listings)
    keep(planned, folder, made_from)
    console.print(plan_table(planned))
    for line in (*planned.inputs.notes, *model_changes(planned)):
        console.print(line, highlight=False, soft_wrap=True)
    if unknown := unhashed_bytes(listings):
        line = f"{said_of(unknown)}: not read; "
        line += "plan without --quick decides the steps marked ?" if planned.undecided else "every step is decided"
        console.print(line, highlight=False, soft_wrap=True)


def check_report(report: Path | None) -> None:
    """Refuse a place where no report can be written.

    Raises:
        InputError: it is a folder, or in a folder that does not exist.
    """
    if report is not None and report.is_dir():
        raise InputError(f"--report {report}: is a folder; name a file in it")
    if report is not None and not report.absolute().parent.is_dir():
        raise InputError(f"--report {report}: folder {report.absolute().parent} does not exist; make it first")


def work(command: Literal["run", "refresh", "record"], options: Options, console: Console) -> bool:
    """Run, refresh or record a recipe while its store is locked; return whether a gate has passed its best."""
    with options.store.lock(options.wait), ThreadPoolExecutor(1) as beside, _set_if_left(Event()) as stopped:
        take_over(options.store)
        if say_unchanged(command, options, console):
            return True
        # Files are hashed, and Ray's workers import, while transformers and others are imported here, which takes
        # seconds as well.
        begun = Future[dict[str, Listing]]()
        listings = beside.submit(_begin, options, console, stopped, command != "record", begun)
        listed = begun.result()
        with _quick_imports():
            from sensmerge.pipeline import workflow
            from sensmerge.pipeline.execute.cluster import closed

            _import_planning(options.recipe, listed)
        works = {"run": workflow.run, "refresh": workflow.refresh, "record": workflow.record}
        found = listings.result()
        # Until here SIGTERM ends the process at once, and with it the Ray that it may have started; Ctrl-C as soon as
        # the thread beside has read the file that it is at.
        with stoppable(), closed():
            return works[command](options, found, console)


def _import_planning(recipe: Recipe, listings: Mapping[str, Listing]) -> None:
    """Import what it takes to plan a recipe."""
    import_module("sensmerge.pipeline.plan.plan")
    from sensmerge.pipeline.plan.kept_models import is_plain, may_be_kept  # with torch, too, a second

    if not is_plain(recipe):
        import_module("sensmerge.pipeline.plan.networks")
        import_module("sensmerge.pipeline.plan.network_layout")
    elif not may_be_kept(recipe, listings):
        import_module("sensmerge.pipeline.plan.opening")


def _begin(
    options: Options, console: Console, stopped: Event, has_work: bool, begun: "Future[dict[str, Listing]]"
) -> dict[str, Listing]:
    """List the models; if any is new to what has work, Ray starts, while files are hashed if that is sure.

    They are the result of `begun` as soon as Ray's own processes need no more of this one, which would wait for
    imports: its workers then have seconds of their own to import.
    """
    with ThreadPoolExecutor(1) as beside:
        with _or_its_error(begun):
            check_server(options.uri)
            listings = list_models(options.recipe, options.folder, options.store.hub_cache)
            hashing = beside.submit(hashed, listings, options.store, console, stopped)
            is_sure = has_work and _is_new(listings, options.store)
            if is_sure and cluster_address(options.address) == LOCAL:
                _connect_ahead(options)
            begun.set_result(listings)
        if is_sure and cluster_address(options.address) != LOCAL:
            _connect_ahead(options)
        found = hashing.result()
    if has_work and not is_sure and _is_new(found, options.store):
        _connect_ahead(options)
    return found


def _connect_ahead(options: Options) -> None:
    from sensmerge.pipeline.execute.cluster import connect

    connect(options.address, ahead=True)


def _is_new(listings: Mapping[str, Listing], store: Store) -> bool:
    """Return whether a model is not in the store as it is now; one without digests may be, if it has been there."""
    for name, listing in listings.items():
        key = Key.of(name, DownloadJob(listing, store.hub_cache))
        if (store.last(key) if listing.unhashed() else store.manifest(key)) is None:
            return True
    return False


@contextmanager
def _or_its_error(future: "Future[dict[str, Listing]]") -> Iterator[None]:
    """Have who waits for a result know of the error that the block is left by."""
    try:
        yield
    except BaseException as error:
        future.set_exception(error)
        raise


@contextmanager
def _set_if_left(event: Event) -> Iterator[Event]:
    """Set an event when the block is left by an error."""
    try:
        yield event
    except BaseException:
        event.set()
        raise


@contextmanager
def _quick_imports() -> Iterator[None]:
    """Import without looking for garbage among a million new objects that all stay: that takes a fifth of the time.

    Nor are they looked through when there are others later.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
