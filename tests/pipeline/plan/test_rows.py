"""Which rows calibrate and which are scored."""

from pathlib import Path
from typing import Any

import pytest

from sensmerge.pipeline.plan.plan import Plan
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.rows.source import DataSource
from sensmerge.tasks.rows.tables import load_rows
from tests.conftest import plan_of, write_rows

Recipe = dict[str, Any]


def numbers(first: int, last: int) -> list[dict[str, object]]:
    return [{"id": i, "prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(first, last)]


def rows(plan: Plan, task: str = "math") -> tuple[list[str], list[str]]:
    """The prompts that calibrate, and those that are scored."""
    one = plan.inputs.data[task]
    return [row["prompt"] for row in one.calibration], [row["prompt"] for row in one.evaluation]


def one_file(recipe: Recipe, folder: Path, calibration: int | None, evaluation: int | None, **more: Any) -> Recipe:
    """Take the rows of `math` from one file of 12, with one seed."""
    write_rows(folder / "all.jsonl", numbers(0, 12))
    source = {"path": "json", "data_files": "all.jsonl"} | more
    for split, samples in (("calibration", calibration), ("evaluation", evaluation)):
        recipe["tasks"]["math"][split] = source | ({"samples": samples} if samples else {})
    return recipe


@pytest.mark.parametrize("more", [{}, {"seed": 7}, {"seed": None}])
def test_evaluation_draws_what_calibration_left_of_the_same_file(
    llama_recipe: Recipe, tmp_path: Path, more: dict[str, Any]
) -> None:
    plan = plan_of(tmp_path, one_file(llama_recipe, tmp_path, 4, 8, **more))
    calibration, evaluation = rows(plan)
    assert (len(calibration), len(evaluation)) == (4, 8)
    assert not set(calibration) & set(evaluation)
    # Calibration has the rows that it would have alone, and the drawing goes on after them.
    alone, _ = rows(plan_of(tmp_path, one_file(llama_recipe, tmp_path, 4, None, **more)))
    assert alone == calibration
    eleven, _ = rows(plan_of(tmp_path, one_file(llama_recipe, tmp_path, 11, 1, **more)))
    six = rows(plan_of(tmp_path, one_file(llama_recipe, tmp_path, 4, 6, **more)))[1]
    assert set(calibration) | set(six) <= set(eleven)
    (note,) = plan.inputs.notes
    assert note.startswith("tasks.math.evaluation: 8 rows are scored; 4 left out because calibration uses them too: ")


def test_rows_without_a_twin_are_those_of_the_seed_alone(llama_recipe: Recipe, tmp_path: Path) -> None:
    write_rows(tmp_path / "math-test.jsonl", numbers(12, 40))
    plan = plan_of(tmp_path, llama_recipe)
    assert plan.inputs.notes == ()
    source = DataSource(path="json", data_files="math-test.jsonl", samples=6)
    assert plan.inputs.data["math"].evaluation == load_rows(source, "", tmp_path).rows


def test_a_twin_is_told_by_what_the_model_reads(llama_recipe: Recipe, tmp_path: Path) -> None:
    """Another id makes no other sample, and another file neither; the row that is left out is replaced."""
    llama_recipe["tasks"]["math"] |= {
        "calibration": {"path": "json", "data_files": "math.jsonl", "samples": 3, "seed": None},
        "evaluation": {"path": "csv", "data_files": "test.csv", "samples": 3, "seed": None},
    }
    write_rows(tmp_path / "math.jsonl", numbers(0, 3))
    (tmp_path / "test.csv").write_text("id,prompt,completion\nx,9+1=,10\ny,2+1=,3\nz,2+1=,4\nw,8+1=,9\n")
    plan = plan_of(tmp_path, llama_recipe)
    assert rows(plan)[1] == ["9+1=", "2+1=", "8+1="]
    assert plan.inputs.notes == (
        "tasks.math.evaluation: 3 rows are scored; 1 left out because calibration uses them too: "
        f"line 3 of {tmp_path}/test.csv is line 3 of {tmp_path}/math.jsonl",
    )


def test_no_task_is_scored_on_what_another_calibrates_on(llama_recipe: Recipe, tmp_path: Path) -> None:
    """Under another template a row is the same row."""
    llama_recipe["tasks"]["code"] |= {
        "prompt": "Q: {prompt}",
        "evaluation": {"path": "json", "data_files": "math.jsonl", "samples": 12},
    }
    plan = plan_of(tmp_path, llama_recipe)
    calibration, evaluation = rows(plan)[0], rows(plan, "code")[1]
    assert len(evaluation) == 9
    assert not set(calibration) & set(evaluation)
    (note,) = plan.inputs.notes
    assert note.startswith("tasks.code.evaluation: 9 rows of the 12 asked for are scored; 3 left out")


def test_no_row_left_to_score(llama_recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"tasks\.math\.evaluation: no row is left to score.* same 12 samples"
    ) as caught:
        plan_of(tmp_path, one_file(llama_recipe, tmp_path, None, None))
    assert "give calibration fewer samples" in str(caught.value)
    assert len(rows(plan_of(tmp_path, one_file(llama_recipe, tmp_path, 2, None)))[1]) == 10  # the way out


def test_evaluation_rows_are_checked_as_far_as_they_are_drawn(llama_recipe: Recipe, tmp_path: Path) -> None:
    one_file(llama_recipe, tmp_path, 2, 6, seed=None)
    broken = [row | {"prompt": True} if row["id"] == 7 else row for row in numbers(0, 12)]
    write_rows(tmp_path / "all.jsonl", broken)
    with pytest.raises(InputError, match=r"tasks\.math\.prompt names field 'prompt', which is true in line 8 of"):
        plan_of(tmp_path, llama_recipe)
    assert len(rows(plan_of(tmp_path, llama_recipe, "tasks.math.evaluation.samples=5"))[1]) == 5
