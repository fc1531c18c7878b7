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
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.names import names_of
from tests.conftest import do_steps, make_adapter, plan_of, write_rows
from tests.pictures import in_base64, picture, pixels_of, save_classifiers, trunk_of_classifier

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


@pytest.mark.parametrize("network", ["vit", "dinov2", "clip", "convnext"])
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


def small_recipe(folder: Path, **merges: Any) -> dict[str, Any]:
    recipe = make_recipe("vit", folder)
    return recipe | {"merges": merges or {"ta": recipe["merges"]["ta"]}}


def test_the_same_pictures_from_json_csv_and_a_folder(tmp_path: Path) -> None:
    """However the rows come, the same steps are found in the store."""
    recipe = small_recipe(tmp_path)
    found = set()
    for form in ("parquet", "json", "csv", "imagefolder"):
        for name in LABELS:
            (tmp_path / form / name).mkdir(parents=True)
            files = [picture(number, COLOURS[name]) for number in range(6, 10)]
            names = [f"{number}.png" for number in range(4)]
            for file, one in zip(names, files, strict=True):
                (tmp_path / form / name / file).write_bytes(one)
            rows = [{"image": file, "label": number % 2} for number, file in enumerate(names)]
            source: dict[str, Any] = {"path": form, "data_files": f"{form}/{name}/rows.{form}"}
            if form == "parquet":
                write_parquet(
                    tmp_path / form / name / "rows.parquet",
                    [
                        {"image": {"bytes": one, "path": None}, "label": row["label"]}
                        for one, row in zip(files, rows, strict=True)
                    ],
                )
            elif form == "json":
                write_rows(tmp_path / form / name / "rows.json", rows)
            elif form == "csv":
                lines = ["image,label", *(f"{row['image']},{row['label']}" for row in rows)]
                (tmp_path / form / name / "rows.csv").write_text("\n".join(lines) + "\n")
            else:
                lines = ["file_name,label", *(f"{row['image']},{row['label']}" for row in rows)]
                (tmp_path / form / name / "metadata.csv").write_text("\n".join(lines) + "\n")
                source = {"path": f"{form}/{name}"}
            recipe["tasks"][name] |= {"evaluation": source}
            recipe["tasks"][name].pop("calibration", None)
        plan = plan_of(tmp_path, recipe)
        records = {name: plan.inputs.data[name].evaluation for name in LABELS}
        assert [row["image"] for row in records["reds"]] == [in_base64(picture(number, 0)) for number in range(6, 10)]
        assert [int(row["label"]) for row in records["reds"]] == [0, 1, 0, 1]
        if form != "csv":  # whose labels are texts
            found.add(plan.steps[-1].key.fingerprint)
    assert len(found) == 1


def write_json_rows(folder: Path, recipe: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    write_rows(folder / "bad.jsonl", rows)
    recipe["tasks"]["reds"]["evaluation"] = {"path": "json", "data_files": "bad.jsonl"}


GOOD = {"image": in_base64(picture(20, 0)), "label": 0}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"image": 7, "label": 0},
            r"tasks\.reds\.image names field 'image', which in .*: line 2 of .* is a int",
        ),
        (
            {"image": in_base64(b"no picture"), "label": 0},
            r"line 2 of .*: field 'image' is 10 bytes that begin with",
        ),
        ({"image": "../a.png", "label": 0}, r"line 2 of .* is '\.\./a\.png'; expected a path below "),
        ({"label": 0}, r"tasks\.reds\.image names field 'image', line 2 of .*bad\.jsonl has 'label'"),
        ({"image": GOOD["image"], "label": 5}, r"line 2 of .*: label is 5, expected one of the expert's 2 classes"),
    ],
)
def test_a_row_that_cannot_be_read_ends_the_plan(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    write_json_rows(tmp_path, recipe, [GOOD, row])
    with pytest.raises(InputError, match=said) as caught:
        plan_of(tmp_path, recipe)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "store" / "rows").exists()


