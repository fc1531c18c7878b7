"""Methods of other people: one that needs whole matrices, and one that reads a statistic of every expert."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from pydantic import Field, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from sensmerge.pipeline.recipe.schema import Recipe
from sensmerge.pipeline.recipe.variant import Variant
from sensmerge.tasks.artifacts import Artifact, write_json
from sensmerge.tasks.methods.contract import (
    METHODS,
    Additive,
    ElementsMethod,
    ForEachExpert,
    MatrixMethod,
    TaskVector,
    method_of,
)
from sensmerge.tasks.methods.table import methods_table
from sensmerge.tasks.stages.merge import MergeJob
from sensmerge.tasks.statistics.statistic import TENSORS
from tests.conftest import known
from tests.tasks.stages.test_merge import make_job, merged, weights_of


class TopRank(MatrixMethod):
    """Keeps the largest singular values of the mean task vector."""

    rank: int = Field(1, ge=1, description="how many singular values of each matrix are kept")

    def merge_matrix(self, base: Tensor, vectors: Sequence[TaskVector]) -> Tensor:
        mean = sum(vector.weight * vector.whole(base) for vector in vectors)
        if base.ndim != 2:
            return base + mean
        left, values, right = torch.linalg.svd(mean, full_matrices=False)
        return base + (left[:, : self.rank] * values[: self.rank]) @ right[: self.rank]


class Importance(ElementsMethod):
    """Mean of task vectors, weighted element by element by a statistic of each expert."""

    statistics: ClassVar[tuple[str, ...]] = ("importance",)

    power: ForEachExpert = Field(1.0, description="exponent of the statistic; one number or one per expert")

    def parts(self, base: Tensor, vectors: Sequence[TaskVector]) -> Iterator[tuple[slice, Tensor]]:
        found = [vector.statistic("importance").flatten() for vector in vectors]
        for where, parts in super().parts(base, vectors):
            scores = torch.stack([one[where] for one in found])
            yield where, parts * scores / scores.sum(0)

    def merge_elements(self, base: Tensor, parts: Tensor, weights: Sequence[float]) -> Tensor:
        return base.float() + torch.tensor(weights) @ parts


class WrongShape(MatrixMethod):
    """Loses the last row."""

    def merge_matrix(self, base: Tensor, vectors: Sequence[TaskVector]) -> Tensor:
        return base[:-1]


class Heavy(WrongShape):
    """Has a setting that every variant has."""

    weight: float = 2.0


OWN = {"top_rank": TopRank, "importance": Importance, "wrong_shape": WrongShape, "heavy": Heavy}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """The methods above are known during a test."""
    with known(METHODS, **OWN):
        yield


@pytest.fixture
def job(llamas: dict[str, Path], tmp_path: Path) -> Callable[..., MergeJob]:
    experts = {name: llamas[name] for name in ("math", "code")}
    return lambda *args, **changes: make_job(tmp_path, llamas["base"], experts, *args, **changes)


def tensors_of(one: MergeJob) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Base, and task vectors by expert."""
    base = weights_of(one.base.folder)
    tuned = {name: weights_of(expert.folder) for name, expert in one.experts.items()}
    return base, {name: {key: own[key] - base[key] for key in base} for name, own in tuned.items()}


def test_a_method_that_needs_whole_matrices(job: Callable[..., MergeJob], tmp_path: Path) -> None:
    one = job("top_rank", {"rank": 2}, weight=0.4)
    merged(one, tmp_path / "out")
    base, deltas = tensors_of(one)
    for name, tensor in weights_of(tmp_path / "out").items():
        added = 0.4 * (deltas["math"][name] + deltas["code"][name])
        change = tensor - base[name]
        if added.ndim == 2:
            values = torch.linalg.svdvals(added.double())
            assert torch.linalg.matrix_rank(change, rtol=1e-3) == 2
            # Eckart and Young: no matrix of the rank is nearer.
            distance = torch.linalg.matrix_norm(change.double() - added.double())
            torch.testing.assert_close(distance, values[2:].norm(), rtol=1e-4, atol=1e-6)
        else:
            torch.testing.assert_close(change, added, rtol=1e-5, atol=1e-6)


