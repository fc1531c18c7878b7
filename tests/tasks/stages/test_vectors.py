"""From a static merge to each expert: static + its vector is the expert, and no vector is the merge."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from sensmerge.tasks.artifacts import Artifact, read_json, sha256_file
from sensmerge.tasks.checkpoints.weights import HEADS
from sensmerge.tasks.dynamic.application import SeApplication
from sensmerge.tasks.dynamic.folder import load_network_with_heads
from sensmerge.tasks.dynamic.model import DynamicModel
from sensmerge.tasks.dynamic.vectors import BASE, VECTORS
from sensmerge.tasks.dynamic.writing import FILES
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.base import open_base
from sensmerge.tasks.networks.expert import open_expert
from sensmerge.tasks.stages.merge import MergeJob
from sensmerge.tasks.stages.route import RouteJob
from sensmerge.tasks.stages.vectors import VectorsJob
from tests.conftest import make_adapter, make_llama
from tests.tasks.dynamic.test_model import CALIBRATION
from tests.tasks.stages.test_merge import make_job, merged, weights_of
from tests.tasks.stages.test_merge_vectors import vectors_of

Folders = dict[str, Path]


@pytest.fixture(scope="module")
def experts(llamas: Folders, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    lora = make_adapter(make_llama(), tmp_path_factory.mktemp("lora") / "lora", 3, target_modules="all-linear")
    return {"math": llamas["math"], "code": llamas["code"], "lora": lora}


def toward(static: Path, job: MergeJob) -> VectorsJob:
    return VectorsJob(Artifact("", static), job.models, job.base, job.experts, job.groups)


def made(job: VectorsJob, out: Path) -> dict[str, Any]:
    out.mkdir(parents=True, exist_ok=True)
    for part in job.parts():
        job.run(part, out)
    return job.finish(out)


@pytest.fixture(scope="module")
def static(llamas: Folders, experts: Folders, tmp_path_factory: pytest.TempPathFactory) -> tuple[MergeJob, Path]:
    """A TIES merge of full fine-tunes and an adapter."""
    folder = tmp_path_factory.mktemp("static")
    job = make_job(folder, llamas["base"], experts, "ties", {"density": 0.4})
    merged(job, folder / "merge")
    return job, folder / "merge"


@pytest.fixture(scope="module")
def vectors(static: tuple[MergeJob, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    job, folder = static
    out = tmp_path_factory.mktemp("vectors") / "out"
    made(toward(folder, job), out)
    return out


def test_the_static_merge_and_a_vector_give_the_expert(
    static: tuple[MergeJob, Path], vectors: Path, llamas: Folders, experts: Folders
) -> None:
    base, found = open_base(llamas["base"]), vectors_of(vectors)
    origin = weights_of(vectors / BASE)
    assert all(torch.equal(origin[name], tensor) for name, tensor in weights_of(static[1]).items())
    for key, folder in experts.items():
        expert = open_expert(folder, base, key)
        for name in base.weights:
            vector = found.get(name, {}).get(key)
            weight = origin[name].double() + (0 if vector is None else vector.dense().double())
            torch.testing.assert_close(weight, expert.read(name).double(), rtol=1e-6, atol=1e-7)


def test_coefficients_of_zero_answer_as_the_merge_and_of_one_as_an_expert(
    static: tuple[MergeJob, Path], vectors: Path, llamas: Folders, experts: Folders
) -> None:
    network, _ = load_network_with_heads(vectors, list(experts), "causal_lm", "float32", "cpu")
    ids = torch.arange(5, 17).view(1, -1)

    def logits(folder: Path) -> torch.Tensor:
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            found: torch.Tensor = plain(input_ids=ids).logits
        return found

    with torch.inference_mode():
        with network.mixed(torch.zeros(1, 3)) as mixed:
            as_merge = mixed(input_ids=ids).logits
        with network.mixed(torch.tensor([[0.0, 1.0, 0.0]])) as mixed:
            as_code = mixed(input_ids=ids).logits
    torch.testing.assert_close(as_merge, logits(static[1]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(as_code, logits(experts["code"]), rtol=1e-4, atol=1e-4)


def test_the_folder_is_complete_and_its_digests_are_right(vectors: Path, static: tuple[MergeJob, Path]) -> None:
    digests = read_json(vectors / FILES)
    assert {name: sha256_file(vectors / name) for name in digests} == digests
    assert {f"{BASE}/config.json", f"{BASE}/tokenizer.json", f"{BASE}/model.safetensors"} <= set(digests)
    assert not {name for name in digests if name.endswith(("coefficients.json", "tensors.json"))}


def test_heads_lie_where_a_dynamic_model_has_them(berts: Folders, tmp_path: Path) -> None:
    experts = {name: berts[name] for name in ("mood", "topic")}
    job = make_job(tmp_path, berts["base"], experts, "task_arithmetic", {})
    out = tmp_path / "vectors"
    merged(job, tmp_path / "merge")
    made(toward(tmp_path / "merge", job), out)
    assert sorted(path.name for path in (out / HEADS).iterdir()) == ["mood", "topic"]
    _, heads = load_network_with_heads(out, list(experts), "classification", "float32", "cpu")
    assert sorted(heads) == ["mood", "topic"]


def test_an_interrupted_step_goes_on_and_gives_the_same_bytes(
    static: tuple[MergeJob, Path], vectors: Path, tmp_path: Path
) -> None:
    job = toward(static[1], static[0])
    out = tmp_path / "again"
    shutil.copytree(vectors / VECTORS, out / VECTORS)
    assert not any(job.run(part, out) for part in job.parts())
    job.finish(out)
    job.finish(out)
    assert read_json(out / FILES) == read_json(vectors / FILES)


def test_what_overflows_is_refused_by_name(static: tuple[MergeJob, Path], tmp_path: Path) -> None:
    job, folder = static
    broken = tmp_path / "merge"
    shutil.copytree(folder, broken)
    tensors = weights_of(broken)
    name = next(iter(job.groups[0]))
    tensors[name] = torch.full_like(tensors[name], torch.inf)
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"tensor {name}: what experts.math adds has NaN or Inf"):
        toward(broken, job).run(0, tmp_path)


def test_a_route_from_the_static_merge_ends_in_a_model_that_starts_there(vectors: Path, tmp_path: Path) -> None:
    application = SeApplication(kind="se", fallback=0.0, origin="static")
    out = tmp_path / "route"
    out.mkdir()
    RouteJob(Artifact("", vectors), CALIBRATION, application, 0.0, "float32", "cpu", "static").finish(out)
    settings = DynamicModel.load(out).router.settings
    assert (settings.origin, settings.static, settings.mass) == ("static", 0.0, 1.0)
    assert {one["score"] for one in read_json(out / "route.json")["candidates"]} == {
        "centroid", "discriminant",
    }  # fmt: skip
