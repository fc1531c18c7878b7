import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.rows.source import DataSource
from sensmerge.tasks.rows.tables import draw_order, load_rows

SHARED = Path(__file__).parents[4] / "shared"
KEY = "tasks.math.calibration"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def source(**settings: Any) -> DataSource:
    return DataSource(**{"path": "json", "data_files": "rows.jsonl"} | settings)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "rows.jsonl", [{"prompt": f"p{i}", "n": i} for i in range(50)])
    return tmp_path


def test_rows_are_those_of_the_file_relative_to_the_recipe(folder: Path) -> None:
    assert load_rows(source(), KEY, folder).rows == [{"prompt": f"p{i}", "n": i} for i in range(50)]
    assert load_rows(source(seed=None, samples=3), KEY, folder).rows == [{"prompt": f"p{i}", "n": i} for i in range(3)]
    assert len(load_rows(source(split="train[:10]"), KEY, folder).rows) == 10
    assert len(load_rows(source(data_files=["rows.jsonl", "row*.jsonl"]), KEY, folder).rows) in (50, 100)


def test_compressed_csv_and_local_folder(folder: Path) -> None:
    with gzip.open(folder / "zipped.jsonl.gz", "wt") as file:
        file.write('{"text": "a"}\n')
    assert load_rows(source(data_files="zipped.jsonl.gz"), KEY, folder).rows == [{"text": "a"}]
    (folder / "rows.csv").write_text("text,label\nfine,1\n")
    assert load_rows(source(path="csv", data_files="rows.csv"), KEY, folder).rows == [{"text": "fine", "label": "1"}]
    (folder / "set").mkdir()
    write(folder / "set" / "train.jsonl", [{"text": "b"}])
    assert load_rows(DataSource(path="set"), KEY, folder).rows == [{"text": "b"}]
    assert load_rows(DataSource(path="./set"), KEY, folder).rows == [{"text": "b"}]


def test_a_folder_of_files_keeps_its_text_and_its_splits(folder: Path) -> None:
    (folder / "set").mkdir()
    (folder / "set" / "train.csv").write_text("text,label\n0012,NA\n2024-01-15,1\n")
    (folder / "set" / "test.csv").write_text("text,label\ntrue,\n")
    found = load_rows(DataSource(path="set", split="test+train[1:]"), KEY, folder)
    assert found.rows == [{"text": "true", "label": ""}, {"text": "2024-01-15", "label": "1"}]
    assert found.places == [f"line 2 of {folder}/set/test.csv", f"line 3 of {folder}/set/train.csv"]
    assert len(load_rows(DataSource(path="set", split="all"), KEY, folder).rows) == 3


def test_rows_are_taken_in_the_order_of_the_files_as_datasets_takes_them(folder: Path) -> None:
    for name in "bca":
        write(folder / f"{name}.jsonl", [{"file": name}] * 2)
    files = [str(folder / "c.jsonl"), str(folder / "[abc].jsonl")]
    for split in ("train", "train[1:40%]", "train[-2:]+train[:1]", "all"):
        theirs = datasets.load_dataset("json", data_files=files, split=split).to_list()
        assert load_rows(source(data_files=["c.jsonl", "[abc].jsonl"], split=split), KEY, folder).rows == theirs


def test_other_formats_are_read_by_datasets(folder: Path) -> None:
    datasets.Dataset.from_dict({"prompt": list("abc"), "n": [1, 2, 3]}).to_parquet(folder / "rows.parquet")
    found = load_rows(source(path="parquet", data_files="rows.parquet", split="train[1:]"), KEY, folder)
    assert found.rows == [{"prompt": "b", "n": 2}, {"prompt": "c", "n": 3}]
    assert found.places[0] == f"row 0 of {folder}/rows.parquet, split train[1:]"


