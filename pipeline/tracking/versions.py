"""The versions of registered models that may need what a store holds."""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from sensmerge.pipeline.store.history import SQLITE, lasting_uri, past_runs
from sensmerge.pipeline.store.store import Store
from sensmerge.pipeline.tracking.registry import Registered, mark_freed, registered_versions
from sensmerge.pipeline.tracking.uri import TRACKING_URI, check_server, default_uri
from sensmerge.tasks.errors import InputError


def known_versions(store: Store, tracking_uri: str | None) -> dict[str, list[Registered]]:
    """Return the versions of models that MLflow knows, by tracking URI.

    Args:
        store: the store.
        tracking_uri: the MLflow to ask; None for every one in which runs of the store were recorded, and the one that
            `MLFLOW_TRACKING_URI` names.

    Raises:
        InputError: one of them cannot be asked.
    """
    asked = {run.tracking_uri for run in past_runs(store)} if tracking_uri is None else {tracking_uri}
    named = os.environ.get(TRACKING_URI) if tracking_uri is None else None
    if named:  # with the password that the history leaves out
        asked = asked - {lasting_uri(named)} | {named}
    uris = {uri or default_uri(store) for uri in asked}
    versions = {}
    for uri in sorted(uris):
        check_server(uri)
        if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).is_file():
            raise InputError(
                f"--tracking-uri, or {TRACKING_URI}, is {uri}: no such file; name the MLflow that knows the store's "
                "champions"
            )
        versions[uri] = registered_versions(uri)
    return versions


def mark_deleted(
    store: Store, deleted: Collection[str], versions: Mapping[str, Sequence[Registered]]
) -> list[Registered]:
    """Mark the versions in MLflow that have lost their weights, and return them.

    Args:
        store: the store.
        deleted: the artifacts that were deleted from it, `stage/name-hash8`.
        versions: by tracking URI, as `known_versions` returns them.
    """
    marked: list[Registered] = []
    for uri, some in versions.items():
        # Another store may have an artifact of the same name, which is as good.
        freed = [one for one in some if one.artifact in deleted and not one.is_marked and store.lacking(one.folder)]
        mark_freed(uri, freed)
        marked += freed
    return marked
