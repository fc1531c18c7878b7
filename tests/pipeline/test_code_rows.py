"""Programs from rows to scores: what `plan` refuses and says, and a whole run of it."""

from pathlib import Path
from typing import Any

import pytest

from sensmerge.pipeline.report.results import outcomes
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.code import CodeTask
from sensmerge.tasks.sandbox.sandbox import missing_isolation
from tests.conftest import do_steps, plan_of, write_rows

pytestmark = pytest.mark.skipif(missing_isolation() is not None, reason="the machine isolates no processes")

Recipe = dict[str, Any]


@pytest.fixture
def recipe(llama_recipe: Recipe, tmp_path: Path) -> Recipe:
    """The task `code` of the tiny Llamas with tests that an answer of any kind passes, or none."""
    for file, first in (("programs.jsonl", 0), ("programs-test.jsonl", 50)):
        rows = [
            {"prompt": f"{i}+{i}=", "completion": f"{2 * i}", "tests": ["assert True" if i % 2 else "assert f(1) == 2"]}
            for i in range(first, first + 4)
        ]
        write_rows(tmp_path / file, rows)
    llama_recipe["tasks"]["code"] = {
        "kind": "code",
        "run_untrusted_code": True,
        "calibration": {"path": "json", "data_files": "programs.jsonl"},
        "evaluation": {"path": "json", "data_files": "programs-test.jsonl"},
        "test_list": "tests",
        "generate": 4,
        "timeout": 5,
    }
    return llama_recipe


def test_a_plan_says_how_programs_are_kept_apart(recipe: Recipe, tmp_path: Path) -> None:
    notes = plan_of(tmp_path, recipe).inputs.notes
    assert "tasks.code: programs run without network, files and other processes (namespaces), within limits" in notes
    recipe["tasks"]["code"]["run_untrusted_code"] = False
    with pytest.raises(InputError, match=r"^tasks\.code\.run_untrusted_code is false, and kind code runs programs"):
        plan_of(tmp_path, recipe)


def test_models_are_merged_and_scored_by_tests(recipe: Recipe, tmp_path: Path) -> None:
    recipe["merges"]["ta-se"] = {"method": "task_arithmetic", "weight": 0.5, "application": {"kind": "se"}}
    plan = plan_of(tmp_path, recipe)
    do_steps(plan)
    scored = {model: found["code"] for model, found in outcomes(plan).items()}
    assert set(scored) == {"ta", "ties-sens", "ta-se"}
    for one in scored.values():
        assert [record["passed"] for record in one.records] == [0, 1, 0, 1]
        assert one.records[1]["outcome"] == "passed"
        score = CodeTask.scores(one.records)["pass_at_1"]
        assert (score.value, score.n, one.metric) == (0.5, 4, "pass_at_1")
    recipe["tasks"]["code"]["isolation"] = "if_possible"
    assert not plan_of(tmp_path, recipe).todo
    recipe["tasks"]["code"]["timeout"] = 6
    again = plan_of(tmp_path, recipe).todo
    assert again
    assert all(title.startswith("evaluate") for title in again)
