"""SE-Merging on a real base and four real full-rank classifiers: what the router finds, and what it is worth."""

import os
from pathlib import Path
from typing import Any

import pytest

from sensmerge.tasks.artifacts import Artifact, read_json
from sensmerge.tasks.kinds.classification import ClassificationTask
from sensmerge.tasks.kinds.kind import RowSet
from sensmerge.tasks.kinds.scores import mean_normalised
from sensmerge.tasks.networks.base import open_base
from sensmerge.tasks.networks.expert import open_expert
from sensmerge.tasks.rows.source import DataSource
from sensmerge.tasks.rows.tables import load_rows
from sensmerge.tasks.stages.evaluate import EvaluateJob
from sensmerge.tasks.stages.evaluate_dynamic import EvaluateDynamicJob
from tests.conftest import SHARED, row_set
from tests.tasks.dynamic.test_model import merge

pytestmark = [pytest.mark.shared, pytest.mark.timeout(1800)]
EXPERTS = ("sst2", "trec6", "ag_news", "cola")
TASK = ClassificationTask(kind="classification", max_length=64, batch_size=32)


@pytest.fixture(scope="module")
def build() -> Path:
    """What `models/build.py` makes; SENSMERGE_MODELS names the folder where it is elsewhere."""
    folder = Path(os.environ.get("SENSMERGE_MODELS", SHARED / "models" / "build"))
    for name in ("base-encoder", *(f"full-{expert}" for expert in EXPERTS)):
        if not (folder / name / "model.safetensors").is_file():
            pytest.skip(f"needs {folder / name}")
    return folder


def rows(build: Path, split: str, samples: int) -> dict[str, RowSet]:
    base = open_base(build / "base-encoder")
    sets = {}
    for name in EXPERTS:
        source = DataSource(path="json", data_files=f"data/{name}/{split}.jsonl.gz", samples=samples)
        labels = open_expert(build / f"full-{name}", base, name).config.label2id
        sets[name] = row_set(TASK, load_rows(source, f"tasks.{name}.{split}", SHARED).rows, labels)
    return sets


def test_samples_find_their_experts(build: Path, tmp_path: Path) -> None:
    experts = {name: build / f"full-{name}" for name in EXPERTS}
    made = merge(tmp_path, build / "base-encoder", experts, rows(build, "train", 64), weight=0.3)
    out = tmp_path / "scores"
    out.mkdir()
    evaluation = rows(build, "test", 60)
    made.run(tmp_path / "model", mass=1.0, fallback=0.8)
    report = EvaluateDynamicJob(Artifact("", tmp_path / "model"), evaluation, {}, "cpu").finish(out)
    assert report["identification"]["value"] >= 0.9
    records = read_json(out / "records.json")
    own: dict[str, Any] = {}
    for name, one in evaluation.items():
        (tmp_path / name).mkdir()
        base, expert = Artifact("", build / "base-encoder"), Artifact("", experts[name])
        job = EvaluateJob(base, expert, expert, base, TASK, one.rows, one.label2id, "float32", {}, name, True, "cpu")
        job.finish(tmp_path / name)
        own[name] = read_json(tmp_path / name / "records.json")
    score = mean_normalised(dict.fromkeys(EXPERTS, TASK.metrics[TASK.metric]), records, own)
    assert score is not None
    assert score.value >= 0.97
