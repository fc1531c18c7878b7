"""Installed beside a user's own `tasks.py`, `pipeline.py` and `tests/`, which nobody imports."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
QUICKSTART = PROJECT / "configs" / "quickstart"
BOOM = 'raise SystemExit("a module of the user was imported")\n'

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as pip installs it from a copy of the project; its dependencies are here already."""
    build, target = tmp_path_factory.mktemp("build"), tmp_path_factory.mktemp("installed")
    for name in ("pipeline", "tasks", "sensmerge"):
        shutil.copytree(PROJECT / name, build / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(PROJECT / name, build)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, f"--target={target}", str(build)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def python(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Run Python in the user's folder; return what it prints."""
    folder = tmp_path_factory.mktemp("user")
    for name in ("tasks.py", "pipeline.py"):
        (folder / name).write_text(BOOM)
    (folder / "tests").mkdir()
    (folder / "tests" / "__init__.py").write_text(BOOM)
    # As for a package in a virtual environment: the user's folder comes first, the package after it.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    environment |= {"PYTHONPATH": f"{folder}{os.pathsep}{installed}"}

    def python(*words: object) -> str:
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return python


def test_the_package_is_the_installed_one(python: Callable[..., str], installed: Path) -> None:
    found = python("-c", "import sensmerge.pipeline.cli, sensmerge.tasks.stages as s; print(s.__file__)")
    assert Path(found.strip()).is_relative_to(installed)
    for room in (
        path.relative_to(PROJECT) for floor in ("pipeline", "tasks") for path in (PROJECT / floor).rglob("*.py")
    ):
        assert (installed / "sensmerge" / room).is_file()


def test_the_quickstart_runs(python: Callable[..., str], installed: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, QUICKSTART / "make_models.py"], check=True)
    store, program = tmp_path / "store", installed / "bin" / "sensmerge"
    # The dynamic variant alone, by Ray's workers.
    only = ["--set", "merges={ta-se: {method: task_arithmetic, weight: 0.5, application: {kind: se}}}"]
    assert "mlflow ui" in python(program, "run", QUICKSTART / "recipe.yaml", "--store", store, *only)