def test_files_at_a_url(folder: Path) -> None:
    (folder / "0.jsonl").write_text('{"text": 1.50}\n')
    assert load_rows(source(data_files=f"file://{folder}/0.jsonl"), KEY, folder).rows == [{"text": "1.50"}]
    with pytest.raises(InputError, match=r"data_files: zip://a\.csv::b\.zip points into an archive; unpack it"):
        load_rows(source(data_files="zip://a.csv::b.zip"), KEY, folder)


def test_an_edited_file_is_read_again(folder: Path) -> None:
    write(folder / "edited.jsonl", [{"a": 1}])
    before = load_rows(source(data_files="edited.jsonl"), KEY, folder).rows
    write(folder / "edited.jsonl", [{"a": 2}])
    assert load_rows(source(data_files="edited.jsonl"), KEY, folder).rows == [{"a": 2}] != before


@given(total=st.integers(1, 300), seed=st.integers(-5, 2**40))
def test_the_order_has_every_row_once_and_nothing_but_the_seed_decides_it(total: int, seed: int) -> None:
    order = draw_order(total, seed)
    assert sorted(order) == list(range(total))
    assert order == draw_order(total, seed)
    assert list(draw_order(total, None)) == list(range(total))


def test_choice_depends_on_the_seed_and_not_on_the_process(folder: Path) -> None:
    rows = load_rows(source(samples=10, seed=3), KEY, folder).rows
    assert rows != load_rows(source(samples=10, seed=4), KEY, folder).rows
    code = "from sensmerge.tasks.rows.tables import draw_order; print(sorted(draw_order(50, 3)[:10]))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(other.stdout) == [row["n"] for row in rows]


def test_choice_is_uniform() -> None:
    counts = torch.zeros(20)
    for seed in range(2000):
        counts[list(draw_order(20, seed)[:5])] += 1
    # Each count is binomial(2000, 1/4): standard deviation 19.4.
    assert (counts - 500).abs().max() < 5 * 19.4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data_files": "none.jsonl"}, "tasks.math.calibration.data_files: no such file: .*none.jsonl"),
        ({"data_files": "none*.jsonl"}, "tasks.math.calibration.data_files: no such file: .*none"),
        ({"data_files": None}, "'json' is a file format; name the files"),
        ({"data_files": "empty.jsonl"}, "empty.jsonl has no rows"),
        ({"data_files": "broken.jsonl"}, "tasks.math.calibration: .*broken.jsonl, line 2: not JSON: Expecting"),
        ({"data_files": "."}, "tasks.math.calibration.data_files: .* is a folder; name the files in it"),
        ({"split": "dev"}, "cannot read .*rows.jsonl: Unknown split"),
        ({"samples": 51}, "tasks.math.calibration.samples is 51, but .*rows.jsonl has 50 rows"),
        ({"path": "./none", "data_files": None}, "tasks.math.calibration.path: no such folder: .*none"),
    ],
)
def test_bad_sources(folder: Path, settings: dict[str, Any], message: str) -> None:
    (folder / "empty.jsonl").touch()
    (folder / "broken.jsonl").write_text('{"a": 1\nfoo')
    with pytest.raises(InputError, match=message) as caught:
        load_rows(source(**settings), KEY, folder)
    assert "\n" not in str(caught.value)


CARD = "---\ndataset_info:\n  features:\n  - name: prompt\n    dtype: string\n---\n"
"""A README that declares the one field of a folder's rows."""


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.jsonl", b"null\nnull\n", "a.jsonl, line 1: expected an object"),
        ("a.json", b"[null, null]", "a.json, line 1: expected an object"),
        ("a.jsonl", b'{"prompt": "a"}\nnull\n', "a.jsonl, line 2: expected an object"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}\n', "a.jsonl, line 2: not UTF-8"),
        ("a.csv", b"prompt\na\n\xff\n", "a.csv, line 3: not UTF-8"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": [1]}\n', "line 1 of .*a.jsonl: prompt is 'a', but '\"a\"' with"),
    ],
)
def test_rows_with_declared_features(folder: Path, file: str, content: bytes, message: str) -> None:
    """Which `datasets` reads, and would end the process, or change texts, of some."""
    (folder / "set").mkdir()
    (folder / "set" / "README.md").write_text(CARD)
    (folder / "set" / file).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_rows(DataSource(path="set"), KEY, folder)
    (folder / "set" / file).write_bytes(b'{"prompt": "a"}\n' if "json" in file else b"prompt\na\n")
    assert load_rows(DataSource(path="set"), KEY, folder).rows == [{"prompt": "a"}]


