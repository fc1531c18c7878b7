"""What commands cost before they do anything: none waits for libraries that it does not need."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from sensmerge.pipeline import cli

PROJECT = Path(__file__).resolve().parents[2]
COMMANDS = sorted(get_command(cli.app).commands)
HEAVY = {"torch", "transformers", "numba", "ray", "mlflow", "datasets", "pandas", "scipy", "matplotlib", "peft"}
SECONDS = 2.0
"""Processor time at most: many times the 0.4 that it takes, for machines that are slow or busy."""


def imported(*words: str) -> tuple[set[str], float]:
    """The packages that a command imports, and the seconds of processor time that it takes while it lists them."""
    command, options = ["-m", "pipeline", *words], {"cwd": PROJECT, "env": os.environ | {"PYTHONPATH": ""}}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    told = subprocess.run(
        [sys.executable, "-X", "importtime", *command], capture_output=True, text=True, check=True, **options
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    packages = set(re.findall(r"^import time: .*\| +([a-zA-Z_0-9]+)$", told.stderr, re.MULTILINE))
    assert "typer" in packages
    return packages, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_nothing_heavy(command: str) -> None:
    packages, seconds = imported(*command.split(), "--help")
    assert packages & HEAVY == set()
    assert seconds < SECONDS


def test_the_schema_imports_nothing_heavy() -> None:
    packages, seconds = imported("schema")
    assert packages & HEAVY == set()
    assert seconds < SECONDS
