"""The package as users have it: installed, and used in a folder that has modules of the same names as its folders."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
REFUSE = 'raise SystemExit("a module that is not ours was imported")\n'


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder to which pip installed the package from a copy of the project; its dependencies are here already."""
    build, target = tmp_path_factory.mktemp("build"), tmp_path_factory.mktemp("installed")
    for name in ("pipeline", "tasks", "sensmerge"):
        shutil.copytree(PROJECT / name, build / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(PROJECT / name, build)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, f"--target={target}", build], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="session")
def user_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a user's own `tasks.py`, `pipeline.py` and `tests/`, which end whoever imports them."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "tests").mkdir()
    for name in ("tasks.py", "pipeline.py", "tests/__init__.py"):
        (folder / name).write_text(REFUSE)
    return folder
