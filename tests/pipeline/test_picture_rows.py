"""Classifiers of pictures from rows to scores: merged, weighed by sensitivity, and routed to heads."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from sensmerge.pipeline.plan.plan import Plan
from sensmerge.tasks.artifacts import read_json
from sensmerge.tasks.dynamic.model import DynamicModel, Routes
from sensmerge.tasks.networks.names import names_of
from tests.conftest import do_steps, plan_of
from tests.pictures import picture, pixels_of, save_classifiers, trunk_of_classifier

LABELS = {"reds": 2, "blues": 3}
COLOURS = {"reds": 0, "blues": 2}


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)


def rows_of(name: str, numbers: range) -> list[dict[str, Any]]:
    files = [{"bytes": picture(number, COLOURS[name]), "path": None} for number in numbers]
    return [{"image": one, "label": number % LABELS[name]} for number, one in zip(numbers, files, strict=True)]


def make_recipe(network: str, folder: Path) -> dict[str, Any]:
    folders = save_classifiers(network, folder, LABELS)
    tasks = {}
    for name in LABELS:
        write_parquet(folder / f"{name}.parquet", rows_of(name, range(6)))
        write_parquet(folder / f"{name}-test.parquet", rows_of(name, range(6, 16)))
        tasks[name] = {
            "kind": "image_classification",
            "calibration": {"path": "parquet", "data_files": f"{name}.parquet"},
            "evaluation": {"path": "parquet", "data_files": f"{name}-test.parquet"},
            "batch_size": 4,
        }
    return {
        "name": "pictures",
        "base": str(folders["base"]),
        "experts": {name: {"model": str(folders[name])} for name in LABELS},
        "tasks": tasks,
        "merges": {
            "ta": {"method": "task_arithmetic", "weight": 0.5},
            "sens": {"method": "ties", "coefficients": {"kind": "sens"}},
            "regmean": {"method": "regmean"},
            "se": {"method": "task_arithmetic", "weight": 0.5, "application": {"kind": "se", "mass": 1.0}},
        },
    }


def pixels(plan: Plan, task: str) -> torch.Tensor:
    return torch.stack([pixels_of(picture(number, COLOURS[task])) for number in range(6, 16)])


@pytest.mark.parametrize("network", ["vit", "dinov2", "clip"])
def test_from_rows_to_scores(network: str, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, make_recipe(network, tmp_path))
    do_steps(plan)
    for task in LABELS:
        expert = AutoModelForImageClassification.from_pretrained(tmp_path / task)
        with torch.no_grad():
            expected = expert(pixel_values=pixels(plan, task)).logits.argmax(-1).tolist()
        records = read_json(plan.artifact("evaluate", f"{task}/{task}") / "records.json")
        assert [one["prediction"] for one in records] == expected
        assert [one["label"] for one in records] == [number % LABELS[task] for number in range(6, 16)]
        scores = read_json(plan.artifact("evaluate", f"ta/{task}") / "scores.json")
        assert {"accuracy", "macro_f1"} <= scores.keys()
        assert scores["accuracy"]["n"] == 10

    # Everything that the merged model needs lies beside it; its trunk is the mean of the experts'.
    folder = plan.artifact("merge", "ta")
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    assert processor.to_dict() == AutoImageProcessor.from_pretrained(tmp_path / "reds", backend="pil").to_dict()
    experts = [AutoModelForImageClassification.from_pretrained(tmp_path / task) for task in LABELS]
    own = [trunk_of_classifier(one).state_dict() for one in experts]
    merged = trunk_of_classifier(load_merged(folder, experts[0])).state_dict()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, (own[0][name] + own[1][name]) / 2, atol=1e-6, rtol=0)
    routes = read_json(plan.artifact("evaluate", "se") / "routes.json")
    assert routes["identification"]["value"] == 1
    scores = read_json(plan.artifact("evaluate", "se") / "scores.json")
    assert scores["reds"].keys() >= {"accuracy", "routed_accuracy", "macro_f1"}
    assert_dynamic_is_materialised(plan, experts)


def load_merged(folder: Path, like: Any) -> Any:
    """The network of an expert with the trunk of a merged model."""
    from safetensors.torch import load_file

    names = names_of(like)
    tensors = {names.key(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    own = like.state_dict()
    found = {name: tensors.get(names.key(name), own[name]) for name in own}
    classifier = [name for name in own if name.startswith("classifier.")]
    network = type(like)(like.config)
    network.load_state_dict(found | {name: own[name] for name in classifier})
    return network.eval()


def assert_dynamic_is_materialised(plan: Plan, experts: list[Any]) -> None:
    """Each picture is answered by base + Σ λ · task vector, written out."""
    model = DynamicModel.load(plan.artifact("route", "se"))
    samples = [{"pixel_values": one} for task in LABELS for one in pixels(plan, task)[:3]]
    torch.manual_seed(0)
    coefficients = torch.rand(len(samples), 2)
    routes = Routes(coefficients, [0] * len(samples))
    heads = [list(LABELS)[number % 2] for number in range(len(samples))]
    found = model.class_logits(samples, routes, heads)[0]
    networks = [load_merged(plan.artifact("route", "se") / "base", expert) for expert in experts]
    bases = [{name: one.clone() for name, one in network.state_dict().items()} for network in networks]
    trunks = [trunk_of_classifier(one).state_dict() for one in experts]
    for number, (sample, row, head) in enumerate(zip(samples, coefficients, heads, strict=True)):
        k = list(LABELS).index(head)
        network = networks[k]
        trunk = trunk_of_classifier(network)
        network.load_state_dict(bases[k])
        base = {name: tensor.double() for name, tensor in trunk.state_dict().items()}
        mixed = {
            name: (one + sum(float(c) * (own[name] - one) for c, own in zip(row, trunks, strict=True))).float()
            for name, one in base.items()
        }
        trunk.load_state_dict(mixed)
        with torch.no_grad():
            expected = network(pixel_values=sample["pixel_values"][None]).logits[0]
        torch.testing.assert_close(found[number], expected, atol=1e-4, rtol=1e-4)
