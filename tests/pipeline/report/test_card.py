"""The model card of a dynamic model, written by a run of a real recipe."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import tiny_recipe, write_recipe
from tests.here import run_here


@pytest.fixture(scope="module")
def finished(
    llamas: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, str]]:
    """The report of a recipe, and its cards by variant."""
    folder = tmp_path_factory.mktemp("cards")
    recipe = tiny_recipe(llamas, folder)
    # Two tasks with the same texts: any route is right on half of them.
    (folder / "code.jsonl").write_text((folder / "math.jsonl").read_text())
    trusted, doubted = ({"kind": "se", "score": "nearest", "fallback": fallback} for fallback in (0, 1))
    recipe["merges"] = {
        "static": {"method": "task_arithmetic", "weight": 0.5},
        "swept": {"method": "task_arithmetic", "weight": [0.4, 0.2]},
        "trusted": {"method": "task_arithmetic", "weight": 0.5, "application": trusted},
        "doubted": {"method": "task_arithmetic", "weight": 0.5, "application": doubted},
    }
    report = folder / "report.json"
    path = write_recipe(folder, recipe)
    assert run_here(path, "--store", folder / "store", "--report", report) == 0
    found = json.loads(report.read_text())
    variants = [name for name, role in found["roles"].items() if role == "variant"]
    cards = {name: (Path(found["models"][name]) / "README.md").read_text() for name in variants}
    return found, cards


def test_the_code_of_the_card_answers(
    finished: tuple[dict[str, Any], dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    report, cards = finished
    code = cards["trusted"].split("```python\n")[1].split("```")[0].replace("FOLDER", report["models"]["trusted"])
    exec(code, {})
    printed = capsys.readouterr().out
    assert len(re.findall(r"(?:math|code) \{'math': \d\.\d+(?:e-\d+)?, 'code': \d\.\d+(?:e-\d+)?\}", printed)) == 2


def test_the_cards_of_a_sweep_compare_its_variants(finished: tuple[dict[str, Any], dict[str, str]]) -> None:
    report, cards = finished
    (sweep,) = report["sweeps"].values()
    means = {name: report["mean_normalised"][name]["value"] for name in sweep["members"]}
    (other,) = set(means) - {sweep["best"]}
    assert sweep["members"] == {f"swept-weight-{weight}": {"weight": weight} for weight in (0.4, 0.2)}
    assert sweep["behind"][other]["value"] == pytest.approx(means[sweep["best"]] - means[other])
    further = "0.8, 1.6" if sweep["best"] == "swept-weight-0.4" else "0.1, 0.05"
    note = f"weight {sweep['members'][sweep['best']]['weight']:g} leads and is at the end of the sweep; add values "
    note += f"beyond it: {further}"
    if len({*means.values()}) == 1:
        note = "all of its variants score the same"
    for name, card in cards.items():
        assert (f"sweep swept: {sweep['best']} has the highest mean of 2; behind it: {other} " in card) == (
            name in means
        )
        assert (note in card) == (name in means)


def test_a_dynamic_model_is_not_said_to_load_as_a_transformers_model(
    finished: tuple[dict[str, Any], dict[str, str]],
) -> None:
    _, cards = finished
    for name in ("trusted", "doubted"):
        assert "library_name: sensmerge" in cards[name]
        assert "from_pretrained" not in cards[name]
        assert "## Heads" not in cards[name]
    assert "library_name: transformers" in cards["static"]
    assert "DynamicModel" not in cards["static"]
    assert "## Route" not in cards["static"]


def test_the_card_says_what_the_route_is_and_how_often_it_is_right(
    finished: tuple[dict[str, Any], dict[str, str]],
) -> None:
    report, cards = finished
    for name in ("trusted", "doubted"):
        route = report["routes"][name]
        assert f"`nearest`, output of block {route['rule']['layer']}" in cards[name]
        for key, what in (("calibration", "held-out calibration"), ("evaluation", "evaluation")):
            score = route[key]
            line = "- {} samples: {value:.3f} [{low:.3f}, {high:.3f}], n = {n}".format(what, **score)
            assert line in cards[name]
        assert route["evaluation"]["n"] == 12


def test_the_card_says_what_falls_back(finished: tuple[dict[str, Any], dict[str, str]]) -> None:
    _, cards = finished
    assert "followed fully" in cards["trusted"]
    assert "less than 100% of the held-out calibration samples" in cards["doubted"]
    assert "0% of each coefficient is the route's, 100% the static merge's" in cards["doubted"]
