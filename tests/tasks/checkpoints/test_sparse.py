"""Files of weights that are here in part."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sensmerge.tasks.checkpoints import sparse
from sensmerge.tasks.checkpoints.checkpoint import FilesNeeded, open_checkpoint
from sensmerge.tasks.errors import InputError

WEIGHTS = "model.safetensors"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with two tensors of which one is said to be here."""
    save_file({"a": torch.ones(3), "b": torch.zeros(2)}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    sparse.say(tmp_path / WEIGHTS, ["a"])
    return tmp_path / WEIGHTS


def test_a_hole_is_refused_by_name(path: Path) -> None:
    checkpoint = open_checkpoint(path.parent)
    assert checkpoint.read("a").tolist() == [1, 1, 1]
    with pytest.raises(InputError, match=f"{path}: tensor b is not on this machine, only 1 others"):
        checkpoint.read("b")
    with pytest.raises(FilesNeeded, match=WEIGHTS):
        checkpoint.require("a", "b")
    sparse.say(path, ["a", "b"])  # by another process meanwhile
    assert checkpoint.read("b").tolist() == [0, 0]
    checkpoint.require("a", "b")


def test_a_file_that_is_put_in_anothers_place(path: Path) -> None:
    checkpoint = open_checkpoint(path.parent)
    assert checkpoint.read("a").tolist() == [1, 1, 1]
    save_file({"a": torch.ones(3), "b": torch.ones(2)}, path.with_name("other"), metadata={"format": "pt"})
    path.with_name("other").replace(path)
    sparse.say(path, ["b"])
    assert checkpoint.read("b").tolist() == [1, 1]


def test_a_link_to_a_file_with_holes(path: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / WEIGHTS).symlink_to(path)
    with pytest.raises(InputError, match="tensor b is not on this machine"):
        open_checkpoint(tmp_path / "linked").read("b")


def test_whether_somebody_wrote_to_a_file(path: Path) -> None:
    found = sparse.present(path)
    assert found is not None
    assert found.holds_of(path)
    path.write_bytes(path.read_bytes())
    assert not found.holds_of(path)
    sparse.say(path, ["a"], coming=["b"])
    again = sparse.present(path)
    assert again is not None
    path.write_bytes(path.read_bytes())
    assert again.holds_of(path)  # who fetches b writes to it
    sparse.remove(path)
    assert sparse.present(path) is None
    assert not sparse.is_here(path, "a")


def test_where_tensors_lie(path: Path) -> None:
    content, places = path.read_bytes(), sparse.places(path)
    assert content[slice(*places["a"])] == torch.ones(3).numpy().tobytes()
    assert places["b"][1] - places["b"][0] == 8


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([], []),
        ([(8, 8)], []),
        ([(5, 9), (0, 3), (3, 5)], [(0, 4), (4, 8), (8, 9)]),
        ([(0, 3), (4, 6)], [(0, 3), (4, 6)]),
    ],
)
def test_neighbours_are_asked_for_together(parts: list[tuple[int, int]], expected: list[tuple[int, int]]) -> None:
    assert sparse.ranges(parts, 4) == expected
