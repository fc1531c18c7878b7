"""What MLflow serves: when a model has a lease, and what its process imports."""

from pathlib import Path
from typing import Any

import pytest

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.serving import scorer
from sensmerge.tasks.serving.lease import held
from tests.tasks.serving import test_static_model

static_writer = test_static_model.writer  # the same model serves here


def test_a_model_is_leased_before_it_is_loaded(
    static_writer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "merge" / "ta-12345678"
    folder.parent.mkdir()
    folder.symlink_to(static_writer)
    (static_writer / "manifest.json").touch()
    load, during = scorer.StaticModel.load, []

    def observed(*arguments: Any) -> Any:
        during.extend(held(str(tmp_path)))
        return load(*arguments)

    monkeypatch.setattr(scorer.StaticModel, "load", observed)
    served = scorer.Scorer(str(folder), "cpu", None)
    assert [one.artifact for one in during] == ["merge/ta-12345678"]
    assert len(held(str(tmp_path))) == 1
    del served


def test_a_model_that_cannot_be_loaded_keeps_no_lease(tmp_path: Path) -> None:
    folder = tmp_path / "merge" / "ta-12345678"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(InputError) as raised:
        scorer.Scorer(str(folder), "cpu", None)
    assert held(str(tmp_path)) == [], raised
