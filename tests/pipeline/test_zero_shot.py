"""Vision towers of CLIP without heads, from names of classes to scores of static and dynamic merges."""

import copy
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import CLIPModel, CLIPVisionModel

from sensmerge.pipeline.plan.plan import Plan
from sensmerge.pipeline.report import card
from sensmerge.tasks.artifacts import read_json
from sensmerge.tasks.dynamic.model import DynamicModel
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.zero_shot import CLIPZeroShotClassifier
from sensmerge.tasks.serving.scorer import _load_pyfunc
from sensmerge.tasks.serving.static_model import StaticModel, form_of
from tests.clips import ZERO_SHOT, expected_rows, make_clip, save_clip, save_vision
from tests.conftest import do_steps, make_adapter, plan_of
from tests.pictures import picture
from tests.pipeline.test_picture_rows import COLOURS, LABELS, assert_dynamic_is_materialised, pixels, write_parquet
from tests.pipeline.test_picture_rows import rows_of as picture_rows

EXPERTS = {"reds": 1, "blues": 2}
"""By expert, the seed of its fine-tuning."""


def make_recipe(folder: Path) -> dict[str, Any]:
    """The base is a whole CLIP, the experts are vision towers: one alone, one with a projection of its own."""
    save_clip(make_clip(), folder / "base")
    tasks = {}
    for name, seed in EXPERTS.items():
        save_vision(make_clip(seed), folder / name, with_projection=name == "blues")
        write_parquet(folder / f"{name}.parquet", picture_rows(name, range(6)))
        write_parquet(folder / f"{name}-test.parquet", picture_rows(name, range(6, 16)))
        tasks[name] = {
            "kind": "image_classification",
            "zero_shot": ZERO_SHOT[name],
            "calibration": {"path": "parquet", "data_files": f"{name}.parquet"},
            "evaluation": {"path": "parquet", "data_files": f"{name}-test.parquet"},
        }
    return {
        "name": "clips",
        "base": str(folder / "base"),
        "experts": {name: {"model": str(folder / name)} for name in EXPERTS},
        "tasks": tasks,
        "merges": {
            "ta": {"method": "task_arithmetic", "weight": 0.5},
            "sens": {"method": "task_arithmetic", "coefficients": {"kind": "sens"}},
            "se": {"method": "task_arithmetic", "weight": 0.5, "application": {"kind": "se", "mass": 1.0}},
        },
    }


def expert_of(name: str, clip: CLIPModel, texts: CLIPModel) -> CLIPZeroShotClassifier:
    """A zero-shot classifier put together by hand: a vision tower, and rows by a text tower."""
    rows = expected_rows(texts, **ZERO_SHOT[name])
    config = clip.config.vision_config
    config.projection_dim, config.num_labels = rows.shape[1], len(rows)
    network = CLIPZeroShotClassifier(config).eval()
    projection = (clip if name == "blues" else texts).visual_projection.weight
    own = {f"vision_model.{key}": one for key, one in clip.vision_model.state_dict().items()}
    network.load_state_dict(own | {"visual_projection.weight": projection, "classifier.weight": rows})
    return network


@pytest.fixture(scope="module")
def experts() -> dict[str, CLIPZeroShotClassifier]:
    return {name: expert_of(name, make_clip(seed), make_clip()) for name, seed in EXPERTS.items()}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("clips")
    made = plan_of(folder, make_recipe(folder))
    do_steps(made)
    return made


def test_base_and_experts_are_scored(plan: Plan, experts: dict[str, CLIPZeroShotClassifier]) -> None:
    assert [step.name for step in plan.steps if step.stage == "heads"] == list(EXPERTS)
    for task in LABELS:
        for model in ("base", *EXPERTS):
            network = expert_of(task, make_clip(EXPERTS.get(model, 0)), make_clip())
            network.visual_projection.weight.data = experts[task].visual_projection.weight.data
            with torch.no_grad():
                expected = network(pixel_values=pixels(plan, task)).logits.argmax(-1).tolist()
            records = read_json(plan.artifact("evaluate", f"{model}/{task}") / "records.json")
            assert [one["prediction"] for one in records] == expected
            assert [one["label"] for one in records] == [number % LABELS[task] for number in range(6, 16)]


def test_a_merge_is_a_vision_tower_with_heads_beside_it(plan: Plan, experts: dict[str, CLIPZeroShotClassifier]) -> None:
    folder = plan.artifact("merge", "ta")
    merged = CLIPVisionModel.from_pretrained(folder).state_dict()
    own = [one.vision_model.state_dict() for one in experts.values()]
    assert merged.keys() == own[0].keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, (own[0][name] + own[1][name]) / 2, atol=1e-6, rtol=0)
    assert form_of(folder) == "trunk"
    model = StaticModel.load(folder)
    for task, expert in experts.items():
        network = copy.deepcopy(expert)
        network.vision_model.load_state_dict(merged)
        given = pixels(plan, task)
        with torch.no_grad():
            expected, found = (one(pixel_values=given).logits for one in (network, model.networks[task]))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        files = [picture(number, COLOURS[task]) for number in range(6, 16)]
        answers = [ZERO_SHOT[task]["classes"][number] for number in expected.argmax(-1)]
        assert model.predict(files, task=task) == answers
        served = _load_pyfunc(str(folder)).predict(pd.DataFrame({"image": files}), {"task": task})
        assert served["prediction"].tolist() == answers
        # The code of the model card, as a user would paste it.
        code = card._heads_text([task], "CLIPZeroShotClassifier").split("```python\n")[1].split("```")[0]
        names: dict[str, Any] = {}
        exec(code.replace("FOLDER", str(folder)), names)
        torch.testing.assert_close(names["logits"](given), expected, atol=1e-5, rtol=1e-5)
    weights = read_json(plan.artifact("merge", "sens") / "coefficients.json")["weights"]
    assert all(sum(row.values()) == pytest.approx(2) for row in weights.values())


