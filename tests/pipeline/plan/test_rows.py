"""Which rows calibrate and which are scored."""

from pathlib import Path
from typing import Any

import pytest

from sensmerge.pipeline.plan.plan import Plan
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.rows.source import DataSource
from sensmerge.tasks.rows.tables import load_rows
from tests.census.cases import make_case
from tests.conftest import make_tokenizer, plan_of, write_rows

Recipe = dict[str, Any]


def numbers(first: int, last: int) -> list[dict[str, object]]:
    return [{"id": i, "prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(first, last)]


def rows(plan: Plan, task: str = "math") -> tuple[list[str], list[str]]:
    """The prompts that calibrate, and those that are scored."""
    one = plan.inputs.data[task]
    return [row["prompt"] for row in one.calibration], [row["prompt"] for row in one.evaluation]


def notes_of(plan: Plan) -> list[str]:
    """What is said of a plan's rows, but that they are few."""
    return [note for note in plan.inputs.notes if not note.startswith("few rows")]


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
    (note,) = notes_of(plan)
    assert note.startswith("tasks.math.evaluation: 8 rows are scored; 4 left out because calibration uses them too: ")


def test_rows_without_a_twin_are_those_of_the_seed_alone(llama_recipe: Recipe, tmp_path: Path) -> None:
    write_rows(tmp_path / "math-test.jsonl", numbers(12, 40))
    plan = plan_of(tmp_path, llama_recipe)
    assert notes_of(plan) == []
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
    assert notes_of(plan) == [
        "tasks.math.evaluation: 3 rows are scored; 1 left out because calibration uses them too: "
        f"line 3 of {tmp_path}/test.csv is line 3 of {tmp_path}/math.jsonl",
    ]


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
    (note,) = notes_of(plan)
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


# Rows to tune on ------------------------------------------------------------------------------------------------------

AUTO = {"method": "task_arithmetic", "weight": "auto"}
SENS = {"method": "task_arithmetic", "coefficients": {"kind": "sens"}, "tune": {"temperature": [0.1, 1.0]}}


def prompts(plan: Plan, split: str, task: str = "math") -> list[str]:
    return [row["prompt"] for row in getattr(plan.inputs.data[task], split)]


def test_half_of_the_calibration_rows_are_held_out_for_a_variant_that_needs_them(
    llama_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = one_file(llama_recipe, tmp_path, 7, 5)
    before = plan_of(tmp_path, recipe)
    recipe["merges"]["tuned"] = SENS
    plan = plan_of(tmp_path, recipe)
    calibration = prompts(before, "calibration")
    halves = prompts(plan, "calibration"), prompts(plan, "held_out")
    assert [len(half) for half in halves] == [4, 3]
    assert sorted([*halves[0], *halves[1]]) == sorted(calibration)
    assert all(half == [one for one in calibration if one in half] for half in halves)  # in the rows' order
    assert halves[0] != calibration[::2]  # which could be all of one class
    assert prompts(plan, "tuning") == calibration  # for variants that none of them goes into
    assert prompts(plan, "evaluation") == prompts(before, "evaluation")  # as it was, and none of the others
    assert (
        "tasks.math.calibration: 3 of its rows are held out to tune variants on; the other 4 calibrate"
        in plan.inputs.notes
    )
    # The statistics of all variants are those of the other rows alone, and memory is planned for these.
    fingerprints = [one.step("statistics", "math").key.fingerprint for one in (before, plan)]
    assert fingerprints[0] != fingerprints[1]
    tokens = [one.inputs.data["math"].calibration_tokens for one in (before, plan)]
    assert tokens[1] < tokens[0]


def test_a_variant_that_needs_no_calibration_is_tuned_on_all_of_it(llama_recipe: Recipe, tmp_path: Path) -> None:
    """So the sens variant beside it stays what it is."""
    before = plan_of(tmp_path, llama_recipe)
    llama_recipe["merges"]["tuned"] = AUTO
    plan = plan_of(tmp_path, llama_recipe)
    assert prompts(plan, "tuning") == prompts(plan, "calibration") == prompts(before, "calibration")
    assert prompts(plan, "held_out") == []
    assert "tasks.math.calibration: variants are tuned on its 3 rows" in plan.inputs.notes
    for stage in ("statistics", "cross_task"):
        for step in before.steps:
            if step.stage == stage:
                assert plan.step(step.stage, step.name).key == step.key
    assert plan.step("merge", "ties-sens").key == before.step("merge", "ties-sens").key


def test_rows_to_tune_on_may_be_named(llama_recipe: Recipe, tmp_path: Path) -> None:
    """Then calibration loses none; what calibrates is not tuned on, and what is tuned on is not scored."""
    recipe = one_file(llama_recipe, tmp_path, 4, None)
    before = prompts(plan_of(tmp_path, recipe), "calibration")
    recipe["tasks"]["math"]["tuning"] = {"path": "json", "data_files": "all.jsonl", "samples": 3}
    recipe["merges"]["tuned"] = SENS
    plan = plan_of(tmp_path, recipe)
    splits = {split: prompts(plan, split) for split in ("calibration", "tuning", "evaluation")}
    assert splits["calibration"] == before
    assert prompts(plan, "held_out") == splits["tuning"]
    assert {split: len(found) for split, found in splits.items()} == {"calibration": 4, "tuning": 3, "evaluation": 5}
    assert len({prompt for found in splits.values() for prompt in found}) == 12
    notes = "\n".join(plan.inputs.notes)
    assert "tasks.math.tuning: 3 rows are tuned on; 4 left out because calibration uses them too: " in notes
    assert "tasks.math.evaluation: 5 rows are scored; 7 left out because calibration or tuning uses them too: " in notes
    assert "tasks.code.calibration: 1 of its rows are held out to tune variants on; the other 2 calibrate" in notes


def test_rows_that_say_the_same_are_not_in_both_halves(llama_recipe: Recipe, tmp_path: Path) -> None:
    recipe = one_file(llama_recipe, tmp_path, 4, None, seed=None)
    write_rows(tmp_path / "all.jsonl", [row | {"id": 0} for row in numbers(0, 1) * 3 + numbers(1, 9)])
    recipe["merges"]["tuned"] = SENS
    plan = plan_of(tmp_path, recipe)
    calibration, held_out = prompts(plan, "calibration"), prompts(plan, "held_out")
    assert len(calibration) == 2
    assert "0+1=" in calibration
    assert set(held_out) == {"1+1="} - set(calibration)


def test_what_one_task_calibrates_on_is_held_out_of_none(llama_recipe: Recipe, tmp_path: Path) -> None:
    recipe = one_file(llama_recipe, tmp_path, 8, 2, seed=None)
    write_rows(tmp_path / "code.jsonl", numbers(1, 9))  # seven of math's eight, and another one
    recipe["tasks"]["code"]["calibration"] = {"path": "json", "data_files": "code.jsonl", "seed": None}
    recipe["merges"]["tuned"] = SENS
    plan = plan_of(tmp_path, recipe)
    calibrating = {prompt for task in ("math", "code") for prompt in prompts(plan, "calibration", task)}
    for task in ("math", "code"):
        assert prompts(plan, "held_out", task)
        assert calibrating.isdisjoint(prompts(plan, "held_out", task))


def test_no_row_left_to_tune_on(llama_recipe: Recipe, tmp_path: Path) -> None:
    recipe = one_file(llama_recipe, tmp_path, 1, 5)
    recipe["merges"]["tuned"] = SENS
    message = r"tasks\.math\.calibration: of 1 rows none can be held out to tune variants on; give it more samples, or"
    with pytest.raises(InputError, match=message):
        plan_of(tmp_path, recipe)
    recipe["tasks"]["math"]["tuning"] = {"path": "json", "data_files": "all.jsonl", "samples": 2}  # a way out
    assert len(prompts(plan_of(tmp_path, recipe), "tuning")) == 2


def test_what_a_variant_is_tuned_on_does_not_depend_on_the_others(llama_recipe: Recipe, tmp_path: Path) -> None:
    recipe = one_file(llama_recipe, tmp_path, 7, 5)
    recipe["merges"] = {"auto": AUTO}
    alone = plan_of(tmp_path, recipe)
    recipe["merges"]["sens"] = SENS
    plan = plan_of(tmp_path, recipe)
    assert plan.step("tune", "auto").key == alone.step("tune", "auto").key
    assert set(plan.step("tune", "auto").needs) >= {"tune math", "tune code"}
    assert set(plan.step("tune", "sens").needs) >= {"tune math/held_out", "tune code/held_out"}
    # Rows that the recipe names are those of all variants, and an expert is scored on them once.
    for task in ("math", "code"):
        recipe["tasks"][task]["tuning"] = {"path": "json", "data_files": "all.jsonl", "samples": 3}
    named = plan_of(tmp_path, recipe)
    assert [step.name for step in named.steps if step.stage == "tune"] == ["math", "code", "auto", "sens"]


def test_a_head_that_looks_for_the_end_of_a_text(tmp_path: Path) -> None:
    case = make_case("BartForSequenceClassification", tmp_path, lora=False)
    recipe = case.recipe("full", {"method": "task_arithmetic"})
    assert case.plan(recipe, "ended").steps
    for folder in (case.base, *case.experts("full").values()):
        make_tokenizer().save_pretrained(folder)
    message = r"^tasks\.first\.calibration: .*: the tokenizer gives no token 1, at which the head of BartForSeq"
    with pytest.raises(InputError, match=message):
        case.plan(recipe, "open")


def test_a_network_without_a_vocabulary(tmp_path: Path) -> None:
    case = make_case("CanineForSequenceClassification", tmp_path, lora=False)
    assert case.plan(case.recipe("full", {"method": "task_arithmetic"}), "hashed").steps
