"""Our methods against what `record_fusion_bench.py` recorded of FusionBench 0.2.33."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sensmerge.tasks.methods.contract import TaskVector, method_of
from sensmerge.tasks.methods.kernels.delta import Whole
from tests.tasks.methods.pieces import whole_tensor
from tests.tasks.methods.totals import write_totals

RECORDED = load_file(Path(__file__).with_name("fusion_bench.safetensors"))
EXPERTS = 3
NAMES = ["wide.weight", "tall.weight", "wide.bias", "conv.weight"]
FLOOR = 1e-3
"""FusionBench's is absolute, ours a share of the mean."""


def of_expert(key: str, k: int) -> dict[str, torch.Tensor]:
    return {name: RECORDED[f"{key}{k}/{name}"] for name in NAMES if f"{key}{k}/{name}" in RECORDED}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("recorded", "settings"),
    [
        *((f"regmean {factor}", {"method": "regmean", "reduce": factor}) for factor in (1.0, 0.9, 0.0)),
        ("tsv_m", {"method": "tsv_m"}),
        ("iso_c", {"method": "iso_c"}),
        ("iso_cts", {"method": "iso_cts"}),
        ("fisher", {"method": "fisher"}),
    ],
)
def test_fusion_bench_gives_the_same(recorded: str, settings: dict[str, Any], name: str, tmp_path: Path) -> None:
    vectors = []
    for k in range(EXPERTS):
        for statistic in ("gram", "fisher"):
            folder = write_totals(tmp_path / str(k), statistic, of_expert(statistic, k)).folder
        delta = RECORDED[f"delta{k}/{name}"]
        vectors.append(TaskVector(f"{k}", name, Whole(delta.reshape(-1)), 1.0, statistics=folder))
    if recorded == "fisher":
        mean = torch.stack([RECORDED[f"fisher{k}/{name}"] for k in range(EXPERTS)]).mean()
        settings = {**settings, "floor": FLOOR / float(mean)}
    base = RECORDED[f"base/{name}"]
    found = whole_tensor(base, vectors, method_of(settings)) - base
    expected = RECORDED[f"{recorded}/{name}"] - base
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().mean()))
