"""Installed beside a user's own `tasks.py`, `pipeline.py` and `tests/`, which nobody imports (see also test_job.py)."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
QUICKSTART = PROJECT / "configs" / "quickstart"
LOAD = """
import sys
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
(version,) = mlflow.MlflowClient().search_model_versions("tags.variant = 'ta-se'")
model = mlflow.pyfunc.load_model(f"models:/{version.name}/{version.version}")
print(sys.modules["sensmerge"].__file__)
print(*model.predict(["math: 4123+1111 = "], params={"max_new_tokens": 2}).columns[:2])
"""


@pytest.fixture(scope="module")
def python(installed: Path, user_folder: Path) -> Callable[..., str]:
    """Run Python in the user's folder; return what it prints."""
    # As for a package in a virtual environment: the user's folder comes first, the package after it.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    environment |= {"PYTHONPATH": f"{user_folder}{os.pathsep}{installed}"}

    def python(*words: object) -> str:
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, cwd=user_folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return python


def test_every_module_is_installed_and_no_test(installed: Path) -> None:
    modules = (path for floor in ("pipeline", "tasks") for path in (PROJECT / floor).rglob("*.py"))
    ours = {str(path.relative_to(PROJECT)) for path in modules}
    package = installed / "sensmerge"
    assert {str(path.relative_to(package)) for path in package.rglob("*.py")} == {"__init__.py", *ours}
    assert {path.name for path in installed.iterdir()} == {"bin", "sensmerge", "sensmerge-0.1.0.dist-info"}


@pytest.mark.ray
def test_the_quickstart_runs_and_its_dynamic_model_loads(
    python: Callable[..., str], installed: Path, tmp_path: Path
) -> None:
    subprocess.run([sys.executable, QUICKSTART / "make_models.py"], check=True)
    store, program = tmp_path / "store", installed / "bin" / "sensmerge"
    # The dynamic variant alone: a run with Ray, and a model that a pyfunc serves.
    few = [
        f"--set=tasks.{task}.{rows}.samples=4"
        for task in ("math", "words", "cipher")
        for rows in ("evaluation", "calibration")
    ]
    only = "--set=merges={ta-se: {method: task_arithmetic, weight: 0.5, application: {kind: se}}}"
    python(program, "run", QUICKSTART / "recipe.yaml", "--store", store, *few, only)
    place, columns = python("-c", LOAD, f"sqlite:///{store}/mlflow.db").splitlines()[-2:]
    assert Path(place).is_relative_to(store)  # a model brings the code that serves it
    assert columns == "prediction expert"
