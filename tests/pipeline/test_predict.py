"""The rows of a file answered by dynamic models of tiny networks, on a real Ray cluster."""

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sensmerge.pipeline import predict
from sensmerge.pipeline.execute.batches import Workers
from sensmerge.pipeline.tracking.registry import ModelRegistry
from sensmerge.tasks.dynamic.model import DynamicModel
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.generation import GREEDY, Decoding
from sensmerge.tasks.serving.static_model import StaticModel
from tests.conftest import command_line, tiny_recipe, write_recipe, write_rows
from tests.here import run_here

FROM_WORKERS = "\x1b[36m("
"""What begins a line that Ray passes on from another test's workers."""

pytestmark = pytest.mark.ray

Row = dict[str, Any]
SE = {"method": "task_arithmetic", "weight": 0.5, "application": {"kind": "se"}}


def dynamic_model(recipe: dict[str, Any], folder: Path) -> Path:
    """Run a recipe with the one variant `se` and return its folder."""
    recipe["merges"] = {"se": SE}
    report = folder / "report.json"
    path = write_recipe(folder, recipe)
    assert run_here(path, "--store", folder / "store", "--report", report) == 0
    return Path(json.loads(report.read_text())["models"]["se"])


@pytest.fixture(scope="module")
def writer(llamas: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dynamic language model of the tiny Llamas math and code."""
    folder = tmp_path_factory.mktemp("writer")
    return dynamic_model(tiny_recipe(llamas, folder), folder)


@pytest.fixture(scope="module")
def classifier(berts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dynamic classifier of the tiny BERTs mood (2 classes) and topic (3 classes)."""
    folder = tmp_path_factory.mktemp("classifier")
    words = {"mood": ("glad", "sad"), "topic": ("sports", "trade", "arts")}
    tasks = {}
    for name, classes in words.items():
        rows: list[dict[str, object]] = [
            {"text": f"{classes[i % len(classes)]} {i}", "label": i % len(classes)} for i in range(12)
        ]
        source = {"path": "json", "data_files": str(write_rows(folder / f"{name}.jsonl", rows))}
        first, last = source | {"split": "train[:6]"}, source | {"split": "train[6:]"}
        tasks[name] = {"kind": "classification", "calibration": first, "evaluation": last}
    experts = {name: {"model": str(berts[name])} for name in words}
    recipe = {"name": "classifier", "base": str(berts["base"]), "experts": experts, "tasks": tasks}
    return dynamic_model(recipe, folder)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Eleven rows, each with its text in `question` and other fields."""
    rows: list[dict[str, object]] = [
        {"id": i, "question": f"{i}+{'1' * i}= ü", "more": {"x": [1.5, None]}} for i in range(11)
    ]
    return write_rows(tmp_path / "rows.jsonl", rows)


@pytest.fixture
def answered(tmp_path: Path, ray_address: str) -> Callable[..., str]:
    """Run `predict` and return what it wrote."""

    def answered(folder: Path, source: Path, *more: object) -> str:
        target = tmp_path / "out.jsonl"
        options = ("--field", "question", "--address", ray_address)
        assert command_line("predict", folder, source, target, *options, *more) == 0
        assert {path.name for path in target.parent.glob("*out*")} == {"out.jsonl"}
        return target.read_text()

    return answered


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], ray_address: str) -> Callable[..., str]:
    """Run a `predict` that must fail as bad input does and leave no file behind; returns the one line it says."""

    def refused(folder: Path, source: Path, *more: object, target: Path = tmp_path / "out.jsonl") -> str:
        before = set(tmp_path.rglob("*"))
        capsys.readouterr()  # what was printed while models were made
        status = command_line("predict", folder, source, target, "--address", ray_address, *more)
        lines = capsys.readouterr().err.splitlines(keepends=True)
        error = "".join(line for line in lines if not line.startswith(FROM_WORKERS))
        assert status == 2, error
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert set(tmp_path.rglob("*")) == before
        return error

    return refused


def rows_of(text: str) -> list[Row]:
    return [json.loads(line) for line in text.splitlines()]


def check_answers(folder: Path, source: Path, rows: list[Row]) -> None:
    """Check that every row of the source has come back in its place, answered as the model itself does."""
    given = rows_of(source.read_text())
    assert [list(row) for row in rows] == [[*row, "prediction", "expert", "coefficients"] for row in given]
    model = DynamicModel.load(folder)
    predictions = model.predict([row["question"] for row in given], None if model.classifies else 5)
    for row, before, expected in zip(rows, given, predictions, strict=True):
        assert row == {**row, **before}
        assert (row["prediction"], row["expert"]) == (expected.prediction, expected.expert)
        assert row["coefficients"] == pytest.approx(expected.coefficients, abs=1e-4)


def test_continuations_are_the_same_from_one_and_two_workers(
    writer: Path, source: Path, tmp_path: Path, answered: Callable[..., str]
) -> None:
    (tmp_path / "out.jsonl").write_text("a file that is replaced\n" * 100)
    five = ("--batch-size", 3, "--max-new-tokens", 5)
    one = answered(writer, source, *five, "--workers", 1)
    check_answers(writer, source, rows_of(one))
    assert answered(writer, source, *five, "--workers", 2) == one


def test_a_static_merge_answers_as_it_does_in_python(
    llamas: dict[str, Path], source: Path, answered: Callable[..., str]
) -> None:
    given = rows_of(source.read_text())
    found = rows_of(answered(llamas["math"], source, "--batch-size", 4, "--max-new-tokens", 5))
    texts = [row["question"] for row in given]
    model = StaticModel.load(llamas["math"])
    expected = [one for start in range(0, len(texts), 4) for one in model.predict(texts[start : start + 4], 5)]
    assert found == [row | {"prediction": one} for row, one in zip(given, expected, strict=True)]


def test_what_a_static_merge_is_not_asked(
    llamas: dict[str, Path], berts: dict[str, Path], source: Path, refused: Callable[..., str]
) -> None:
    said = "--task is math; expected none: a static merge keeps no prompts"
    assert said in refused(llamas["math"], source, "--task", "math")
    assert "max_new_tokens" in refused(berts["mood"], source, "--max-new-tokens", 5)


def test_classes_are_those_of_the_expert_that_answers(
    classifier: Path, source: Path, answered: Callable[..., str]
) -> None:
    rows = rows_of(answered(classifier, source, "--batch-size", 4))
    check_answers(classifier, source, rows)
    classes = {"mood": {"LABEL_0", "LABEL_1"}, "topic": {"LABEL_0", "LABEL_1", "LABEL_2"}}
    assert all(row["prediction"] in classes[row["expert"]] for row in rows)


def test_rows_are_asked_in_the_prompt_of_a_task(
    writer: Path, tmp_path: Path, ray_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"{i}+{i}=" for i in range(5)]
    asked = write_rows(tmp_path / "asked.jsonl", [{"prompt": one} for one in texts])
    own = write_rows(tmp_path / "own.jsonl", [{"prompt": one, "task": "math", "text": "x"} for one in texts])
    plain = write_rows(tmp_path / "plain.jsonl", [{"text": one} for one in texts])
    how = ("--max-new-tokens", 6, "--temperature", 0.8, "--top-p", 0.9, "--seed", 4, "--stop", "e", "--stop", "a")
    found = []
    for source, more, said in ((asked, ("--task", "math"), ""), (own, (), ""), (plain, (), "5 of 5 rows are read as")):
        target = tmp_path / "out.jsonl"
        options = (*more, *how, "--batch-size", 2, "--address", ray_address)
        assert command_line("predict", writer, source, target, *options) == 0
        out = capsys.readouterr().out
        assert ("plain text" in out) == ("to use the prompt format it was trained on" in out) == bool(said)
        assert said in out
        found.append([row["prediction"] for row in rows_of(target.read_text())])
    decoding = Decoding(temperature=0.8, top_p=0.9, seed=4, stop=("e", "a"))
    expected = [one.prediction for one in DynamicModel.load(writer).predict(texts, 6, decoding=decoding)]
    assert found == [expected] * 3


def test_what_cannot_be_asked_is_found_before_ray_is_asked(
    writer: Path, classifier: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"text": "a", "task": "maths"}])
    nobody = ("--address", "127.0.0.1:1")
    assert f"{rows}: line 1: has no field 'text'" in refused(writer, rows, *nobody)
    assert f"tasks.math.prompt names field 'prompt', {rows}: line 2 has" in refused(
        writer, rows, *nobody, "--task", "math"
    )
    assert "line 1: task is 'mat'; expected one of math, code" in refused(writer, rows, *nobody, "--task", "mat")
    assert "--task is math, but its prompt names fields, so leave out --field" in refused(
        writer, rows, *nobody, "--task", "math", "--field", "text"
    )
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": "a"}])
    assert "top_p is 0.5, but temperature is 0" in refused(writer, texts, *nobody, "--top-p", 0.5)
    assert "temperature is 0.5, but the model writes no text; leave it out" in refused(
        classifier, texts, *nobody, "--temperature", 0.5
    )
    assert "max_new_tokens is 3, but the model writes" in refused(classifier, texts, *nobody, "--max-new-tokens", 3)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"", "is not JSON"),
        (b"{'text': 'a'}", "is not JSON"),
        (b'{"text": "a"', "is not JSON"),
        (b'{"text": "a", "x": NaN}', "is not JSON"),
        (b'{"text": "a", "x": 1e999}', "is not JSON"),
        (b'{"text": "\\ud800"}', "is not JSON"),
        (b'{"text": "\xff"}', "is not JSON"),
        (b"[" * 10**6, "is not JSON"),
        (b'["text"]', 'is a list; expected JSON Lines, an object on every line: {"text": "3 + 4 ="}'),
        (b'{"id": 1, "question": "a"}', "has no field 'text' but id, question; name the one to answer with --field"),
        (b"{}", "has no field 'text' but none"),
        (b'{"text": null}', "field 'text' is a NoneType; expected a text"),
        (b'{"text": "a", "prediction": 1}', "has a field 'prediction' already"),
        (b'{"text": "a", "expert": 1}', "has a field 'expert' already"),
        (b'{"text": "a", "coefficients": 1}', "has a field 'coefficients' already"),
    ],
    ids=range(15),
)
def test_bad_row(writer: Path, tmp_path: Path, refused: Callable[..., str], line: bytes, said: str) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    error = refused(writer, source)
    assert f"{source}: line 2: {said}" in error


def test_a_table_is_told_from_json_lines(writer: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    source = tmp_path / "t.csv"
    source.write_text("text,label\na,1\n")
    error = refused(writer, source)
    assert f"{source}: line 1: is not JSON" in error
    assert 'expected JSON Lines, an object on every line: {"text": "3 + 4 ="}' in error


def test_rows_are_checked_before_ray_is_asked(writer: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}, {"question": "a"}])
    assert f"{source}: line 2: has no field" in refused(writer, source, "--address", "127.0.0.1:1")


def test_text_that_the_model_does_not_take_is_named_by_its_line(
    writer: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    rows: list[dict[str, object]] = [{"text": "a"} for _ in range(5)]
    source = write_rows(tmp_path / "rows.jsonl", [*rows, {"text": "x" * 124}, *rows])
    error = refused(writer, source, "--batch-size", 2, "--max-new-tokens", 5)
    assert f"{source}: line 6 has 124 tokens; the model takes 1 to 123" in error


def test_text_without_a_token_is_named_by_its_line(classifier: Path) -> None:
    answer = predict._load(classifier, "cpu", predict.Settings(None, None, 2, None, GREEDY, Workers(1, 0)))
    with pytest.raises(InputError, match=r"^f\.jsonl: line 8 has 0 tokens; the model takes 1 to 128"):
        answer([predict.AskedRow(f"f.jsonl: line {line}", {}, text) for line, text in ((7, "a"), (8, ""))])


def test_input_without_rows_and_without_a_file(writer: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    empty = write_rows(tmp_path / "empty.jsonl", [])
    assert f"{empty}: has no rows" in refused(writer, empty)
    assert "none.jsonl: no such file" in refused(writer, tmp_path / "none.jsonl")


def test_models_that_are_no_folder(source: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert f"{tmp_path / 'none'}: no such folder; give the folder of a variant, as `run` printed it" in refused(
        tmp_path / "none", source
    )
    assert "rows.jsonl: is a file; give the folder of a variant" in refused(source, source)
    assert "models:/name/3: is a version in MLflow, and predict takes folders" in refused(
        Path("models:/name/3"), source
    )


def test_output_that_cannot_be_made(writer: Path, source: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    before = source.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(source)
    assert "does not exist; make it first" in refused(writer, source, target=tmp_path / "none" / "out.jsonl")
    assert "is a folder; name a file in it" in refused(writer, source, target=tmp_path)
    for same in (source, tmp_path / "link.jsonl"):
        assert "is the input; write to another file" in refused(writer, source, target=same)
    assert source.read_bytes() == before
    name = "x" * 250  # beside it, the partial file's name is longer than file systems allow
    assert "cannot be written" in refused(writer, source, "--field", "question", target=tmp_path / name)


def no_manifest(folder: Path) -> str:
    (folder / "dynamic.json").unlink()
    return "model: has neither dynamic.json (a dynamic model) nor config.json (a static merge); give the folder of a "


def missing_file(folder: Path) -> str:
    (folder / "statistics.safetensors").unlink()
    return "statistics.safetensors: is missing"


def altered_file(folder: Path) -> str:
    path = next(folder.glob("*/*.safetensors"))
    content = path.read_bytes()
    path.unlink()  # the copy may be a link
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    return f"{path.name}: was altered"


@pytest.mark.parametrize("damage", [no_manifest, missing_file, altered_file])
def test_damaged_folder_is_found_before_ray_is_asked(
    writer: Path, source: Path, tmp_path: Path, refused: Callable[..., str], damage: Callable[[Path], str]
) -> None:
    shutil.copytree(writer, tmp_path / "model")
    said = damage(tmp_path / "model")
    assert said in refused(tmp_path / "model", source, "--field", "question", "--address", "127.0.0.1:1")


def test_more_workers_than_the_cluster_has_room_for(writer: Path, source: Path, refused: Callable[..., str]) -> None:
    question = ("--field", "question")
    assert "room for 2 workers with 1 CPU and 0 GPUs each, 3 wanted" in refused(
        writer, source, *question, "--workers", 3
    )
    assert "--num-gpus: is 1.5" in refused(writer, source, *question, "--num-gpus", 1.5)
    assert "with 1 CPU and 9999 GPUs each" in refused(writer, source, *question, "--num-gpus", 9999)


def test_input_that_loses_rows_while_it_is_read(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"text": str(i)} for i in range(5)])
    settings = predict.Settings(None, None, 2, None, GREEDY, Workers(1, 0))
    asked = predict._Texts(source, settings, {})
    whole = [one.content for batch in predict._batches(asked, 2, 4) for one in batch]
    assert whole == ["0", "1", "2", "3"]
    with pytest.raises(InputError, match="lost rows while it was read"):
        list(predict._batches(asked, 2, 6))


def overfill(target: Path) -> None:
    """Write more than the system lets a file hold, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with predict._written_whole(target) as file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            file.write("x" * 10**6)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_file_that_cannot_be_finished_is_not_left_behind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"out\.jsonl: cannot be written .*too large"):
        overfill(tmp_path / "out.jsonl")
    assert not list(tmp_path.iterdir())


def test_a_dynamic_model_becomes_champion_only_where_the_recipe_names_it(
    writer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = writer.parents[1]
    registry = ModelRegistry(f"sqlite:///{store}/mlflow.db", "tiny")
    refresh = ("refresh", store.parent / "recipe.yaml", "--store", store, "--address", "no such cluster")
    for _ in range(2):
        assert command_line(*refresh) == 0
    assert "there is no static variant; name se in gate.variants to get a new champion" in capsys.readouterr().out
    assert registry.champion() is None
    assert command_line(*refresh, "--set", "gate.variants=[se]") == 0
    assert "tiny/1 (se, dynamic) is the first champion" in capsys.readouterr().out
    champion = registry.champion()
    assert champion is not None
    assert champion.kind == "dynamic"
