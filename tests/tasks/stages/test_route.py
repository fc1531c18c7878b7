"""Stage route: what it chooses, what it reports, and what it leaves alone."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sensmerge.tasks.artifacts import read_json, sha256_file
from sensmerge.tasks.dynamic.model import DynamicModel
from sensmerge.tasks.dynamic.router import searched_layers
from sensmerge.tasks.errors import InputError
from tests.conftest import row_set
from tests.tasks.dynamic import test_model as models
from tests.tasks.dynamic.test_model import CALIBRATION, TEXTS, Merge, completions, tokenised

# The same two merges serve here.
llama_experts, causal, encoders = models.llama_experts, models.causal, models.encoders

Save = Callable[..., Path]


def test_auto_looks_at_all_rules_and_takes_a_cheap_good_one(causal: Merge, tmp_path: Path) -> None:
    found = causal.run(tmp_path)
    report = read_json(tmp_path / "route.json")
    rules = {tuple(one[key] for key in ("score", "layer", "pool")) for one in report["candidates"]}
    assert len(rules) == len(report["candidates"]) == 5 * len(searched_layers(2)) * 3
    count = sum(len(one.rows.read()) for one in CALIBRATION.values())
    best = max(one["accuracy"] for one in report["candidates"])
    (chosen,) = (one for one in report["candidates"] if found["rule"].items() <= one.items())
    share = (best * count + 1) / (count + 2)
    error = (share * (1 - share) / count) ** 0.5
    good = [one for one in report["candidates"] if one["accuracy"] >= best - error]
    assert chosen in good
    assert found["passes"] == chosen["passes"] == min(one["passes"] for one in good)


@pytest.mark.parametrize("settings", [{}, {"score": "nearest", "layer": 1, "pool": "last"}, {"metric": "cosine"}])
def test_report(settings: dict[str, Any], causal: Merge, tmp_path: Path) -> None:
    found = causal.run(tmp_path, **settings)
    report = read_json(tmp_path / "route.json")
    assert all(found["rule"][key] == value for key, value in settings.items())
    confusion = report["confusion"]
    assert {task: sum(row.values()) for task, row in confusion.items()} == dict.fromkeys(CALIBRATION, 4)
    right = sum(confusion[task][task] for task in confusion)
    assert report["identification"]["n"] == 12
    assert report["identification"]["value"] == pytest.approx(right / 12)
    assert report["identification"] == found["identification"]
    assert {task: len(points) for task, points in report["projection"].items()} == dict.fromkeys(CALIBRATION, 4)
    assert all(len(point) == 2 for points in report["projection"].values() for point in points)
    assert found["bytes"] == sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))


def test_the_projection_is_that_of_scikit_learn(causal: Merge, tmp_path: Path) -> None:
    from sklearn.decomposition import PCA

    model = causal.routed(tmp_path, score="centroid", layer=1, pool="mean")
    with torch.inference_mode():
        states = [
            model.network.hidden_states(model.batch([sample]), torch.zeros(1, 3), [1])[1][0].mean(0)
            for one in CALIBRATION.values()
            for sample in tokenised(model, [row["prompt"] for row in one.rows.read()])
        ]
    expected = torch.tensor(PCA(2).fit_transform(torch.stack(states).double().numpy()))
    points = torch.tensor([point for row in read_json(tmp_path / "route.json")["projection"].values() for point in row])
    # Up to the order of a task's samples and the signs of the axes.
    found, wanted = points.abs().sort(0).values, expected.abs().float().sort(0).values
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_poor_identification_draws_towards_the_static_merge(causal: Merge, tmp_path: Path) -> None:
    # Calibration sets that are the same cannot be told apart.
    same = replace(causal, calibration=dict.fromkeys(causal.calibration, completions("1+1=", "2+3=", "4+4=")))
    settings: dict[str, Any] = {"score": "nearest", "layer": 1, "pool": "mean", "temperature": 0.01, "mass": 2.0}
    found = same.run(tmp_path / "out", **settings, fallback=0.8)
    assert found["identification"]["value"] == pytest.approx(1 / 3)
    assert found["trust"] == 0.0
    model = DynamicModel.load(tmp_path / "out")
    samples = tokenised(model, TEXTS)
    torch.testing.assert_close(model.route(samples).coefficients, torch.full((len(TEXTS), 3), 0.5))
    followed = same.routed(tmp_path / "never", **settings, fallback=0.0)
    assert followed.router.settings.trust == 1.0
    torch.testing.assert_close(followed.route(samples).coefficients.sum(1), torch.full((len(TEXTS),), 2.0))


def test_half_trust_is_between_static_and_routed(causal: Merge, tmp_path: Path) -> None:
    # Two of the three sets are the same: two thirds of the samples, or fewer, are told apart.
    sets = {**causal.calibration, "lora": causal.calibration["code"]}
    sets = {name: row_set(one.task, one.rows.read() * 8) for name, one in sets.items()}
    one = replace(causal, calibration=sets)
    settings: dict[str, Any] = {"score": "centroid", "layer": 1, "pool": "mean", "temperature": 0.1}
    found = one.run(tmp_path / "out", **settings, fallback=0.9)
    accuracy = found["identification"]["low"]
    assert 1 / 3 < accuracy < 0.9
    assert found["trust"] == pytest.approx((accuracy - 1 / 3) / (0.9 - 1 / 3))
    drawn, full = DynamicModel.load(tmp_path / "out"), one.routed(tmp_path / "full", **settings)
    samples = tokenised(drawn, TEXTS)
    routed, mixed = full.route(samples), drawn.route(samples)
    expected = found["trust"] * routed.coefficients + (1 - found["trust"]) * 0.5
    torch.testing.assert_close(mixed.coefficients, expected)
    assert mixed.experts == routed.experts


def test_mass_is_that_of_the_static_merge_if_left_out(causal: Merge, tmp_path: Path) -> None:
    assert causal.routed(tmp_path / "static").router.settings.mass == pytest.approx(3 * 0.5)
    assert causal.routed(tmp_path / "own", mass=0.7).router.settings.mass == 0.7


def digests(folder: Path) -> dict[Path, str]:
    return {path: sha256_file(path) for path in folder.rglob("*") if path.is_file()}


def test_the_merge_is_left_as_it_is_and_not_needed_afterwards(encoders: Merge, tmp_path: Path) -> None:
    own = replace(encoders, folder=Path(shutil.copytree(encoders.folder, tmp_path / "merge")))
    before = digests(own.folder)
    for name in ("one", "two"):
        own.run(tmp_path / name, temperature=0.1 if name == "one" else 0.5)
    shutil.rmtree(tmp_path / "one")
    assert digests(own.folder) == before
    shutil.rmtree(own.folder)
    assert len(DynamicModel.load(tmp_path / "two").predict(["good", "12"])) == 2


def test_files_are_copied_where_there_are_no_links(
    encoders: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("cross-device link")

    linked = encoders.run(tmp_path / "linked")
    monkeypatch.setattr("os.link", refuse)
    copied = encoders.run(tmp_path / "copied")
    assert (tmp_path / "linked/base/model.safetensors").stat().st_nlink > 1
    assert (tmp_path / "copied/base/model.safetensors").stat().st_nlink == 1
    assert copied == linked
    DynamicModel.load(tmp_path / "copied")


def test_equal_settings_give_equal_digests_and_others_do_not(encoders: Merge, tmp_path: Path) -> None:
    found = [
        encoders.run(tmp_path / str(number), **settings)["digest"]
        for number, settings in enumerate([{}, {}, {"temperature": 0.2}, {"mass": 0.4}, {"score": "shift"}])
    ]
    assert found[0] == found[1]
    assert len(set(found)) == 4


def test_a_layer_that_does_not_exist(causal: Merge, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="layer is 3; the model has 2 blocks, 1 to 2"):
        causal.run(tmp_path, layer=3)


def test_completions_are_not_routed_on(causal: Merge, tmp_path: Path) -> None:
    """At inference there is none to look at."""
    longer = {
        name: row_set(one.task, [{**row, "completion": f"{name} and more"} for row in one.rows.read()])
        for name, one in causal.calibration.items()
    }
    found = replace(causal, calibration=longer).run(tmp_path / "longer")
    assert found["digest"] == causal.run(tmp_path / "plain")["digest"]
