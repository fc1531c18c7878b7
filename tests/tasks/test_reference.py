"""Sens-Merging on a real base and three real LoRA experts, against an independent program's numbers."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sensmerge.tasks.artifacts import read_json
from sensmerge.tasks.coefficients import alpha, sigma, tau
from sensmerge.tasks.kinds.completion import CompletionTask
from sensmerge.tasks.networks.placement import Placement
from sensmerge.tasks.rows.source import DataSource
from sensmerge.tasks.rows.tables import load_rows
from tests.conftest import SHARED, TaskRows, cross_task_job, do_job, measure_sensitivity

pytestmark = [pytest.mark.shared, pytest.mark.timeout(1800)]
EXPERTS = ("gsm8k", "mbpp", "dolly")


@pytest.fixture(scope="module")
def base() -> Path:
    """The base that `models/build.py base-lm` makes; SENSMERGE_MODELS names its build folder where it is elsewhere."""
    folder = Path(os.environ.get("SENSMERGE_MODELS", SHARED / "models" / "build")) / "base-lm"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"needs {folder}")
    return folder


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((SHARED / "reference" / "sens_smollm2.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def calibration() -> dict[str, TaskRows]:
    """As the reference says: the first 8 rows, no end token, all tokens in the loss."""
    task = CompletionTask(
        kind="completion",
        prompt="Question: {prompt}\nAnswer:",
        completion=" {completion}",
        end_token=False,
        loss_on="all",
        max_length=512,
    )
    sets = {}
    for name in EXPERTS:
        source = DataSource(path="json", data_files=f"data/{name}/train.jsonl.gz", samples=8, seed=None)
        sets[name] = TaskRows(task, load_rows(source, f"tasks.{name}.calibration", SHARED).rows)
    return sets


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def expert(name: str) -> Path:
    return SHARED / "models" / "experts" / f"lora-{name}"


@pytest.mark.parametrize(("name", "placement"), [*((name, "whole") for name in EXPERTS), ("gsm8k", "streamed")])
def test_alpha(
    name: str,
    placement: Placement,
    base: Path,
    calibration: dict[str, TaskRows],
    reference: dict[str, Any],
    tmp_path: Path,
) -> None:
    one = calibration[name]
    (tmp_path / "out").mkdir()
    found = alpha(measure_sensitivity(base, expert(name), one.task, one.rows, tmp_path / "out", placement=placement))
    assert found == pytest.approx(reference["alpha"][name], rel=1e-3)


def test_tau_and_sigma(base: Path, calibration: dict[str, TaskRows], reference: dict[str, Any], tmp_path: Path) -> None:
    experts = {name: expert(name) for name in EXPERTS}
    do_job(cross_task_job(base, experts, calibration), tmp_path)
    taus = tau(read_json(tmp_path / "distances.json"), reference["direction"])
    assert taus == pytest.approx(reference["tau"], rel=1e-3)
    sigmas = sigma(reference["alpha"], taus, reference["temperature"], reference["sigma"])
    for layer, row in reference["sigma"].items():
        assert sigmas[layer] == pytest.approx(row, rel=1e-3)
