"""SE-Merging on a real DINOv2 and four real classifiers of pictures: what the router finds, and what it is worth."""

import os
from pathlib import Path

import pytest

from sensmerge.tasks.artifacts import Artifact, read_json
from sensmerge.tasks.kinds.image_classification import ImageClassificationTask
from sensmerge.tasks.kinds.kind import RowSet
from sensmerge.tasks.networks.base import open_base
from sensmerge.tasks.networks.expert import open_expert
from sensmerge.tasks.rows.source import DataSource
from sensmerge.tasks.rows.tables import load_rows
from sensmerge.tasks.stages.evaluate import EvaluateJob
from sensmerge.tasks.stages.evaluate_dynamic import EvaluateDynamicJob
from tests.conftest import SHARED, row_set
from tests.tasks.dynamic.test_model import merge

pytestmark = [pytest.mark.shared, pytest.mark.timeout(1800)]
EXPERTS = ("digits", "silhouettes", "textile", "shapes")
TASK = ImageClassificationTask(kind="image_classification", batch_size=32)


@pytest.fixture(scope="module")
def models() -> dict[str, Path]:
    """What `models/build_vision.py` makes, in SENSMERGE_MODELS if that is set, and the adapters."""
    build = Path(os.environ.get("SENSMERGE_MODELS", SHARED / "models" / "build"))
    for name in ("base-vit", "vit-shapes"):
        if not (build / name / "model.safetensors").is_file():
            pytest.skip(f"needs {build / name}")
    adapters = {name: SHARED / "models" / "experts" / f"vit-{name}" for name in EXPERTS[:3]}
    return {"base": build / "base-vit", **adapters, "shapes": build / "vit-shapes"}


def rows(models: dict[str, Path], split: str, samples: int) -> dict[str, RowSet]:
    base, sets = open_base(models["base"]), {}
    for name in EXPERTS:
        source = DataSource(path="parquet", data_files=f"data/{name}/{split}.parquet", samples=samples)
        labels = open_expert(models[name], base, name).config.label2id
        sets[name] = row_set(TASK, load_rows(source, f"tasks.{name}.{split}", SHARED).rows, labels)
    return sets


def test_pictures_find_their_experts(models: dict[str, Path], tmp_path: Path) -> None:
    experts = {name: models[name] for name in EXPERTS}
    made = merge(tmp_path, models["base"], experts, rows(models, "train", 32), weight=0.3)
    evaluation = rows(models, "test", 40)
    made.run(tmp_path / "model", mass=1.0, score="discriminant", layer=4, fallback=0.8)
    out = tmp_path / "scores"
    out.mkdir()
    report = EvaluateDynamicJob(Artifact("", tmp_path / "model"), evaluation, {}, "cpu").finish(out)
    assert report["identification"]["value"] >= 0.95
    scores, own = read_json(out / "scores.json"), {}
    for name, one in evaluation.items():
        (tmp_path / name).mkdir()
        base, expert = Artifact("", models["base"]), Artifact("", experts[name])
        job = EvaluateJob(base, expert, expert, base, TASK, one.rows, one.label2id, "float32", {}, name, True, "cpu")
        own[name] = job.finish(tmp_path / name)["accuracy"]["value"]
    kept = [scores[name]["accuracy"]["value"] / own[name] for name in EXPERTS]
    assert sum(kept) / len(kept) >= 0.98
