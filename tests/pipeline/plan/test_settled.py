"""Folders named by their content, below the cache."""

import os
import time
from pathlib import Path

import pytest

from sensmerge.pipeline.plan.vocabulary import LEFT_BEHIND, settled


def write(text: str, folder: Path) -> None:
    (folder / "file").write_text(text)


def test_one_content_has_one_folder(tmp_path: Path) -> None:
    parent = tmp_path / "cache"
    first, again, other = (settled(parent, lambda folder, text=text: write(text, folder)) for text in ("a", "a", "b"))
    assert first == again != other
    assert (first / "file").read_text() == "a"
    assert set(parent.iterdir()) == {first, other}


def test_two_plans_settle_the_same_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one's folder is there just before that of this one is renamed."""
    rename, done = Path.rename, []

    def late(path: Path, target: Path) -> Path:
        if not done:
            done.append(target)
            settled(tmp_path, lambda folder: write("a", folder))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", late)
    assert settled(tmp_path, lambda folder: write("a", folder)) == done[0]
    assert list(tmp_path.iterdir()) == done


@pytest.mark.parametrize("ago", [0, 2 * LEFT_BEHIND])
def test_what_somebody_left_who_was_killed_goes_after_an_hour(ago: float, tmp_path: Path) -> None:
    left = tmp_path / ".half"
    left.mkdir()
    write("a", left)
    os.utime(left, (time.time() - ago,) * 2)
    settled(tmp_path, lambda folder: write("b", folder))
    assert left.exists() == (ago == 0)
