"""Compiled loops are kept on disk, where no process takes one for another."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sensmerge.tasks.methods.contract import TaskVector, method_of
from sensmerge.tasks.methods.kernels import loops
from sensmerge.tasks.methods.kernels.delta import Difference
from sensmerge.tasks.methods.kernels.stored import rounded

CALL = """
import numpy as np
from sensmerge.tasks.methods.kernels import masks
piece = np.array([0.5, -2.0, 0.25, -0.75], np.float32)
masks.trim(piece, int(np.float32(0.6).view(np.int32)))
assert piece.tolist() == [0.0, -2.0, 0.0, -0.75]
stats = masks.trim.stats
print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()), stats.cache_path)
"""


def start(**environment: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("HOME", "NUMBA_CACHE_DIR", "TMPDIR")}
    return subprocess.Popen([sys.executable, "-c", CALL], env=kept | environment, stdout=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, int, str]:
    said, _ = process.communicate()
    assert process.returncode == 0
    hits, misses, path = said.split(maxsplit=2)
    return int(hits), int(misses), path.strip()


def test_processes_that_start_at_once_and_one_after_them(tmp_path: Path) -> None:
    for process in [start(HOME=str(tmp_path)) for _ in range(3)]:
        hits, misses, path = ended(process)
        assert hits + misses == 1
        assert path.startswith(str(tmp_path / ".cache" / "sensmerge" / "kernels"))
    assert ended(start(HOME=str(tmp_path)))[:2] == (1, 0)


@pytest.mark.parametrize("home", ["/dev/null", None])
def test_where_no_home_can_be_written(home: str | None, tmp_path: Path) -> None:
    where = {"TMPDIR": str(tmp_path)} | ({"HOME": home} if home else {})
    hits, misses, path = ended(start(**where))
    assert (hits, misses) == (0, 1)
    assert path.startswith(str(tmp_path / f"sensmerge-{os.getuid()}-"))
    assert ended(start(**where))[:2] == (1, 0)


def test_a_folder_that_others_write_to_is_not_read(tmp_path: Path) -> None:
    where = {"NUMBA_CACHE_DIR": str(tmp_path / "chosen"), "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path)}
    for folder in ("chosen", "home/.cache/sensmerge/kernels", "sensmerge-"):
        hits, misses, path = ended(start(**where))
        assert (hits, misses) == (0, 1)
        assert path.startswith(str(tmp_path / folder))
        Path(path).parent.chmod(0o777)
    assert ended(start(**where)) == (0, 1, "None")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("method", ["task_arithmetic", "linear", "ties", "dare_ties", "dare_linear"])
def test_every_loop_has_arguments_of_one_type(method: str, dtype: torch.dtype) -> None:
    """So processes that start at once write the same."""
    settings = {"method": method} | ({} if method in ("task_arithmetic", "linear") else {"density": 0.5})
    base, *experts = torch.randn(4, 70_001, generator=torch.Generator().manual_seed(0)).to(dtype)
    vectors = [TaskVector(str(number), "a", Difference(one), 0.5) for number, one in enumerate(experts)]
    for _, piece in method_of(settings).merged_pieces(base, vectors):
        assert rounded(piece, dtype)[1]
    signatures = {name: one.signatures for name, one in vars(loops).items() if hasattr(one, "signatures")}
    assert any(signatures.values())
    assert all(len(one) <= 1 for one in signatures.values()), signatures
