import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest
import torch

from sensmerge.tasks.identity import Added, For, Local, Only, identity
from sensmerge.tasks.kinds.classification import ClassificationTask
from sensmerge.tasks.methods.contract import ForEachExpert
from sensmerge.tasks.strict import Strict


class Settings(Strict):
    weight: float = 1.0
    batch_size: Local[int] = 8
    loss: Annotated[str, Only("calibration")] = "all"
    metric: Annotated[str, Only("evaluation")] = "accuracy"


@dataclass(frozen=True)
class Work:
    settings: Settings
    calibrated: Annotated[Settings, For("calibration")]
    folder: Local[Path]
    names: tuple[str, ...] = ()


def test_fields_count_but_those_that_are_local() -> None:
    found = identity(Work(Settings(), Settings(), Path("anywhere"), ("b", "a")))
    assert found == {
        "settings": {"weight": 1.0, "loss": "all", "metric": "accuracy"},
        "calibrated": {"weight": 1.0, "loss": "all"},
        "names": ["b", "a"],
    }


@dataclass(frozen=True)
class Versioned:
    version: ClassVar[int] = 2
    weight: float = 1.0


def test_the_version_of_a_class_counts() -> None:
    assert identity(Versioned()) == {"version": 2, "weight": 1.0}


def test_first_versions_add_nothing_so_that_champions_of_before_stay_comparable() -> None:
    task = ClassificationTask(kind="classification")
    assert task.version == 1
    assert identity(task, "evaluation") == {
        "kind": "classification",
        "prompt": "{text}",
        "label": "label",
        "max_length": 512,
    }


class Grown(Strict):
    weight: float = 1.0
    prefix: Added[str | None] = None


def test_a_field_that_came_later_adds_nothing_where_it_is_none() -> None:
    assert identity(Grown()) == {"weight": 1.0}
    assert identity(Grown(prefix="")) == {"weight": 1.0, "prefix": ""}


def test_a_mark_that_has_travelled_to_another_process_is_the_same() -> None:
    """Classes of notebooks are sent by value, and their marks with them."""
    for marked in (Local[int], Added[int | None], ForEachExpert):
        (mark,) = marked.__metadata__
        assert pickle.loads(pickle.dumps(mark)) in marked.__metadata__


def test_settings_of_one_use() -> None:
    assert identity(Settings(), "evaluation") == {"weight": 1.0, "metric": "accuracy"}


def test_the_order_of_keys_counts() -> None:
    assert list(identity({"b": 1, "a": 2})) == ["b", "a"]
    assert identity({"b", "a"}) == ["a", "b"]


@pytest.mark.parametrize(
    "value", [Path("folder"), torch.float32, torch.zeros(1), object(), float("nan"), {1: 2}, Settings, b"bytes"]
)
def test_what_has_no_stable_form_is_refused_by_name(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^names\[0\]: .* has no stable form"):
        identity(Work(Settings(), Settings(), Path(), (value,)))
