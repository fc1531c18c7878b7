"""The image's steps of installation: those of `make install`, and all that they need is copied before them."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
DOCKERFILE = (PROJECT / "infra" / "Dockerfile").read_text().replace("\\\n", " ")


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, in order."""
    lines = [line for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def allowed(path: str) -> bool:
    """Whether the context of the build has a path."""
    rules = (PROJECT / "infra" / "Dockerfile.dockerignore").read_text().splitlines()
    return any(path == rule.removeprefix("!") for rule in rules if rule.startswith("!"))


def test_make_install_runs_the_steps_of_the_image_in_their_order() -> None:
    makefile = re.findall(r"infra/install\.sh (\w+)", (PROJECT / "Makefile").read_text().partition(".installed:")[2])
    image = [rest.split()[1] for word, rest in instructions() if word == "RUN" and "infra/install.sh" in rest]
    assert makefile == image == ["torch", "project"]


def test_what_the_image_copies_can_be_installed_and_used(tmp_path: Path) -> None:
    build, target = tmp_path / "build", tmp_path / "target"
    build.mkdir()
    for word, rest in instructions():
        if word == "COPY":
            *sources, folder = rest.split()
            for source in sources:
                assert allowed(source), source
                copy = (
                    build / folder / Path(source).name if len(sources) > 1 or folder.endswith("/") else build / folder
                )
                copy.parent.mkdir(exist_ok=True)
                if (PROJECT / source).is_dir():
                    shutil.copytree(PROJECT / source, copy, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy2(PROJECT / source, copy)
        elif word == "RUN" and "install.sh project" in rest:
            # Dependencies are here already, by the same script.
            options = ["--no-deps", f"--target={target}"]
            environment = os.environ | {"PYTHON": sys.executable}
            subprocess.run([*shlex.split(rest), *options], cwd=build, env=environment, check=True)
    environment = os.environ | {"PYTHONPATH": str(target)}
    command = [sys.executable, "-P", "-c", "from sensmerge.pipeline import workflow; print(workflow.__file__)"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == target / "sensmerge" / "pipeline" / "workflow.py"


@pytest.mark.parametrize(("arguments", "said"), [(["torch", "gpu"], "cpu or cuda"), (["all"], "torch or project")])
def test_unknown_steps(arguments: list[str], said: str) -> None:
    command = [PROJECT / "infra" / "install.sh", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stderr
