"""The merge of a dynamic model: base + c · Σ vectors is what the static merge of the same settings writes."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from sensmerge.tasks.artifacts import Artifact, read_json, sha256_file
from sensmerge.tasks.checkpoints.layers import group_by_layer
from sensmerge.tasks.checkpoints.weights import ExpertWeights
from sensmerge.tasks.coefficients import ExplicitCoefficients, Lines, SensCoefficients
from sensmerge.tasks.dynamic.vectors import BASE, VECTORS, Dense, LowRank, Sparse, Vector, load_vectors
from sensmerge.tasks.dynamic.writing import FILES
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.base import open_base
from sensmerge.tasks.stages.merge import MergeJob
from sensmerge.tasks.stages.merge_vectors import MergeVectorsJob
from tests.conftest import make_adapter, make_bert_trunk, make_gpt2, make_llama, perturbed
from tests.tasks.stages.test_merge import make_job, merged, weights_of

Save = Callable[..., Path]
Folders = dict[str, Path]


@pytest.fixture(scope="module")
def models(
    llamas: Folders, berts: Folders, save: Save, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Folders]]:
    """Base and experts: full fine-tunes, LoRA adapters, one of each; classifiers; GPT-2, which stores (in, out)."""
    folder = tmp_path_factory.mktemp("adapters")
    loras = {
        "narrow": make_adapter(make_llama(), folder / "narrow", 1, target_modules=["q_proj", "down_proj"]),
        "wide": make_adapter(make_llama(), folder / "wide", 2, target_modules="all-linear", r=3, use_rslora=True),
    }
    gpt2 = {
        "full": save(perturbed(make_gpt2(), 1), "full"),
        "lora": make_adapter(make_gpt2(), folder / "gpt2", 3, target_modules=["c_attn", "c_proj"]),
    }
    return {
        "full": (llamas["base"], {name: llamas[name] for name in ("math", "code")}),
        "lora": (llamas["base"], loras),
        "mixed": (llamas["base"], {"math": llamas["math"], **loras}),
        "berts": (berts["base"], {name: berts[name] for name in ("mood", "topic")}),
        "gpt2": (save(make_gpt2(), "base"), gpt2),
    }


def of_vectors(job: MergeJob) -> MergeVectorsJob:
    """The job of the same variant with application se."""
    given = vars(job)
    return MergeVectorsJob(**{one.name: given[one.name] for one in fields(MergeVectorsJob)})


def dynamic(job: MergeJob, out: Path) -> dict[str, Any]:
    """Run all pieces of the merge of a dynamic model."""
    out.mkdir(parents=True, exist_ok=True)
    se = of_vectors(job)
    for group in se.parts():
        se.run(group, out)
    return se.finish(out)


def vectors_of(folder: Path) -> dict[str, dict[str, Vector]]:
    return {name: one for path in sorted((folder / VECTORS).iterdir()) for name, one in load_vectors(path).items()}


def materialised(job: MergeJob, folder: Path) -> dict[str, torch.Tensor]:
    """Base + c · Σ vectors of what lies in the folder, in float64."""
    common = of_vectors(job).static
    vectors = vectors_of(folder)
    return {
        name: tensor.double() + common * sum(one.dense().double() for one in vectors.get(name, {}).values())
        for name, tensor in weights_of(folder / BASE).items()
    }


def explicit(experts: Folders) -> ExplicitCoefficients:
    """Another number for each expert, and for the first another one in the last blocks."""
    patterns = {"*": 0.8, "*.1": 0.25}
    return ExplicitCoefficients(
        kind="explicit", weights={name: patterns if i == 0 else 0.5 + i for i, name in enumerate(experts)}
    )


def sens(folder: Path, base: Path, experts: Folders) -> dict[str, Any]:
    """Settings of a job with sens coefficients, from made-up sensitivities and distances."""
    layers = list(group_by_layer(open_base(base).weights))
    sensitivities = {}
    for i, name in enumerate(experts):
        sensitivities[name] = Artifact("", folder / f"sensitivity-{name}")
        sensitivities[name].folder.mkdir()
        values = {layer: 1.0 + (place * (i + 2)) % 5 for place, layer in enumerate(layers)}
        (sensitivities[name].folder / "sensitivity.json").write_text(json.dumps({"sensitivity": values}))
    distances = {i: {j: 1.0 + x + 2 * y for y, j in enumerate(experts) if j != i} for x, i in enumerate(experts)}
    (folder / "distances.json").write_text(json.dumps(distances))
    coefficients = SensCoefficients(kind="sens", temperature=0.1)
    return {"coefficients": coefficients, "statistics": sensitivities, "distances": Artifact("", folder)}


# Method, density and settings by name.
VARIANTS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "ta": ("task_arithmetic", 1.0, {}),
    "ta normalised": ("task_arithmetic", 1.0, {"normalize": True, "lambda": 0.7}),
    "linear": ("linear", 1.0, {"normalize": True}),
    "dare_linear": ("dare_linear", 0.4, {"rescale": True}),
    "ties": ("ties", 0.3, {"normalize": True, "lambda": 1.3}),
    "ties sum": ("ties", 0.3, {}),
    "dare_ties": ("dare_ties", 0.5, {"rescale": True, "lambda": 0.7}),
    "dare_ties normalised": ("dare_ties", 0.5, {"rescale": True, "normalize": True}),
    "breadcrumbs": ("breadcrumbs", 0.5, {"gamma": 0.1}),
    "breadcrumbs_ties": ("breadcrumbs_ties", 0.5, {"gamma": 0.1, "normalize": True}),
    "della": ("della", 0.5, {"rescale": True, "normalize": True}),
    "della_linear": ("della_linear", 0.5, {"rescale": True}),
}


@pytest.mark.parametrize(
    ("variant", "kind", "coefficients"),
    [
        *((variant, "full", "uniform") for variant in ("ta", "ties", "dare_ties")),
        *((variant, "mixed", "explicit") for variant in ("ta", "ta normalised", "dare_linear", "ties")),
        *((variant, "mixed", "sens") for variant in ("ta", "ties sum", "dare_ties normalised")),
        *((variant, "berts", "uniform") for variant in ("linear", "ties")),
        *((variant, "gpt2", "explicit") for variant in ("ta", "dare_ties")),
        *((variant, "full", "lines") for variant in ("ta", "ties sum", "della_linear")),
        *((variant, "mixed", "sens") for variant in ("breadcrumbs", "breadcrumbs_ties", "della", "della_linear")),
    ],
)
def test_base_plus_vectors_is_the_static_merge(
    variant: str,
    kind: str,
    coefficients: str,
    models: dict[str, tuple[Path, Folders]],
    tmp_path: Path,
) -> None:
    (method, density, changes), (base, experts) = VARIANTS[variant], models[kind]
    hows = {"explicit": {"coefficients": explicit(experts)}, "lines": {"lines": Lines(first=0.25)}}
    how: dict[str, Any] = hows.get(coefficients, {})
    if coefficients == "sens":
        how = sens(tmp_path, base, experts)
    plain = {"normalize": False} | ({"rescale": False, "density": density} if density < 1 else {})
    job = make_job(tmp_path, base, experts, method, plain | changes, **how)
    merged(job, tmp_path / "static")
    dynamic(job, tmp_path / "dynamic")
    static = weights_of(tmp_path / "static")
    found = materialised(job, tmp_path / "dynamic")
    assert found.keys() == static.keys()
    assert max(float((static[name] - tensor).abs().max()) for name, tensor in weights_of(base).items()) > 0.005
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.float(), static[name], rtol=0, atol=1e-6)
    assert read_json(tmp_path / "dynamic/coefficients.json") == read_json(tmp_path / "static/coefficients.json")


def test_factors_of_adapters_are_never_multiplied_out(
    models: dict[str, tuple[Path, Folders]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = models["mixed"]
    job = make_job(tmp_path, base, experts, coefficients=explicit(experts))

    def forbidden(*_: object) -> torch.Tensor:
        raise AssertionError("factors were multiplied out")

    with monkeypatch.context() as patch:
        patch.setattr(ExpertWeights, "delta", forbidden)
        dynamic(job, tmp_path / "out")
    vectors = vectors_of(tmp_path / "out")
    adapted = vectors["model.layers.1.self_attn.q_proj.weight"]
    assert {name: type(one) for name, one in adapted.items()} == {"math": Dense, "narrow": LowRank, "wide": LowRank}
    ranks = {name: len(one.first) for name, one in adapted.items() if isinstance(one, LowRank)}
    assert ranks == {"narrow": 4, "wide": 3}
    assert sum(isinstance(one, LowRank) for by_expert in vectors.values() for one in by_expert.values()) == 4 + 14
    # Where elements are dropped or signs must agree, factors are of no use.
    sparse = make_job(tmp_path, base, experts, "dare_linear", {"density": 0.3})
    dynamic(sparse, tmp_path / "sparse")
    found = vectors_of(tmp_path / "sparse")["model.layers.1.self_attn.q_proj.weight"]
    assert {type(one) for one in found.values()} == {Sparse}


def test_what_nobody_changed_costs_nothing(models: dict[str, tuple[Path, Folders]], tmp_path: Path) -> None:
    base, experts = models["lora"]
    same = {"narrow": experts["narrow"], "again": experts["narrow"]}
    for method in ("task_arithmetic", "ties"):
        dynamic(make_job(tmp_path, base, same, method), tmp_path / method)
        found = vectors_of(tmp_path / method)
        expected = {f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")}
        assert found.keys() == expected
    full, tuned = models["full"]
    state = load_file(tuned["math"] / "model.safetensors")
    origin = load_file(full / "model.safetensors")
    kept = "model.layers.0.mlp.up_proj.weight"
    partly = tmp_path / "partly"
    partly.mkdir()
    for path in tuned["math"].iterdir():
        (partly / path.name).write_bytes(path.read_bytes())
    save_file(state | {kept: origin[kept]}, partly / "model.safetensors", metadata={"format": "pt"})
    dynamic(make_job(tmp_path / "job", full, {"math": partly, "code": tuned["code"]}), tmp_path / "full")
    found = vectors_of(tmp_path / "full")
    assert set(found[kept]) == {"code"}
    assert set(found["model.norm.weight"]) == {"math", "code"}


def test_a_group_that_is_done_is_left_as_it_is(models: dict[str, tuple[Path, Folders]], tmp_path: Path) -> None:
    job = of_vectors(make_job(tmp_path, *models["full"]))
    job.run(1, tmp_path)
    done = tmp_path / VECTORS / "group-00001.safetensors"
    done.write_bytes(b"kept")
    (tmp_path / VECTORS / ".group-00002.safetensors.partial").write_bytes(b"half a file")
    for group in job.parts():
        job.run(group, tmp_path)
    assert done.read_bytes() == b"kept"
    assert [path.name for path in sorted((tmp_path / VECTORS).iterdir())] == [
        f"group-0000{i}.safetensors" for i in range(4)
    ]


def test_order_and_repetition_change_nothing(models: dict[str, tuple[Path, Folders]], tmp_path: Path) -> None:
    job = make_job(tmp_path, *models["mixed"], "dare_ties", {"density": 0.5})
    expected = dynamic(job, tmp_path / "one")
    (tmp_path / "other").mkdir()
    for group in (3, 1, 0, 2, 1):
        of_vectors(job).run(group, tmp_path / "other")
    assert of_vectors(job).finish(tmp_path / "other") == expected
    # A run that ended before the artifact was published finishes it once more.
    assert of_vectors(job).finish(tmp_path / "other") == expected
    assert read_json(tmp_path / "other" / FILES) == read_json(tmp_path / "one" / FILES)


def test_the_base_is_copied_bit_for_bit(save: Save, tmp_path: Path) -> None:
    base = save(make_llama(tie_word_embeddings=False), "base", tmp_path, max_shard_size="40KB")
    experts = {
        name: save(perturbed(make_llama(tie_word_embeddings=False), seed), name, tmp_path)
        for seed, name in enumerate("xy", 1)
    }
    dynamic(make_job(tmp_path, base, experts), tmp_path / "out")
    assert len(list(base.glob("*.safetensors"))) > 1
    assert same_tensors(tmp_path / "out" / BASE, base)
    assert read_json(tmp_path / "out" / BASE / "config.json") == read_json(base / "config.json")


def same_tensors(folder: Path, other: Path) -> bool:
    one, two = (
        {name: tensor for file in where.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for where in (folder, other)
    )
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one
    )


def test_files_are_listed_with_their_digests(models: dict[str, tuple[Path, Folders]], tmp_path: Path) -> None:
    base, experts = models["berts"]
    found = dynamic(make_job(tmp_path, base, experts), tmp_path / "out")
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    listed = read_json(tmp_path / "out" / FILES)
    assert set(listed) == files - {FILES}
    assert {"base/model.safetensors", "base/config.json", "base/tokenizer.json", "heads/topic/head.safetensors"} <= set(
        listed
    )
    assert all(sha256_file(tmp_path / "out" / name) == digest for name, digest in listed.items())
    sizes = [(tmp_path / "out" / name).stat().st_size for name in listed if name.endswith(".safetensors")]
    assert found["bytes"] == sum(sizes)
    other = dynamic(make_job(tmp_path, base, experts, weight=0.4, coefficients=explicit(experts)), tmp_path / "other")
    assert other["digest"] != found["digest"]


def test_heads_lie_beside_the_base(models: dict[str, tuple[Path, Folders]], tmp_path: Path) -> None:
    base, experts = models["berts"]
    dynamic(make_job(tmp_path, base, experts), tmp_path / "out")
    for name, labels in (("mood", 2), ("topic", 3)):
        head = load_file(tmp_path / "out" / "heads" / name / "head.safetensors")
        whole = load_file(experts[name] / "model.safetensors")
        assert head.keys() == {"classifier.weight", "classifier.bias"}
        assert all(torch.equal(tensor, whole[key]) for key, tensor in head.items())
        assert AutoConfig.from_pretrained(tmp_path / "out" / "heads" / name).num_labels == labels
    assert not any("classifier" in name for name in vectors_of(tmp_path / "out"))


def test_vectors_have_the_dtype_of_the_base(save: Save, tmp_path: Path) -> None:
    base = save(make_llama().bfloat16(), "base", tmp_path)
    experts = {
        "full": save(perturbed(make_llama(), 1).bfloat16(), "full", tmp_path),
        "lora": make_adapter(make_llama(), tmp_path / "lora", 2, target_modules=["q_proj"]),
    }
    job = make_job(tmp_path, base, experts)
    dynamic(job, tmp_path / "out")
    parts = [
        tensor
        for by_expert in vectors_of(tmp_path / "out").values()
        for one in by_expert.values()
        for part, tensor in vars(one).items()
        if part in ("values", "first", "second")
    ]
    assert {tensor.dtype for tensor in parts} == {torch.bfloat16}
    merged(job, tmp_path / "static")
    static, found = weights_of(tmp_path / "static"), materialised(job, tmp_path / "out")
    for name, tensor in found.items():
        # One rounding of the merged weights, and one of each task vector.
        torch.testing.assert_close(tensor.float(), static[name].float(), rtol=2**-7, atol=2e-3)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_values_that_the_dtype_cannot_hold(
    kind: str, models: dict[str, tuple[Path, Folders]], save: Save, tmp_path: Path
) -> None:
    base = save(make_llama().half(), "base", tmp_path)
    experts = models[kind][1]
    huge = ExplicitCoefficients(kind="explicit", weights=dict.fromkeys(experts, 1e9))
    with pytest.raises(InputError, match=r"tensor model\.\S+: what experts\.\w+ adds has NaN or Inf as torch\.float16"):
        dynamic(make_job(tmp_path, base, experts, coefficients=huge), tmp_path / "out")


def test_factors_that_the_dtype_cannot_hold(save: Save, tmp_path: Path) -> None:
    base = save(make_llama().half(), "base", tmp_path)
    adapter = make_adapter(make_llama(), tmp_path / "lora", 1, target_modules=["q_proj"])
    stored = load_file(adapter / "adapter_model.safetensors")
    # Their product is an ordinary task vector.
    scaled = {name: tensor * (1e7 if "lora_A" in name else 1e-7) for name, tensor in stored.items()}
    save_file(scaled, adapter / "adapter_model.safetensors")
    experts = {"lora": adapter, "other": make_adapter(make_llama(), tmp_path / "other", 2, target_modules=["q_proj"])}
    job = make_job(tmp_path, base, experts)
    (tmp_path / "out").mkdir()
    try:
        dynamic(job, tmp_path / "out")
    except InputError as error:
        assert "q_proj" in str(error)  # noqa: PT017 (refusing is as good as a way to hold them)
    else:
        assert all(tensor.isfinite().all() for tensor in materialised(job, tmp_path / "out").values())


def test_integers_are_no_task_vectors(save: Save, tmp_path: Path, berts: Folders) -> None:
    base = save(make_bert_trunk(), "base", tmp_path)
    tensors = load_file(base / "model.safetensors")
    tensors["embeddings.position_ids"] = torch.arange(128)[None]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    dynamic(make_job(tmp_path, base, {name: berts[name] for name in ("mood", "topic")}), tmp_path / "out")
    assert same_tensors(tmp_path / "out" / BASE, base)
    assert "embeddings.position_ids" not in vectors_of(tmp_path / "out")