def test_a_method_that_needs_a_statistic(job: Callable[..., MergeJob], tmp_path: Path) -> None:
    artifacts, scores = {}, {}
    for seed, name in enumerate(("math", "code")):
        generator = torch.Generator().manual_seed(seed)
        base = weights_of(job().base.folder)
        scores[name] = {key: torch.rand(one.shape, generator=generator) + 0.1 for key, one in base.items()}
        artifacts[name] = Artifact(name, tmp_path / f"importance-{name}")
        artifacts[name].folder.mkdir()
        save_file(scores[name], artifacts[name].folder / "all.safetensors")
        places = {key: {"file": "all.safetensors", "key": key} for key in scores[name]}
        write_json(artifacts[name].folder / "importance.json", {TENSORS: places})
    one = job("importance", statistics=artifacts)
    merged(one, tmp_path / "out")
    base, deltas = tensors_of(one)
    for name, tensor in weights_of(tmp_path / "out").items():
        total = scores["math"][name] + scores["code"][name]
        mean = sum(scores[key][name] / total * deltas[key][name] for key in deltas)
        torch.testing.assert_close(tensor, base[name] + 0.5 * mean)
    # Another statistic makes all anew.
    anew = artifacts | {"math": replace(artifacts["math"], fingerprint="anew")}
    other = replace(one, previous=tmp_path / "out", statistics=anew)
    assert one.identity() != other.identity()
    assert merged(other, tmp_path / "other")["taken_over"] == 0
    assert merged(replace(one, previous=tmp_path / "out"), tmp_path / "same")["taken_over"] == len(base)


def test_a_result_of_another_shape_is_no_merge(job: Callable[..., MergeJob], tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"method wrong_shape: merge_matrix returned torch\.float32 \(\d+, \d+\)"):
        merged(job("wrong_shape"), tmp_path / "out")


def test_a_setting_that_every_variant_has_is_no_methods_own() -> None:
    with pytest.raises(TypeError, match="method heavy has a setting weight, as every variant has; it needs another"):
        Variant.model_validate({"method": "heavy", "weight": 0.5})


def test_identity_is_the_methods_name_and_settings(job: Callable[..., MergeJob]) -> None:
    assert job("top_rank", {"rank": 3}).identity()["method"] == {"name": "top_rank", "rank": 3}
    assert job("top_rank", {"rank": 2}).identity() != job("top_rank", {"rank": 3}).identity()
    assert job("linear").identity() != job("task_arithmetic").identity()


def test_identity_holds_no_path(job: Callable[..., MergeJob], tmp_path: Path) -> None:
    one = job("ties", {"density": {"math": 0.3, "code": 0.5}})
    assert str(tmp_path) not in json.dumps(one.identity())
    moved = replace(one, tokenizer=tmp_path, previous=tmp_path, groups=one.groups[:1])
    assert moved.identity() == one.identity()


