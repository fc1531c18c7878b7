"""What a step reads, had on the machine that works on it, where a store at a URL may be all that machines share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from pydantic import BaseModel

from sensmerge.pipeline.execute.begun import say_begun
from sensmerge.pipeline.execute.united import run_send, run_unite
from sensmerge.pipeline.execute.worker import (
    Done,
    Spent,
    keep_if_read_from,
    run_check,
    run_finish,
    run_part,
)
from sensmerge.pipeline.store.bring import bring
from sensmerge.pipeline.store.cache import make_room
from sensmerge.pipeline.store.manifest import SMALL
from sensmerge.pipeline.store.sent import Bundle
from sensmerge.pipeline.store.store import Key, Store
from sensmerge.tasks.checkpoints.held import held
from sensmerge.tasks.checkpoints.listing import Listing, UrlModel
from sensmerge.tasks.checkpoints.source import small_files
from sensmerge.tasks.checkpoints.sparse import Tensors
from sensmerge.tasks.checkpoints.unchanged import PlannedModels
from sensmerge.tasks.stages.download import DownloadJob
from sensmerge.tasks.stages.job import Job

if TYPE_CHECKING:  # with transformers it takes seconds, which Ray's start does not wait for
    from sensmerge.pipeline.plan.step import Step


@dataclass(frozen=True)
class Reads:
    """What the pieces of a step read."""

    run: str
    """names the run"""
    title: str
    """of the step"""
    store: Store
    needs: Mapping[str, Path]
    """folders of artifacts, by the titles of the steps that made them"""
    models: PlannedModels
    """whose weights are read"""
    small: tuple[Listing, ...]
    """other models, of which a config or a tokenizer is read"""
    others: tuple[Path, ...]
    """rows, and of earlier artifacts what may be taken over"""

    @classmethod
    def of(cls, run: str, step: Step, job: Job, store: Store, plan: Sequence[Step]) -> Reads:
        """Look for all that a job names.

        Args:
            run: names the run.
            step: whose job it is.
            job: as the step begins, with what it takes over.
            store: where artifacts are.
            plan: all steps, with the downloads of all models.
        """
        needs = {one.title: store.folder(one.key) for one in plan if one.title in step.needs}
        named = dict.fromkeys(paths_in(job))
        models = [one.job.listing for one in plan if isinstance(one.job, DownloadJob)]
        small = tuple(one for one in models if one.folder in named and one not in step.models.listings)
        others = tuple(path for path in named if path not in needs.values() and path.is_relative_to(store.root))
        return cls(run, step.title, store, needs, step.models, small, others)

    def bring(self) -> None:
        """Have all but the models' weights on this machine; a store in a folder is one that all machines see.

        Raises:
            InputError: some of it is not at its URL, or cannot be read.
        """
        if self.store.remote is None:
            return
        for folder in self.needs.values():
            bring(self.store, folder, self.run)
        for path in self.others:
            bring(self.store, path, self.run, SMALL)
        for listing in self.small:
            small_files(listing, self.models.cache)

    @contextmanager
    def here(self, tensors: Tensors | None = None) -> Iterator[None]:
        """Have all of it on this machine within the block, weights included, whatever else the cache has to let go.

        That the step has begun is said first.

        Args:
            tensors: all that is read of the weights; None: whole files.

        Raises:
            InputError: as `bring`, and as `PlannedModels.bring`.
        """
        say_begun(self.run, self.title)
        artifacts = [self.store.root.joinpath(*self.store.path_of(one).split("/")[:2]) for one in self.others]
        models = [one.folder for one in (*self.models.listings, *self.small) if isinstance(one.source, UrlModel)]
        units = [*self.needs.values(), *artifacts, *models]
        with held(units, tensors) if self.store.remote is not None else nullcontext():
            make_room(self.store)
            self.bring()
            self.models.bring(tensors)
            make_room(self.store)
            yield


def look_at_result(store: Store, key: Key, run: str) -> None:
    """Have the small files of what a step has made on this machine, where the next steps are prepared.

    Args:
        store: the store.
        key: of what was made.
        run: names the run.
    """
    bring(store, store.folder(key), run, SMALL)
    if store.remote is not None:  # it was made elsewhere, and what was prepared for it here is of no use any more
        shutil.rmtree(store.partial(key), ignore_errors=True)


def paths_in(value: Any) -> Iterator[Path]:
    """Yield all paths in a job: in its fields, and in what these hold."""
    match value:
        case PlannedModels():  # those that the step reads
            return
        case Path():
            yield value
        case Mapping():
            for one in value.values():
                yield from paths_in(one)
        case list() | tuple() | set() | frozenset():
            for one in value:
                yield from paths_in(one)
        case BaseModel():
            for name in type(value).model_fields:
                yield from paths_in(getattr(value, name))
        case _ if is_dataclass(value) and not isinstance(value, type):
            for field in fields(value):
                yield from paths_in(getattr(value, field.name))


def check(reads: Reads, job: Job, partial: Path) -> Done:
    """Bring the artifacts that a step reads to this machine and read through them; the answer says which node this is.

    Raises:
        InputError: as `Reads.bring` and `run_check`.
    """
    with reads.here({}):
        keep_if_read_from(reads.models, job, partial)
        return replace(run_check(reads.needs), node_id=ray.get_runtime_context().get_node_id())


def do_part(reads: Reads, job: Job, part: int | str, partial: Path, threads: int) -> Done:
    """Run one of a step's pieces, see `run_part`, wherever that is."""
    with reads.here(job.reads(part)):
        return run_part(job, part, partial, threads, reads.models)


def finish(reads: Reads, job: Job, key: Key, before: Spent, threads: int, is_united: bool = False) -> Done:
    """Complete a step, see `run_finish` and `run_unite`, wherever that is."""
    with reads.here(job.reads(None)):
        if is_united:
            return run_unite(job, reads.store, key, before, threads, reads.models)
        return run_finish(job, reads.store, key, before, threads, reads.models)


def send(reads: Reads, job: Job, key: Key, bundle: Bundle, threads: int) -> Done:
    """Complete the files of a bundle and write them to the URL; then they are here no more."""
    return run_send(job, reads.store, key, bundle, threads)
