"""Pictures answered from a folder and from rows, by a dynamic model and by versions that MLflow has registered."""

import json
from pathlib import Path
from typing import Any

import mlflow
import pytest

from tests.conftest import command_line, write_recipe, write_rows
from tests.here import run_here
from tests.pictures import in_base64, picture
from tests.pipeline.test_picture_rows import COLOURS, LABELS, make_recipe

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dynamic model of tiny classifiers of reds and blues; its store's folder has MLflow's database beside it."""
    folder = tmp_path_factory.mktemp("model")
    recipe = make_recipe("vit", folder)
    recipe["merges"] = {name: recipe["merges"][name] for name in ("ta", "se")}
    path, report = write_recipe(folder, recipe), folder / "report.json"
    options = ("--store", folder / "store", "--report", report, "--tracking-uri", f"sqlite:///{folder}/mlflow.db")
    assert run_here(path, *options) == 0
    return Path(json.loads(report.read_text())["models"]["se"])


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_folder_and_rows_of_pictures(model: Path, tmp_path: Path, ray_address: str) -> None:
    rows: list[dict[str, object]] = []
    for name in LABELS:
        (tmp_path / "in" / name).mkdir(parents=True)
        for number in range(3):
            file = picture(40 + number, COLOURS[name])
            (tmp_path / "in" / name / f"{number}.png").write_bytes(file)
            rows.append({"id": number, "image": in_base64(file) if number else f"in/{name}/0.png"})
    (tmp_path / "in" / ".hidden").touch()
    options = ("--address", ray_address, "--batch-size", 2)
    assert command_line("predict", model, tmp_path / "in", tmp_path / "folder.jsonl", *options) == 0
    found = read(tmp_path / "folder.jsonl")
    assert [one["file"] for one in found] == [f"{name}/{i}.png" for name in sorted(LABELS) for i in range(3)]
    assert [one["expert"] for one in found] == [name for name in sorted(LABELS) for _ in range(3)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    assert command_line("predict", model, source, tmp_path / "rows-out.jsonl", *options) == 0
    by_file = {one["file"]: one for one in found}
    for row, name in zip(read(tmp_path / "rows-out.jsonl"), [name for name in LABELS for _ in range(3)], strict=True):
        expected = by_file[f"{name}/{row['id']}.png"]
        assert {key: row[key] for key in ("prediction", "expert")} == {k: expected[k] for k in ("prediction", "expert")}


@pytest.mark.parametrize(
    ("name", "said"),
    [("notes.txt", "notes.txt: is no picture, by its name"), ("a.png", "a.png is 4 bytes that begin with b'none'")],
)
def test_a_folder_with_something_else(
    name: str, said: str, model: Path, tmp_path: Path, ray_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(b"none")
    target = tmp_path / "out.jsonl"
    assert command_line("predict", model, tmp_path / "in", target, "--address", ray_address) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not target.exists()


def test_registered_versions_answer_pictures(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{model.parents[2]}/mlflow.db")
    versions = mlflow.MlflowClient().search_model_versions("name = 'pictures'")
    assert {one.tags["variant"] for one in versions} == {"ta", "se"}
    given = [in_base64(picture(50, COLOURS[name])) for name in LABELS]
    for one in versions:
        loaded = mlflow.pyfunc.load_model(f"models:/pictures/{one.version}")
        is_dynamic = one.tags["variant"] == "se"
        table = loaded.predict(given, params=None if is_dynamic else {"task": "reds"})
        assert len(table) == 2
        if is_dynamic:
            assert table["expert"].tolist() == list(LABELS)
        assert any(
            line.startswith("pillow==")
            for line in Path(mlflow.pyfunc.get_model_dependencies(f"models:/pictures/{one.version}"))
            .read_text()
            .splitlines()
        )
        assert "a picture in base64" in one.description
