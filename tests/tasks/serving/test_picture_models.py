"""Merged models that answer pictures, in this process and as MLflow's pyfunc calls them."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException

from sensmerge.pipeline.plan.plan import Plan
from sensmerge.tasks.dynamic.model import DynamicModel
from sensmerge.tasks.serving.scorer import _load_pyfunc
from sensmerge.tasks.serving.static_model import StaticModel, form_of, reads_of
from tests.conftest import do_steps, plan_of
from tests.pictures import CLASSIFIERS, in_base64, picture, pixels_of, save_model
from tests.pipeline.test_picture_rows import COLOURS, LABELS, make_recipe

FILES = [picture(number, COLOURS[name]) for name in LABELS for number in range(30, 34)]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("pictures")
    recipe = make_recipe("dinov2", folder)
    recipe["merges"] = {name: recipe["merges"][name] for name in ("ta", "se")}
    made = plan_of(folder, recipe)
    do_steps(made)
    return made


def answers(model: StaticModel, task: str) -> list[str]:
    """What the network says of the pixels, by the formula."""
    network = model.networks[task]
    with torch.no_grad():
        classes = network(pixel_values=torch.stack([pixels_of(file) for file in FILES])).logits.argmax(-1)
    return [network.config.id2label[int(one)] for one in classes]


def test_a_trunk_answers_with_the_head_of_the_task_that_is_named(plan: Plan) -> None:
    folder = plan.artifact("merge", "ta")
    assert form_of(folder) == "trunk"
    assert reads_of(folder, folder) == "pictures"
    model = StaticModel.load(folder)
    for task in LABELS:
        assert model.predict(FILES, task=task) == answers(model, task)
    served = _load_pyfunc(str(folder))
    table = pd.DataFrame({"image": [in_base64(file) for file in FILES], "id": range(len(FILES))})
    assert served.predict(table, {"task": "blues"})["prediction"].tolist() == answers(model, "blues")


def test_a_dynamic_model_finds_the_expert_of_each_picture(plan: Plan, tmp_path: Path) -> None:
    folder = plan.artifact("route", "se")
    found = DynamicModel.load(folder).predict(FILES)
    assert [one.expert for one in found] == [name for name in LABELS for _ in range(4)]
    for number, file in enumerate(FILES):
        (tmp_path / f"{number}.png").write_bytes(file)
    ways = {
        "bytes": (_load_pyfunc(str(folder)), FILES),
        "base64": (_load_pyfunc(str(folder)), [in_base64(file) for file in FILES]),
        "paths": (
            _load_pyfunc(str(folder), {"pictures": str(tmp_path)}),
            [f"{number}.png" for number in range(len(FILES))],
        ),
    }
    for served, given in ways.values():
        table = served.predict(pd.DataFrame({"image": given}))
        assert table["prediction"].tolist() == [one.prediction for one in found]
        assert table["expert"].tolist() == [one.expert for one in found]


def test_a_classifier_that_is_merged_with_its_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = save_model(CLASSIFIERS["vit"][1](3), tmp_path / "whole")
    assert form_of(folder) == "picture_classifier"
    model = StaticModel.load(folder)
    assert model.predict(FILES) == answers(model, "")


def test_what_a_served_model_refuses(plan: Plan) -> None:
    served = _load_pyfunc(str(plan.artifact("route", "se")))
    with pytest.raises(MlflowException, match="found the columns text; expected a column image"):
        served.predict(pd.DataFrame({"text": ["1+1="]}))
    with pytest.raises(MlflowException, match="found a single image; expected a DataFrame with a column image"):
        served.predict(FILES[0])
    with pytest.raises(MlflowException, match=r"^row 1: the picture is '/etc/a\.png'; expected the picture's bytes"):
        served.predict([FILES[0], "/etc/a.png"])
    with pytest.raises(MlflowException, match="picture 1 is 4 bytes that begin with b'none'; expected a picture"):
        served.predict([FILES[0], b"none"])