def test_a_dynamic_merge_is_the_mixture_of_its_experts(plan: Plan, experts: dict[str, CLIPZeroShotClassifier]) -> None:
    assert_dynamic_is_materialised(plan, list(experts.values()))
    scores = read_json(plan.artifact("evaluate", "se") / "scores.json")
    assert scores["blues"].keys() >= {"accuracy", "routed_accuracy"}
    files = [picture(number, COLOURS["reds"]) for number in range(6, 9)]
    for one in DynamicModel.load(plan.artifact("route", "se")).predict(files):
        assert one.prediction in ZERO_SHOT[one.expert]["classes"]


def test_other_names_of_classes_make_other_heads_alone(plan: Plan) -> None:
    folder = plan.store.root.parent
    recipe = make_recipe(folder)
    recipe["tasks"]["reds"]["zero_shot"] = ZERO_SHOT["reds"] | {"classes": ["red", "dark"]}
    changed = plan_of(folder, recipe)
    assert "heads reds" in changed.todo
    assert "evaluate reds/reds" in changed.todo
    assert "merge ta" in changed.todo
    assert not {"heads blues", "evaluate blues/blues", "statistics blues"} & changed.todo.keys()


def test_an_expert_with_both_towers_has_heads_by_its_own(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    save_clip(make_clip(7), tmp_path / "whole")
    recipe["experts"]["blues"] = {"model": str(tmp_path / "whole")}
    plan = plan_of(tmp_path, recipe | {"merges": {"ta": {"method": "task_arithmetic", "weight": 0.5}}})
    do_steps(plan)
    network = expert_of("blues", make_clip(7), make_clip(7))
    with torch.no_grad():
        expected = network(pixel_values=pixels(plan, "blues")).logits.argmax(-1).tolist()
    records = read_json(plan.artifact("evaluate", "blues/blues") / "records.json")
    assert [one["prediction"] for one in records] == expected


def vision_alone(recipe: dict[str, Any], folder: Path) -> None:
    save_vision(make_clip(), folder / "tower")
    recipe["base"] = str(folder / "tower")


def adapted(recipe: dict[str, Any], folder: Path) -> None:
    tower = CLIPVisionModel.from_pretrained(save_vision(make_clip(), folder / "tower"))
    recipe["experts"]["reds"]["model"] = str(make_adapter(tower, folder / "lora", 1, target_modules=["q_proj"]))


def without_text(recipe: dict[str, Any], folder: Path) -> None:
    (folder / "base" / "tokenizer.json").unlink()


def headless(recipe: dict[str, Any], folder: Path) -> None:
    vision_alone(recipe, folder)
    recipe["experts"]["blues"]["config"] = "base"
    for task in recipe["tasks"].values():
        del task["zero_shot"]


def no_tasks(recipe: dict[str, Any], folder: Path) -> None:
    recipe["tasks"] = {}
    recipe["merges"] = {"ta": recipe["merges"]["ta"]}


def another_label(recipe: dict[str, Any], folder: Path) -> None:
    recipe["tasks"]["reds"]["zero_shot"] = recipe["tasks"]["blues"]["zero_shot"]
    recipe["tasks"]["blues"]["zero_shot"] = ZERO_SHOT["reds"]


def long_name(recipe: dict[str, Any], folder: Path) -> None:
    recipe["tasks"]["reds"]["zero_shot"] = ZERO_SHOT["reds"] | {"classes": ["sea", "sea " * 9]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (vision_alone, r"^tasks\.reds\.zero_shot: needs a text tower, and base: .*/tower is a vision tower alone"),
        (adapted, r"^experts\.reds: .*/lora is an adapter; zero_shot takes vision towers that are whole"),
        (without_text, r"^tasks\.reds\.zero_shot needs the tokenizer of a text tower; .*/base: no usable tokenizer"),
        (headless, r"^tasks\.reds\.kind: .*/reds is a CLIPVisionModel; expected .*zero_shot, which makes a head of"),
        (
            no_tasks,
            r"^experts\.reds: .* 'clip_vision_model', the base has 'clip'; .* or give the tasks zero_shot",
        ),
        (
            another_label,
            r"^row 2 of .*blues\.parquet.*: label is 2, expected one of the expert's 2 classes: 0 bri",
        ),
        (long_name, r"^tasks\.reds\.zero_shot: 'a photo of a sea .* has 16 tokens, and the text tower"),
    ],
)
def test_what_makes_no_head(change: Any, said: str, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    change(recipe, tmp_path)
    with pytest.raises(InputError, match=said) as caught:
        plan_of(tmp_path, recipe)
    assert "\n" not in str(caught.value)
