"""What of models at URLs comes to the machine where a network, or a part of it, runs."""

from pathlib import Path
from typing import Any

import pytest

from sensmerge.tasks.artifacts import Artifact, read_json
from sensmerge.tasks.checkpoints import sparse, url
from sensmerge.tasks.checkpoints.checkpoint import open_checkpoint
from sensmerge.tasks.checkpoints.listing import Listing, UrlModel
from sensmerge.tasks.checkpoints.source import resolve
from sensmerge.tasks.checkpoints.unchanged import NONE, PlannedModels
from sensmerge.tasks.kinds.completion import CompletionTask
from sensmerge.tasks.networks.placement import Actors, Placement
from sensmerge.tasks.networks.sharded import BlockOwner, Owned
from sensmerge.tasks.networks.source import Source
from sensmerge.tasks.rows.stored import StoredRows
from sensmerge.tasks.stages.evaluate import EvaluateJob
from tests.conftest import TaskRows, calibration_set, cross_task_job, do_job, statistics_job
from tests.tasks.networks.owners import owners_here as owners_here

TASK = CompletionTask(kind="completion", prompt="{text}", completion="!", loss_on="all")
ROWS = [{"text": text} for text in ("one", "two")]
NAMES = ("base", "math", "code")
WEIGHTS = "model.safetensors"


@pytest.fixture
def models(llamas: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlannedModels:
    """Models at URLs of which small files are here; all weights count as large."""
    monkeypatch.setattr(url, "LARGE", 1)
    cache = tmp_path / "cache"
    found = PlannedModels(tuple(resolve(UrlModel(llamas[name].as_uri()), cache) for name in NAMES), cache)
    found.bring({})
    return found


def here(listing: Listing) -> set[str]:
    """The tensors that have come of a model."""
    found = sparse.present(listing.folder / WEIGHTS)
    return set(open_checkpoint(listing.folder).tensors) if found is None else set(found.tensors)


@pytest.mark.parametrize("placement", ["whole", "streamed", Actors(2, 1, 0)], ids=["whole", "streamed", "actors"])
def test_statistics_read_nothing_of_a_base_that_the_expert_replaces(
    placement: Placement, models: PlannedModels, llamas: dict[str, Path], tmp_path: Path, owners_here: None
) -> None:
    base, math, _ = models.listings
    rows = calibration_set(TASK, ROWS, tmp_path / "rows")
    out = {name: tmp_path / name for name in ("there", "here")}
    for folder in out.values():
        folder.mkdir()
    job = statistics_job(base.folder, math.folder, rows, placement=placement, planned=models)
    models.bring(job.reads(None))
    assert here(base) == here(math) == set()
    job.finish(out["there"])
    assert here(base) == set()
    assert here(math) == set(open_checkpoint(llamas["math"]).tensors)
    models.check()
    statistics_job(llamas["base"], llamas["math"], rows, placement=placement).finish(out["here"])
    found, expected = (read_json(folder / "sensitivity.json") for folder in out.values())
    assert found == expected


def test_distances_read_trunks_and_heads(
    models: PlannedModels, llamas: dict[str, Path], tmp_path: Path, owners_here: None
) -> None:
    sets = {name: TaskRows(TASK, ROWS) for name in ("math", "code")}
    base, *experts = models.listings
    folders = {name: one.folder for name, one in zip(sets, experts, strict=True)}
    models.bring({one.folder: () for one in models.listings})
    job = cross_task_job(base.folder, folders, sets, placement=Actors(2, 1, 0), planned=models)
    assert job.reads("math") == {one.folder: () for one in models.listings}
    do_job(job, tmp_path / "there")
    assert here(base) == set()
    do_job(cross_task_job(llamas["base"], {name: llamas[name] for name in sets}, sets), tmp_path / "here")
    found, expected = (read_json(tmp_path / name / "distances.json") for name in ("there", "here"))
    for name, row in found.items():
        assert row == pytest.approx(expected[name], rel=1e-5)


def test_the_owner_of_blocks_has_theirs(models: PlannedModels, tmp_path: Path) -> None:
    import torch

    base, math, _ = models.listings
    source = Source(base.folder, math.folder, "experts.math", "causal_lm", torch.float32, "cpu", models=models)
    owner = BlockOwner(Owned(source, slice(1, 2), has_shell=False, statistics={}), 1)
    assert not list(owner.write(tmp_path, tmp_path))
    blocks = {name for name in open_checkpoint(math.folder).tensors if name.startswith("model.layers.1.")}
    assert here(math) == blocks
    assert here(base) == set()


def test_scores_read_the_model_alone(models: PlannedModels, llamas: dict[str, Path], tmp_path: Path) -> None:
    base, math, _ = models.listings
    rows = StoredRows.of(ROWS, tmp_path / "rows")
    rows.write(ROWS)

    def scores(model: Path, is_expert: bool) -> Any:
        artifacts = (Artifact("base", base.folder), Artifact("model", model), None, Artifact("tokenizer", base.folder))
        fields = (TASK, rows, None, "float32", {}, "math", is_expert, "cpu")
        job = EvaluateJob(*artifacts, *fields, planned=models)
        models.bring(job.reads(None))
        return job.finish(tmp_path)

    merged = scores(llamas["math"], is_expert=False)
    assert here(base) == set()
    assert not (math.folder / WEIGHTS).exists()
    assert scores(math.folder, is_expert=True) == merged
    assert here(base) == set()
    scores(base.folder, is_expert=False)
    assert here(base) == set(open_checkpoint(llamas["base"]).tensors)


def test_what_stands_for_models_comes_whole(models: PlannedModels, tmp_path: Path) -> None:
    base, math, _ = models.listings
    assert models.of(base.folder, math.folder).listings == (base, math)
    assert models.of(base.folder, tmp_path / "view") == NONE