def test_a_bad_row_of_a_table_is_named(folder: Path) -> None:
    texts, ends = b"abc\xffde", [0, 1, 2, 3, 4, 5, 6]
    places = b"".join(one.to_bytes(4, "little") for one in ends)
    array = pa.StringArray.from_buffers(6, pa.py_buffer(places), pa.py_buffer(texts))
    pq.write_table(pa.table({"prompt": array}), folder / "rows.parquet")
    with pytest.raises(InputError, match=r"row 3 of .*rows\.parquet, split train cannot be read: 'utf-8' codec"):
        load_rows(source(path="parquet", data_files="rows.parquet"), KEY, folder)


def test_a_cache_that_cannot_be_written(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "file" / "cache"))
    datasets.Dataset.from_dict({"prompt": ["a"]}).to_parquet(folder / "rows.parquet")
    with pytest.raises(
        InputError, match=r"rows\.parquet: .* the cache of data sets: set HF_DATASETS_CACHE to a folder"
    ):
        load_rows(source(path="parquet", data_files="rows.parquet"), KEY, folder)


@pytest.mark.parametrize(
    ("form", "message"),
    [("hdf5", "is read with the package h5py, which"), ("webdataset", "truncated header"), ("arrow", "too small")],
)
def test_builders_that_lack_a_package_or_get_another_file(folder: Path, form: str, message: str) -> None:
    (folder / "rows.x").write_text("hello\n")
    with pytest.raises(InputError, match=message):
        load_rows(source(path=form, data_files="rows.x"), KEY, folder)


@pytest.mark.parametrize("text", ["---\nconfigs: [1, 2\n---", "---\nconfigs: 5\n---"])
def test_a_readme_that_is_damaged(folder: Path, text: str) -> None:
    (folder / "set").mkdir()
    write(folder / "set" / "a.jsonl", [{"prompt": "a"}])
    (folder / "set" / "README.md").write_text(text)
    with pytest.raises(InputError, match=f"^{KEY}: cannot read set: "):
        load_rows(DataSource(path="set"), KEY, folder)


def test_reading_files_asks_no_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def no_network(*arguments: Any, **_: Any) -> Any:
        asked.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr("socket.getaddrinfo", no_network)
    (folder / "own.jsonl").write_text('{"a": 1}\n')
    assert load_rows(DataSource(path="json", data_files="own.jsonl"), "key", folder).rows == [{"a": 1}]
    assert not asked


def test_unreachable_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"tasks\.math\.calibration: Couldn't reach 'somebody/rows'"):
        load_rows(DataSource(path="somebody/rows"), KEY, folder)


def test_reading_rows_prints_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_rows(source(), KEY, folder)
    (folder / "broken.jsonl").write_text('{"a": 1\nfoo')
    with pytest.raises(InputError):
        load_rows(source(data_files="broken.jsonl"), KEY, folder)
    assert capfd.readouterr() == ("", "")


@pytest.mark.shared
@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize(("name", "rows"), [("gsm8k", 800), ("sst2", 800), ("arc_easy", 800)])
def test_real_rows(name: str, rows: int) -> None:
    shared = source(data_files=f"{name}/test.jsonl.gz")
    assert len(load_rows(shared, KEY, SHARED / "data").rows) == rows
