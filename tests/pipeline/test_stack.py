from pathlib import Path

import pytest

from sensmerge.pipeline.stack import keep_stack
from sensmerge.tasks.errors import InputError
from tests.conftest import command_line, write_recipe


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SENSMERGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def error_with(cause: Exception | None) -> InputError:
    try:
        raise InputError("a bucket: cannot be used") from cause
    except InputError as error:
        return error


def test_what_another_program_raised_is_kept(cache: Path) -> None:
    path = keep_stack(error_with(OSError("refused by https://user:secret@host/bucket")))
    assert path is not None
    text = path.read_text()
    assert "OSError: refused by" in text
    assert "InputError: a bucket: cannot be used" in text
    assert "secret" not in text


def test_nobody_else_reads_it_and_no_secret_is_in_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {
        "HF_TOKEN": "hf_abcdef",
        "AWS_SECRET_ACCESS_KEY": "wJalr/XUtn",
        "MLFLOW_TRACKING_PASSWORD": "hf_abcdef-and-more",
        "SHORT_KEY": "abc",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MONKEY", "banana-tree")
    cache.mkdir()
    (cache / "last-error.txt").touch(0o644)
    path = keep_stack(error_with(OSError("asked with wJalr/XUtn, hf_abcdef-and-more, 'hf_abcdef', abc, banana-tree")))
    assert path is not None
    assert path.stat().st_mode & 0o777 == 0o600
    said = "asked with [AWS_SECRET_ACCESS_KEY], [MLFLOW_TRACKING_PASSWORD], '[HF_TOKEN]', abc, banana-tree"
    assert said in path.read_text()


def test_an_error_of_our_own_says_all(cache: Path) -> None:
    assert keep_stack(error_with(None)) is None
    assert not cache.exists()


def test_where_nothing_can_be_written_the_error_is_still_said(cache: Path) -> None:
    cache.write_text("a file")
    assert keep_stack(error_with(OSError())) is None


def test_the_command_line_keeps_it(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(tmp_path, {"base": "hub:a/b"})
    path.write_text("base: [unclosed")
    assert command_line("plan", path) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert "ParserError" in (cache / "last-error.txt").read_text()
