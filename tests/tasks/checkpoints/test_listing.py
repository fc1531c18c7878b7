"""What a recipe may write for a model."""

from pathlib import Path

import pytest

from sensmerge.tasks.checkpoints.listing import HubModel, LocalModel, parse_model_id
from sensmerge.tasks.errors import InputError


def test_model_strings(tmp_path: Path) -> None:
    (tmp_path / "models/base").mkdir(parents=True)
    (tmp_path / "recipes").mkdir()
    assert parse_model_id("../models/base", tmp_path / "recipes") == LocalModel(tmp_path / "models/base")
    assert parse_model_id("hub:org/name", tmp_path) == HubModel("org/name", "main")
    assert parse_model_id("hub: org/name@refs/pr/1", tmp_path) == HubModel("org/name", "refs/pr/1")


def test_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base").mkdir()
    assert parse_model_id("~/base", tmp_path / "elsewhere") == LocalModel(tmp_path / "base")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("org/name", "no such folder .* write hub:org/name"),
        ("org/name@main", "no such folder .* write hub:org/name@main"),
        ("../gone", "no such folder [^;]*$"),
        ("hub:a/b/c", "not the id of a repository"),
        ("hub:../b", "not the id of a repository"),
        ("hub:org/name@../../evil", "cannot be a revision"),
    ],
)
def test_bad_model_strings(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        parse_model_id(text, tmp_path)
