"""Merged models as MLflow's pyfunc and Ray Serve serve them: this module is what an MLmodel names as its loader.

It imports nothing of `pipeline`, and MLflow only to tell it what is wrong, so that what serves a model needs no more
than what runs it.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fsspec
import pandas as pd

from sensmerge.tasks.dynamic.folder import MANIFEST
from sensmerge.tasks.dynamic.model import DynamicModel
from sensmerge.tasks.errors import InputError, shown
from sensmerge.tasks.kinds.questions import MESSAGES, TASK, TEXT, Prompts, Question, is_plain, prompts_of
from sensmerge.tasks.networks.generation import GREEDY, Decoding
from sensmerge.tasks.networks.pictures import picture_file
from sensmerge.tasks.networks.readers import read_by
from sensmerge.tasks.serving.lease import Lease
from sensmerge.tasks.serving.static_model import StaticModel

BATCH_SIZE = 32


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> "Scorer":
    """Return what answers texts, rows, or pictures, with a merged model; MLflow calls this.

    Args:
        path: folder of the MLmodel.
        model_config: `folder`, where the merged model is if not in `path`, a folder or a URL that fsspec knows;
            `device` and `dtype`, torch names; `prompts`, what a static merge keeps of its recipe's tasks (a dynamic
            model has this in its folder); `pictures`, a folder: without it, pictures are not named by paths, for those
            who ask a server may not be those who may read its files.
    """
    settings = dict(model_config or {})
    pictures = Path(settings["pictures"]) if settings.get("pictures") else None
    prompts = prompts_of(settings.get("prompts") or {}, path)
    place = str(settings.get("folder") or path)
    return Scorer(place, settings.get("device", "cpu"), settings.get("dtype"), pictures, prompts)


class Scorer:
    """Answers a table of rows, or a list of texts or pictures, with a table that has a row for each."""

    def __init__(
        self,
        place: str,
        device: str,
        dtype: str | None,
        pictures: Path | None = None,
        prompts: Prompts | None = None,
    ) -> None:
        """See `_load_pyfunc`."""
        self._pictures = pictures
        self._has_said = False
        self._files = TemporaryDirectory()  # what is downloaded lives as long as the model
        self._lease = Lease(place)  # before anything is read, so that gc does not free half of it meanwhile
        try:
            self._model = _load(place, Path(self._files.name), device, dtype, prompts or {})
        except BaseException:
            self._lease.release()
            raise

    def get_raw_model(self) -> DynamicModel | StaticModel:
        """Return the merged model; MLflow's `PyFuncModel.get_raw_model` calls this."""
        return self._model

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Return a table: `prediction`, and of a dynamic model `expert` and `coefficient.EXPERT` for each expert.

        Args:
            model_input: a list of texts, read as they are, or a table. Rows of a table are asked by their column
                `task`, in the prompt of that task, which their other columns fill; else by `messages`, in the chat
                template; else by `text`. Of a model that reads pictures: their files as bytes or in base64, or paths
                below `pictures`, in a list or a column `image`.
            params: `task`, of all rows of a table, or whose head answers a list of texts (static classifiers with
                several); `max_new_tokens` and the settings of `Decoding` (models that write).

        Raises:
            MlflowException: what is no question, or one that the model cannot answer, named by its row; of all errors
                this one alone becomes status 400 and a line, where MLflow serves the model.
        """
        try:
            return self._table(model_input, params)
        except InputError as error:
            from mlflow.exceptions import MlflowException

            raise MlflowException.invalid_parameter_value(str(error)) from None

    def _table(self, model_input: Any, params: Mapping[str, Any] | None) -> pd.DataFrame:
        given = {
            name: one
            for name, one in (params or {}).items()
            if one is not None and not (isinstance(one, str) and not one)
        }
        task = given.pop("task", None)
        most, decoding = written_as(given)
        questions: Sequence[Question]
        if self._reads_pictures:
            questions = self._files_of(_column(model_input, "image"))
        else:
            questions = _questions(model_input, task, self._model.prompts)
            task = self._head(questions, task)
        self._say_how(questions)
        rows: list[dict[str, Any]] = []
        for start in range(0, len(questions), BATCH_SIZE):
            try:
                rows += self._rows(questions[start : start + BATCH_SIZE], most, task, decoding)
            except InputError as error:
                raise InputError(f"rows counted from {start}: {error}" if start else str(error)) from None
        types: dict[str, type] = {"prediction": object}
        if isinstance(self._model, DynamicModel):
            types |= {"expert": object} | {f"coefficient.{expert}": float for expert in self._model.experts}
        return pd.DataFrame({name: pd.Series([row[name] for row in rows], dtype=kind) for name, kind in types.items()})

    def _say_how(self, questions: Sequence[Question]) -> None:
        """Say once that texts are read as they are, where the model knows the prompts that it was scored in."""
        if not self._has_said and self._model.prompts and any(map(is_plain, questions)):
            self._has_said = True
            logging.getLogger(__name__).warning(
                "texts are read as they are, in no prompt: name the task in a column `task`, one of %s, beside the "
                "columns that its prompt reads, or give `messages`",
                ", ".join(self._model.prompts),
            )

    def _head(self, questions: Sequence[Question], task: str | None) -> str | None:
        """Return the task whose head is to answer, if a row does not name it itself.

        Raises InputError for a task that says nothing of a list of texts.
        """
        if any(not isinstance(one, str) for one in questions):
            return None
        if task is not None and isinstance(self._model, DynamicModel):
            raise InputError(
                f"task is {task}, but texts have no fields for its prompt; give a table with these columns"
            )
        return task

    @property
    def _reads_pictures(self) -> bool:
        model = self._model
        networks = model.networks.values() if isinstance(model, StaticModel) else [model.network.network]
        return read_by(next(iter(networks))) == "pictures"

    def _files_of(self, values: list[Any]) -> list[bytes]:
        return [picture_file(value, self._pictures, f"row {row}: the picture") for row, value in enumerate(values)]

    def _rows(
        self, questions: Sequence[Question], most: int | None, task: str | None, decoding: Decoding
    ) -> list[dict[str, Any]]:
        if isinstance(self._model, StaticModel):
            return [{"prediction": answer} for answer in self._model.predict(questions, most, task, decoding)]
        return [
            {"prediction": answer.prediction, "expert": answer.expert}
            | {f"coefficient.{expert}": value for expert, value in answer.coefficients.items()}
            for answer in self._model.predict(questions, most, decoding=decoding)
        ]


def written_as(given: Mapping[str, Any]) -> tuple[int | None, Decoding]:
    """Return the length of continuations at most, and how their tokens are chosen.

    Raises InputError for a setting that is none, or out of its range.
    """
    names = ("max_new_tokens", "temperature", "top_p", "seed", "stop")
    for name in given:
        if name not in names:
            raise InputError(f"found the parameter {name}; expected task, {', '.join(names)}")
    stop = given.get("stop", ())
    stop = (stop,) if isinstance(stop, str) else tuple(map(str, stop))
    try:
        most = int(given["max_new_tokens"]) if "max_new_tokens" in given else None
        temperature, top_p = (float(given.get(name, getattr(GREEDY, name))) for name in ("temperature", "top_p"))
        seed = int(given.get("seed", GREEDY.seed))
    except (TypeError, ValueError):
        raise InputError(f"found {shown(dict(given))}; expected numbers, and texts in stop") from None
    return most, Decoding(temperature, top_p, seed, stop)


def _load(place: str, cache: Path, device: str, dtype: str | None, prompts: Prompts) -> DynamicModel | StaticModel:
    """Load a merged model from a folder, or from a URL by way of the folder `cache`."""
    folder = Path(place)
    if "://" in place:
        files, path = fsspec.url_to_fs(place)
        folder = cache
        try:
            files.get(f"{path}/", f"{folder}/", recursive=True)
        except FileNotFoundError:
            raise _gone(place) from None
    if not folder.is_dir():
        raise _gone(place)
    if (folder / MANIFEST).is_file():
        return DynamicModel.load(folder, device, dtype)
    return StaticModel.load(folder, device, dtype or "float32", prompts)


def _gone(place: str) -> InputError:
    return InputError(
        f"{place}: the merged model is not there; mount the store under this name, run the recipe again to "
        "restore it, or load another version"
    )


def _column(given: Any, name: str) -> list[Any]:
    """Return the values of a column of a table, or of a list."""
    if isinstance(given, pd.DataFrame | dict):
        if name not in given:
            raise InputError(f"found the columns {', '.join(map(str, given)) or '(none)'}; expected a column {name}")
        given = given[name]
    if isinstance(given, str | bytes):
        raise InputError(f"found a single {name}; expected a DataFrame with a column {name}, or a list of {name}s")
    try:
        return list(given)
    except TypeError:
        raise InputError(f"found {shown(given)}; expected a list of {name}s, or a table") from None


def _questions(given: Any, task: str | None, prompts: Prompts) -> Sequence[Question]:
    """Return the rows of a table that names tasks or has messages; else its texts, or those of a list.

    A task that has a head alone, and no prompt, says nothing of how its texts are read.
    """
    named = task is not None and (task in prompts or TEXT not in given)
    if isinstance(given, pd.DataFrame | dict) and (named or TASK in given or MESSAGES in given):
        try:
            table = pd.DataFrame(given)
        except ValueError as error:  # columns of several lengths, or of none
            raise InputError(f"found columns that are no table ({error}); expected a list of values for each") from None
        rows = table.to_dict("records")
        asked = {} if task is None else {TASK: task}
        # Where rows of several tasks stand in one table, the columns of the others are empty.
        return [asked | {str(name): one for name, one in row.items() if not _is_missing(one)} for row in rows]
    texts = _column(given, TEXT)
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"row {row}: found {text!r}, expected a text")
    return texts


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)
