"""A client of MLflow: quiet, patient with what other runs write at the same time, and clear where it fails."""

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from mlflow import MlflowClient
from mlflow.environment_variables import (
    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR,
    MLFLOW_HTTP_REQUEST_MAX_RETRIES,
    MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT,
)
from mlflow.exceptions import MlflowException
from requests import HTTPError
from rich.filesize import decimal
from sqlalchemy.exc import SQLAlchemyError

from sensmerge.pipeline.store.history import SQLITE
from sensmerge.pipeline.tracking.database import make_database
from sensmerge.tasks.errors import StepError, disk_trouble

TRIES = 5
"""How often a server that is gone is asked again, unless the environment says it: for a minute, not for four."""
TOO_LARGE = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
RETRIES = MLFLOW_HTTP_REQUEST_MAX_RETRIES.name


@contextmanager
def connected(uri: str) -> Iterator[MlflowClient]:
    """A client of the tracking URI, which prints nothing; a failure of MLflow is a StepError."""
    os.environ.setdefault(RETRIES, str(TRIES))
    with _quiet(), _explained(uri):
        if uri.startswith(SQLITE):
            make_database(Path(uri.removeprefix(SQLITE)))
        yield MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Say in a line what failed: MLflow, its database, or what keeps its files, of which the last two raise their own.

    A disk that is full has a line of its own.
    """
    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        if disk_trouble(error) is not None:
            raise
        if (what := _too_large(error)) is not None:
            raise StepError(
                f"MLflow at {uri} failed: {what} is more than it takes (413), or than a proxy before it does; raise "
                "the limit there (nginx: client_max_body_size)"
            ) from error
        # What SQLAlchemy adds to the database's message, a statement and a link, says nothing to whoever records runs.
        said = " ".join(str(error).partition("\n[SQL: ")[0].partition("\n(Background on ")[0].split())
        raise StepError(f"MLflow at {uri} failed: {said}") from error


def _too_large(error: Exception) -> str | None:
    """Return what was refused for its size; None of any other error."""
    if isinstance(error, HTTPError) and error.response is not None and error.response.status_code == TOO_LARGE:
        asked = error.response.request
        file = unquote(urlparse(asked.url or "").path).rpartition("/")[2]
        return f"{file} of {decimal(int(asked.headers['Content-Length']))}"
    return "a request" if f"failed with error code {TOO_LARGE:d}" in str(error) else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep MLflow's progress off the terminal: what it logs below a warning, the links it prints, its bars.

    Errors of databases come as exceptions too: they need not be logged, with all their frames.
    """
    levels = {"mlflow": logging.WARNING, "mlflow.store.db.utils": logging.CRITICAL}
    settings = {MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT.name: "true", MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.name: "false"}
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        with _having(settings):
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def at_once() -> AbstractContextManager[None]:
    """Have a server asked once only within the block."""
    return _having({RETRIES: "0"})


@contextmanager
def _having(settings: Mapping[str, str]) -> Iterator[None]:
    """Have MLflow see environment variables within the block."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ |= settings
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def if_there(ask: Callable[[], Any]) -> Any:
    """What MLflow answers; None where the model, version or alias asked for does not exist."""
    try:
        return ask()
    except MlflowException as error:
        # An alias that is not there is an invalid parameter; a model or version that is not there does not exist.
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def unless_there(create: Callable[[], object]) -> None:
    """Create something, unless another run has done so meanwhile."""
    try:
        create()
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def once_more(write: Callable[[], object]) -> None:
    """Write something, once more where MLflow 3.17 fails and need not; doing so twice is harmless.

    That is where another run wrote the same row just then, and where the server stopped in the middle of its answer:
    MLflow asks again by itself only where there was none.
    """
    try:
        write()
    except MlflowException as error:
        # What MLflow passes on is the database's own message: PostgreSQL's, SQLite's or MySQL's; or urllib3's.
        if not re.search("UniqueViolation|UNIQUE constraint|Duplicate entry|Connection broken", str(error)):
            raise
        write()
