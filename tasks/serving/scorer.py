"""Merged models as MLflow's pyfunc serves them: this module is what an MLmodel names as its loader.

It imports no MLflow and nothing of `pipeline`, so that what serves a model needs no more than what runs it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fsspec
import pandas as pd

from sensmerge.tasks.dynamic.folder import MANIFEST
from sensmerge.tasks.dynamic.model import DynamicModel
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.pictures import picture_file
from sensmerge.tasks.networks.readers import read_by
from sensmerge.tasks.serving.lease import Lease
from sensmerge.tasks.serving.static_model import StaticModel

BATCH_SIZE = 32
MAX_NEW_TOKENS = 64
"""Length of a language model's answer, if `params` does not say otherwise."""


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> "Scorer":
    """Return what answers texts, or pictures, with a merged model; MLflow calls this.

    Args:
        path: folder of the MLmodel.
        model_config: `folder`, where the merged model is if not in `path`, a folder or a URL that fsspec knows;
            `device` and `dtype`, torch names; `pictures`, a folder: without it, pictures are not named by paths, for
            those who ask a server may not be those who may read its files.
    """
    settings = dict(model_config or {})
    pictures = Path(settings["pictures"]) if settings.get("pictures") else None
    return Scorer(str(settings.get("folder") or path), settings.get("device", "cpu"), settings.get("dtype"), pictures)


class Scorer:
    """Answers a table with a column `text` or `image`, or a list of these, with a table that has a row for each."""

    def __init__(self, place: str, device: str, dtype: str | None, pictures: Path | None = None) -> None:
        """See `_load_pyfunc`."""
        self._pictures = pictures
        self._files = TemporaryDirectory()  # what is downloaded lives as long as the model
        self._lease = Lease(place)  # before anything is read, so that gc does not free half of it meanwhile
        try:
            self._model = _load(place, Path(self._files.name), device, dtype)
        except BaseException:
            self._lease.release()
            raise

    def get_raw_model(self) -> DynamicModel | StaticModel:
        """Return the merged model; MLflow's `PyFuncModel.get_raw_model` calls this."""
        return self._model

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Return a table: `prediction`, and of a dynamic model `expert` and `coefficient.EXPERT` for each expert.

        Args:
            model_input: the texts; or pictures: their files as bytes or in base64, or paths below `pictures`.
            params: `max_new_tokens` (language models); `task`, whose head answers (static classifiers with several).

        Raises:
            InputError: no texts or pictures, or one that the model cannot answer, named by its row.
        """
        given = dict(params or {})
        texts = self._files_of(_column(model_input, "image")) if self._reads_pictures else _texts(model_input)
        max_new_tokens = int(given.get("max_new_tokens", MAX_NEW_TOKENS))
        rows: list[dict[str, Any]] = []
        for start in range(0, len(texts), BATCH_SIZE):
            try:
                rows += self._rows(texts[start : start + BATCH_SIZE], max_new_tokens, given.get("task") or None)
            except InputError as error:
                raise InputError(f"rows counted from {start}: {error}") from None
        types: dict[str, type] = {"prediction": object}
        if isinstance(self._model, DynamicModel):
            types |= {"expert": object} | {f"coefficient.{expert}": float for expert in self._model.experts}
        return pd.DataFrame({name: pd.Series([row[name] for row in rows], dtype=kind) for name, kind in types.items()})

    @property
    def _reads_pictures(self) -> bool:
        model = self._model
        networks = model.networks.values() if isinstance(model, StaticModel) else [model.network.network]
        return read_by(next(iter(networks))) == "pictures"

    def _files_of(self, values: list[Any]) -> list[bytes]:
        return [picture_file(value, self._pictures, f"row {row}: the picture") for row, value in enumerate(values)]

    def _rows(self, texts: Sequence[str | bytes], max_new_tokens: int, task: str | None) -> list[dict[str, Any]]:
        if isinstance(self._model, StaticModel):
            return [{"prediction": answer} for answer in self._model.predict(texts, max_new_tokens, task)]
        return [
            {"prediction": answer.prediction, "expert": answer.expert}
            | {f"coefficient.{expert}": value for expert, value in answer.coefficients.items()}
            for answer in self._model.predict(texts, max_new_tokens)
        ]


def _load(place: str, cache: Path, device: str, dtype: str | None) -> DynamicModel | StaticModel:
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
    return StaticModel.load(folder, device, dtype or "float32")


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
    return list(given)


def _texts(given: Any) -> list[str | bytes]:
    """Return the texts of a table with a column `text`, or of a list."""
    texts = _column(given, "text")
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"row {row}: found {text!r}, expected a text")
    return texts
