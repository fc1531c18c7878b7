"""Steps whose files several machines make, each a bundle: what a worker runs to send one, and to unite all."""

import platform
import shutil

from sensmerge.pipeline.execute.worker import Done, Spent, measured, states_of
from sensmerge.pipeline.store.manifest import file_sizes
from sensmerge.pipeline.store.sent import Bundle, forget, published, received, send
from sensmerge.pipeline.store.store import Key, Store
from sensmerge.tasks.artifacts import sha256_text
from sensmerge.tasks.checkpoints.unchanged import NONE, PlannedModels
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.stages.job import Job


def bundles_of(job: Job, models: PlannedModels) -> list[Bundle]:
    """Return the bundles of a job."""
    made_from = sha256_text(states_of(models))
    return [Bundle(number, tuple(parts), made_from) for number, parts in enumerate(job.bundles())]


def run_send(job: Job, store: Store, key: Key, bundle: Bundle, threads: int) -> Done:
    """Complete the files that the parts of a bundle wrote, and write them to the URL; then they are here no more.

    Raises:
        InputError: the URL cannot be used.
        OSError: a tensor on disk is not what was written.
    """
    if bundle.number in received(store, key, [bundle]):
        return Done({}, Spent())  # a worker sent them and died before it could say so
    partial = store.partial(key, bundle.number)

    def complete() -> None:
        names, packed = job.pack(bundle.parts, partial)
        send(store, key, bundle, partial, names, packed)

    _, spent = measured(job, complete, threads)
    shutil.rmtree(partial)
    return Done({}, spent)


def run_unite(job: Job, store: Store, key: Key, before: Spent, threads: int, models: PlannedModels = NONE) -> Done:
    """Complete a job whose bundles are all at the URL, and publish its artifact.

    Raises:
        InputError: as of `run_finish`; files of a bundle are not at the URL any more.
    """
    models.bring(job.reads(None))
    models.check()
    bundles = bundles_of(job, models)
    there = received(store, key, bundles)
    if len(there) < len(bundles):
        manifest = published(store, key)
        if manifest is None:
            lacking = next(one for one in bundles if one.number not in there)
            raise InputError(
                f"{key.stage} {key.name}: {lacking.name} is not at {store.uri(store.folder(key))}, or files that it "
                "names are others than were sent; run again, which makes them again"
            )
        # A worker published it and died before it could say so.
        return Done.before(manifest)
    partial = store.partial(key)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    packed = [there[one.number].packed for one in bundles]
    result, spent = measured(job, lambda: job.unite(packed, partial), threads)
    models.check()
    sent = {name: size for receipt in there.values() for name, size in receipt.files.items()}
    done = Done(result, before + spent, sum((file_sizes(partial) | sent).values()), platform.node())
    store.publish(key, done.manifest(), result.get("by_tensor", ()), sent)
    forget(store, key, bundles)
    return done
