"""Serves a merged model, static or dynamic, with Ray Serve: answers in batches, health and metrics.

On this machine, with Ray of its own, for those on this machine:

    python infra/serve.py FOLDER

On the head of a cluster whose nodes have sensmerge (FOLDER may also be a URL of a store, or models:/NAME@champion):

    python infra/serve.py FOLDER --address auto --host 0.0.0.0 --token-file /run/secrets/token

`serve run infra.serve:app model=FOLDER` does the same in a folder that has `infra/`.

What a request asks, and what comes back:

    POST /predict  {"rows": [{"task": "math", "question": "3 + 4"}, {"text": "3 + 4 ="}], "parameters": {"seed": 1}}
                   {"answers": [{"prediction": "7", "expert": "math", "coefficients": {"math": 1.2, …}}, …]}
                   {"rows": ["3 + 4 ="], "parameters": {"task": "topic"}}: the task of all rows, see `Asked`
    GET  /model    what is served, and the tasks that it can be asked in their prompts
"""

import argparse
import asyncio
import hmac
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from threading import Event
from typing import Any

try:
    from fastapi import FastAPI, Header, HTTPException
    from pydantic import BaseModel, ConfigDict
    from ray import serve
    from ray.serve import metrics
except ImportError as error:
    sys.exit(f"error: {error}; run pip install -c constraints.txt '.[serve]'")

from sensmerge.tasks.checkpoints.companions import CONFIG
from sensmerge.tasks.dynamic.folder import MANIFEST
from sensmerge.tasks.dynamic.model import DynamicModel
from sensmerge.tasks.errors import InputError, shown
from sensmerge.tasks.kinds.questions import TASK, Question
from sensmerge.tasks.serving.scorer import Scorer, written_as
from sensmerge.tasks.serving.static_model import StaticModel

BATCH_SIZE = 32
"""Rows that are answered together at most."""
WAIT = 0.01
"""Seconds that a row waits for others to be answered with; while a batch is answered the next one fills by itself."""
AskedRow = tuple[str | dict[str, Any], dict[str, Any], str]
"""a row, the parameters of its request, and what messages call it"""
Answer = dict[str, Any] | InputError
NAME = "sensmerge"
"""Of the deployment, and of the application of `main`."""
web = FastAPI(title=NAME)