def test_an_expert_that_prepares_pictures_in_another_way(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "blues", backend="pil")
    processor.image_mean = [0.4, 0.5, 0.5]
    processor.save_pretrained(tmp_path / "blues")
    said = r"^experts\.blues: .*preprocessor_config\.json: prepares .*: image_mean \(0\.4, 0\.5, 0\.5\) \(the base"
    with pytest.raises(InputError, match=said):
        plan_of(tmp_path, recipe)


def test_a_base_without_an_image_processor(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    (tmp_path / "base" / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"/base: no preprocessor_config\.json, which says how pictures become"):
        plan_of(tmp_path, recipe)


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ({"height": 16, "width": 16}, r"has the shape \(3, 16, 16\) behind .* ViTForImageClassification does not take"),
        ({"shortest_edge": 12}, r"row 0 .* has the shape \(3, 12, 16\) behind"),
        ({"height": 10**6, "width": 12}, r"preprocessor_config\.json: size\.height is 1000000; expected at most 8,192"),
    ],
)
def test_sizes_that_the_network_does_not_take(size: dict[str, int], said: str, tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    for name in ("base", *LABELS):
        processor = AutoImageProcessor.from_pretrained(tmp_path / name, backend="pil")
        processor.size = size
        processor.save_pretrained(tmp_path / name)
    with pytest.raises(InputError, match=said):
        plan_of(tmp_path, recipe)


def test_texts_and_pictures_in_one_recipe(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    recipe["tasks"]["blues"] |= {"kind": "classification"}
    with pytest.raises(InputError, match="tasks: a network reads texts or pictures, found both: reds pictures"):
        plan_of(tmp_path, recipe)


@pytest.mark.parametrize("network", ["dinov2", "convnext"])
def test_networks_in_bfloat16(network: str, tmp_path: Path) -> None:
    """Pixels are float32 whatever the dtype that networks run in."""
    recipe = make_recipe(network, tmp_path) | {"dtype": "bfloat16"}
    plan = plan_of(tmp_path, recipe)
    do_steps(plan)
    assert read_json(plan.artifact("evaluate", "se") / "routes.json")["identification"]["value"] == 1
    expert = AutoModelForImageClassification.from_pretrained(tmp_path / "reds")
    with torch.no_grad():
        expected = expert(pixel_values=pixels(plan, "reds")).logits
    certain = (expected[:, 0] - expected[:, 1]).abs() > 0.05
    records = read_json(plan.artifact("evaluate", "reds/reds") / "records.json")
    found = torch.tensor([one["prediction"] for one in records])
    assert certain.any()
    assert found[certain].tolist() == expected.argmax(-1)[certain].tolist()


def test_convolutions_whose_width_changes_are_not_run_in_parts(tmp_path: Path) -> None:
    recipe = make_recipe("convnext", tmp_path) | {"placement": "streamed"}
    with pytest.raises(InputError, match=r"ConvNextForImageClassification.* cannot be run in parts.*placement: whole"):
        plan_of(tmp_path, recipe)


def test_adapters_of_pictures(tmp_path: Path) -> None:
    """A LoRA adapter without a task type, whose head is in modules_to_save, on a base that is a bare trunk."""
    recipe = make_recipe("dinov2", tmp_path)
    network = AutoModelForImageClassification.from_pretrained(tmp_path / "base", num_labels=4)
    modules = {"target_modules": ["query", "q_proj", "value", "v_proj"], "modules_to_save": ["classifier"]}
    recipe["experts"]["blues"]["model"] = str(make_adapter(network, tmp_path / "lora", 3, **modules))
    plan = plan_of(tmp_path, recipe)
    do_steps(plan)
    with torch.no_grad():
        expected = network.eval()(pixel_values=pixels(plan, "blues")).logits.argmax(-1).tolist()
    records = read_json(plan.artifact("evaluate", "blues/blues") / "records.json")
    assert [one["prediction"] for one in records] == expected
    assert read_json(plan.artifact("evaluate", "se") / "routes.json")["identification"]["value"] == 1
