"""A package of other people, installed into a virtual environment: its method is known to every command."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from sensmerge.pipeline.store.store import Store
from tests.conftest import write_recipe

PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "halves"
version = "1"
[tool.setuptools]
py-modules = ["halves"]
[project.entry-points."sensmerge.methods"]
halves = "halves"
"""
MODULE = '''
from sensmerge.tasks.methods.contract import METHODS, MatrixMethod


@METHODS.register("halves")
class Halves(MatrixMethod):
    """Half the sum of task vectors."""

    times: float = 0.5

    def merge_matrix(self, base, vectors):
        return base + self.times * sum(vector.whole(base) for vector in vectors)
'''


@pytest.mark.ray
def test_the_method_of_an_installed_package(llama_recipe: dict[str, Any], tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "pyproject.toml").write_text(PYPROJECT)
    (package / "halves.py").write_text(MODULE)
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    target = next((environment / "lib").glob("python*")) / "site-packages"
    options = ["--quiet", "--no-deps", "--no-build-isolation", f"--target={target}"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, package], check=True)
    (target / "project.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n{Path(__file__).resolve().parents[2]}\n")
    del llama_recipe["tasks"]
    llama_recipe["merges"] = {"half": {"method": "halves", "times": 0.25}}
    recipe, store = write_recipe(tmp_path, llama_recipe), tmp_path / "store"

    def sensmerge(*words: object) -> str:
        command = [python, "-P", "-m", "sensmerge.pipeline", *map(str, words)]
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "merge" in sensmerge("plan", recipe, "--store", store)
    assert "halves" in json.dumps(json.loads(sensmerge("schema")))
    sensmerge("run", recipe, "--store", store)
    assert [folder.name.rpartition("-")[0] for folder in Store(store).artifacts("merge")] == ["half"]