class Settings(BaseModel):
    """What is served and how: the arguments of `serve run infra.serve:app`."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str
    """folder of a merge, its URL in a store, or a registered version (models:/NAME@ALIAS)"""
    device: str = "cpu"
    dtype: str | None = None
    """torch name; None: that of the scores of a dynamic model or a registered version, else float32"""
    replicas: int = 1
    cpus: float = 1
    gpus: float = 0
    """of each replica"""
    tracking_uri: str | None = None
    """of MLflow, for a registered version; None: MLFLOW_TRACKING_URI, where replicas run"""
    token_file: str | None = None
    """file with a token, the same on every node: requests then need `Authorization: Bearer TOKEN`"""


class Asked(BaseModel):
    """A request."""

    model_config = ConfigDict(extra="forbid")

    rows: list[str | dict[str, Any]]
    """texts, read as they are; or rows that say how they are asked: `task`, `messages`, `text`, or `image` (base64)"""
    parameters: dict[str, Any] = {}
    """max_new_tokens, temperature, top_p, seed, stop; `task`: of all rows that name none, for its prompt where the
    model keeps it, or, of a static merge, for the head that answers"""


class MergedModel:
    """One replica, with a copy of the model."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """Load the model; `settings` are those of `Settings`."""
        self._settings = Settings.model_validate(settings)
        self._token = _token(self._settings.token_file)
        self._loaded = _loaded(self._settings)
        self._model: DynamicModel | StaticModel = self._loaded.get_raw_model()
        self._failure: str | None = None
        self._requests = metrics.Counter("sensmerge_requests", "requests, by HTTP status", tag_keys=("status",))
        # Static merges have no routes: their rows have an empty tag.
        self._rows = metrics.Counter("sensmerge_rows", "answered rows, by the expert taken", tag_keys=("expert",))

    @web.post("/predict")
    async def predict(self, asked: Asked, authorization: str = Header("")) -> dict[str, Any]:
        """Answer rows, together with those of other requests."""
        try:
            self._check(authorization)
            found = await asyncio.gather(
                *(self._answer((row, asked.parameters, f"row {number}")) for number, row in enumerate(asked.rows))
            )
            for one in found:
                if isinstance(one, InputError):
                    raise HTTPException(400, str(one))
        except HTTPException as error:
            self._requests.inc(tags={"status": str(error.status_code)})
            raise
        except Exception:
            self._requests.inc(tags={"status": "500"})
            raise
        self._requests.inc(tags={"status": "200"})
        return {"answers": found}

    @web.get("/model")
    async def model(self, authorization: str = Header("")) -> dict[str, Any]:
        """Return what is served."""
        self._check(authorization)
        dynamic = isinstance(self._model, DynamicModel)
        return {
            "model": self._settings.model,
            "kind": "dynamic" if dynamic else "static",
            "experts": list(self._model.experts) if isinstance(self._model, DynamicModel) else [],
            "tasks": list(self._model.prompts),
        }

    def check_health(self) -> None:
        """Raise RuntimeError if the last batch failed for a reason that is not its rows': Serve then starts anew.

        The model is not run for this: a long batch is no failure.
        """
        if self._failure is not None:
            raise RuntimeError(self._failure)

    def _check(self, authorization: str) -> None:
        if self._token is not None and not hmac.compare_digest(
            authorization.encode(), f"Bearer {self._token}".encode()
        ):
            raise HTTPException(401, "expected the header Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})

    @serve.batch(max_batch_size=BATCH_SIZE, batch_wait_timeout_s=WAIT)  # type: ignore[untyped-decorator]
    async def _answer(self, asked: list[AskedRow]) -> list[Answer]:
        return await self.answers(asked)

    async def answers(self, asked: Sequence[AskedRow]) -> list[Answer]:
        """Answer a batch of rows, beside the event loop; an InputError stands for one that cannot be answered."""
        try:
            found = await asyncio.to_thread(self._grouped, asked)
        except Exception as error:
            self._failure = f"the last batch failed: {error!r}"
            raise
        self._failure = None
        for one in found:
            if isinstance(one, dict):
                self._rows.inc(tags={"expert": one.get("expert", "")})
        return found

    def _grouped(self, asked: Sequence[AskedRow]) -> list[Answer]:
        alike: dict[str, list[int]] = {}
        for place, (_, parameters, _) in enumerate(asked):
            alike.setdefault(json.dumps(parameters, sort_keys=True), []).append(place)
        found: dict[int, Answer] = {}
        for places in alike.values():
            found |= zip(places, self._together([asked[place] for place in places]), strict=True)
        return [found[place] for place in range(len(asked))]

    def _together(self, asked: Sequence[AskedRow]) -> list[Answer]:
        """Answer rows of equal parameters; one that cannot be answered keeps no other from its answer."""
        parameters, names = dict(asked[0][1]), [name for _, _, name in asked]
        try:
            task = _task(parameters.pop(TASK, None))
            most, decoding = written_as(parameters)
            questions = [_asked_for(_question(one), task, self._model) for one, _, _ in asked]
            if isinstance(self._model, DynamicModel):
                return [asdict(one) for one in self._model.predict(questions, most, names, decoding)]
            return [{"prediction": one} for one in self._model.predict(questions, most, task, decoding, names)]
        except InputError as error:
            return [error] if len(asked) == 1 else [answer for one in asked for answer in self._together([one])]


def _question(row: str | Mapping[str, Any]) -> Question:
    """Return what is asked in a row: that of a picture is its file, in base64."""
    picture = row.get("image") if isinstance(row, Mapping) and not {"task", "messages", "text"} & row.keys() else None
    return picture if isinstance(picture, str) else row


def _task(given: Any) -> str | None:
    """Return the task of all rows. Raises InputError for what is no name."""
    if given is not None and not isinstance(given, str):
        raise InputError(f"the parameter task is {shown(given)}; expected a task's name")
    return given


def _asked_for(question: Question, task: str | None, model: DynamicModel | StaticModel) -> Question:
    """Return a question as the task of all rows asks it, where that has a prompt; a row's own task comes first.

    Raises InputError for what has no fields for a prompt, if the task chooses no head either.
    """
    if task is None or (isinstance(model, StaticModel) and task not in model.prompts):
        return question
    if isinstance(question, Mapping):
        return {TASK: task, **question}
    if isinstance(model, DynamicModel):
        raise InputError(
            f"the parameter task is {task}, but a bare text or picture has no fields for its prompt, and the router "
            "chooses the head; give rows with these fields, or leave the parameter out"
        )
    return question


def _token(file: str | None) -> str | None:
    """Return the token in a file. Raises InputError for an empty one, or none."""
    if file is None:
        return None
    try:
        token = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise InputError(f"token_file: {file} cannot be read ({error})") from None
    if not token:
        raise InputError(f"token_file: {file} is empty; write a long random text to it")
    return token


def _loaded(settings: Settings) -> Any:
    """Return a model that has been loaded, and has its lease in the store as long as it lives."""
    if settings.model.startswith("models:/"):
        import mlflow

        if settings.tracking_uri is not None:
            mlflow.set_tracking_uri(settings.tracking_uri)
        chosen = {"device": settings.device} | ({} if settings.dtype is None else {"dtype": settings.dtype})
        return mlflow.pyfunc.load_model(settings.model, model_config=chosen)
    return Scorer(settings.model, settings.device, settings.dtype)


Deployed = serve.deployment(name=NAME, max_ongoing_requests=256)(serve.ingress(web)(MergedModel))


def app(arguments: dict[str, Any]) -> serve.Application:
    """Return the application that `serve run infra.serve:app KEY=VALUE …` runs; the keys are those of `Settings`."""
    settings = Settings.model_validate(arguments)
    resources = {"num_cpus": settings.cpus, "num_gpus": settings.gpus}
    deployment = Deployed.options(num_replicas=settings.replicas, ray_actor_options=resources)
    found: serve.Application = deployment.bind(settings.model_dump())
    return found


def main() -> None:
    """Serve a model until a signal comes; without address and host, for this machine alone."""
    parser = argparse.ArgumentParser(description="Serve a merged model with Ray Serve.")
    parser.add_argument("model", help="folder of a merge, its URL, or models:/NAME@ALIAS")
    parser.add_argument("--address", help="Ray cluster to serve on; default: Ray on this machine")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; others than 127.0.0.1 need a token")
    parser.add_argument("--port", type=int, default=8000)
    for name, kind in (
        ("device", str),
        ("dtype", str),
        ("replicas", int),
        ("cpus", float),
        ("gpus", float),
        ("tracking-uri", str),
    ):
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--token-file", help="file with the token that requests need")
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    where = {name: given.pop(name, None) for name in ("address", "host", "port")}
    if where["host"] not in ("127.0.0.1", "localhost", "::1") and "token_file" not in given:
        parser.error(f"--host {where['host']} lets others ask; give --token-file, and put TLS before it")

    folder = Path(given["model"])
    if folder.is_dir() and not any((folder / name).is_file() for name in (MANIFEST, CONFIG)):
        parser.error(
            f"{folder} has neither {MANIFEST} (a dynamic model) nor {CONFIG} (a static merge); give the folder of a "
            "variant, as `run` printed it"
        )

    from sensmerge.pipeline.execute.cluster import cluster
    from sensmerge.pipeline.execute.stop import Stopped, stoppable

    with suppress(Stopped), stoppable(), cluster(where["address"]):
        serve.start(http_options={"host": where["host"], "port": where["port"]})
        try:
            serve.run(app(given), name=NAME)
            sys.stdout.write(f"{given['model']}: http://{where['host']}:{where['port']}/predict\n")
            sys.stdout.flush()
            Event().wait()
        finally:
            serve.delete(NAME)  # a cluster would go on without this process


if __name__ == "__main__":
    main()