def test_recipes_and_their_schema_know_the_settings() -> None:
    variant = Variant.model_validate({"method": "top_rank", "rank": 2, "weight": 0.5})
    assert variant.method == method_of({"method": "top_rank", "rank": 2})
    assert variant.params()["rank"] == "2"
    properties = Recipe.model_json_schema()["$defs"]["Variant"]["properties"]
    assert properties["rank"]["description"].endswith("are kept; only for top_rank")
    assert properties["power"]["default"] == 1.0
    assert "top_rank" in properties["method"]["enum"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "top_rank", "rank": 0}, r"rank\n.*greater than or equal to 1"),
        ({"method": "ties", "rank": 1}, "rank has no meaning for method ties; leave it out"),
        ({"method": "top_rank", "density": 0.5}, "density has no meaning for method top_rank; leave it out"),
        (
            {"method": "top_rank", "application": {"kind": "se", "origin": "base"}},
            "method top_rank has no application se from the base: what one expert adds cannot be separated",
        ),
    ],
)
def test_what_a_recipe_may_not_say(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Variant.model_validate(settings)


def test_settings_per_expert_name_every_expert() -> None:
    recipe: dict[str, Any] = {"name": "r", "base": "b", "experts": {"x": {"model": "m"}, "y": {"model": "n"}}}
    with pytest.raises(ValidationError, match=r"merges\.i\.power: found x; expected every expert once: x, y"):
        Recipe.model_validate({**recipe, "merges": {"i": {"method": "importance", "power": {"x": 2.0}}}})


def test_a_statistic_needs_calibration_sets() -> None:
    recipe: dict[str, Any] = {"name": "r", "base": "b", "experts": {"x": {"model": "m"}, "y": {"model": "n"}}}
    recipe["merges"] = {"i": {"method": "importance"}}
    with pytest.raises(ValidationError, match=r"merges\.i: method importance needs tasks\.x\.calibration; add it"):
        Recipe.model_validate(recipe)
    # Classifiers and others need not be compared.
    task = {"calibration": {"path": "json", "data_files": "rows.jsonl"}}
    recipe["tasks"] = {"x": {"kind": "completion", **task}, "y": {"kind": "classification", **task}}
    Recipe.model_validate(recipe)


def test_the_table_says_what_methods_need() -> None:
    lines = {line.split("`")[1]: line for line in methods_table().splitlines()[2:]}
    assert list(lines) == list(METHODS)
    assert (
        "| 2 or more | whole tensors | `rank: 1` | no | no | yes | from static merge; not from base: what"
        in lines["top_rank"]
    )
    assert "| elements, in pieces, the statistic `importance` of each expert | `power: 1.0` |" in lines["importance"]
    assert "`seed: 0` | yes, from `seed` | yes | yes | from base or static merge |" in lines["dare_ties"]
    assert (
        "| 1 | pieces, after a look through the whole tensor | `t` (required) | no | no | no: t says" in lines["slerp"]
    )
    assert lines["slerp"].endswith("| no: there is one expert |")
    assert "| no: the mean squares of the task vectors are the experts' weights | from static merge;" in lines["sce"]
    assert "| 2 | pieces" in lines["nuslerp"]


def recipe_of(experts: int, **variant: Any) -> dict[str, Any]:
    named = {f"e{k}": {"model": f"m{k}"} for k in range(experts)}
    return {"name": "r", "base": "b", "experts": named, "merges": {"one": variant}}


@pytest.mark.parametrize(
    ("experts", "variant", "message"),
    [
        (
            2,
            {"method": "slerp", "t": 0.5},
            r"experts: found 2; expected exactly one expert by method slerp \(merges.one\)",
        ),
        (2, {"method": "nearswap", "t": 0.1}, "experts: found 2; expected exactly one expert by method nearswap"),
        (3, {"method": "nuslerp"}, "experts: found 3; expected exactly two experts by method nuslerp"),
        (1, {"method": "nuslerp"}, "experts: found 1; expected exactly two experts by method nuslerp"),
        (
            1,
            {"method": "model_stock"},
            "experts: found 1; expected at least two experts to merge by method model_stock",
        ),
        (2, {"method": "passthrough"}, "experts: found 2; expected exactly one expert by method passthrough"),
        (
            2,
            {"method": "sce", "weight": 0.5},
            "weight has no meaning for method sce: the mean squares of the task vectors",
        ),
        (
            2,
            {"method": "ram", "coefficients": {"kind": "sens"}},
            "coefficients has no meaning for method ram: all experts",
        ),
        (
            2,
            {"method": "karcher", "coefficients": {"kind": "explicit", "weights": {"e0": 1, "e1": 2}}},
            "coefficients has no meaning for method karcher: its mean counts all experts equally; leave it out",
        ),
        (2, {"method": "sce", "weight": "auto"}, "tune.weight: sce with these settings gives the same merge for every"),
        (
            2,
            {"method": "nuslerp", "tune": {"weight": [0.1, 1]}},
            "tune.weight: nuslerp with these settings gives the same",
        ),
        (
            2,
            {"method": "multislerp", "weight": "auto"},
            "tune.weight: multislerp with these settings gives the same merge",
        ),
        (2, {"method": "model_stock", "lines": {"first": 0.1}}, "does not scale what method model_stock adds"),
        (1, {"method": "slerp"}, "t\n.*Field required"),
        (1, {"method": "slerp", "t": 1.5}, "t\n.*less than or equal to 1"),
        (
            1,
            {"method": "slerp", "t": 0.5, "application": {"kind": "se"}},
            "application se chooses between experts, and method slerp has one; leave it out",
        ),
        (
            2,
            {"method": "ram", "application": {"kind": "se", "origin": "base"}},
            "method ram has no application se from the base: what one expert alone adds is in the merge whole",
        ),
    ],
)
def test_what_methods_say_of_experts_weights_and_applications(
    experts: int, variant: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate(recipe_of(experts, **variant))


@pytest.mark.parametrize(
    ("experts", "variant"),
    [
        (1, {"method": "slerp", "t": 0.5, "weight": 1.0}),
        (1, {"method": "passthrough"}),
        (2, {"method": "nuslerp", "coefficients": {"kind": "explicit", "weights": {"e0": 1, "e1": 2}}}),
        (2, {"method": "multislerp", "normalize_weights": False, "lines": {"first": 0.1}}),
        (4, {"method": "sce", "select_topk": 0.1}),
    ],
)
def test_what_methods_take(experts: int, variant: dict[str, Any]) -> None:
    Recipe.model_validate(recipe_of(experts, **variant))


def test_weights_of_multislerp_that_cancel_are_refused_by_name() -> None:
    weights = {"kind": "explicit", "weights": {"e0": 1, "e1": -1}}
    with pytest.raises(ValidationError, match=r"merges\.one: the weights sum to 0, which multislerp divides by"):
        Recipe.model_validate(recipe_of(2, method="multislerp", coefficients=weights))


def test_every_method_says_what_it_goes_with() -> None:
    for method in METHODS.values():
        assert bool(method.no_weights) <= (not method.weights)
        assert method.most_experts is None or method.most_experts >= method.least_experts >= 1
        assert issubclass(method, Additive) or method.no_se


class RankByName(TopRank):
    """Has a setting of a name that another method has, of another type."""

    rank: Literal["full", "half"] = Field("full", description="how many singular values of each matrix are kept")


def test_settings_of_one_name_may_have_several_types() -> None:
    with known(METHODS, rank_by_name=RankByName):
        rank = Recipe.model_json_schema()["$defs"]["Variant"]["properties"]["rank"]
        assert {one["type"] for one in rank["anyOf"]} == {"integer", "string"}
