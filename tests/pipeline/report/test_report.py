"""The final table and the model card say every score with n and interval."""

import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sensmerge.pipeline.recipe.sweep import expanded, sweeps_of
from sensmerge.pipeline.recipe.variant import Variant
from sensmerge.pipeline.report import card
from sensmerge.pipeline.report.report import (
    Report,
    RouteInfo,
    StageRecord,
    SweepInfo,
    equals,
    merge_summary,
    score_table,
    sweep_lines,
    tuning_lines,
    tuning_table,
)
from sensmerge.pipeline.report.results import at_ends
from sensmerge.tasks.kinds.scores import Score
from tests.pipeline.report.tunings import tuning


def report() -> Report:
    score = Score(value=0.5, n=40, low=0.35, high=0.65)
    return Report(
        recipe="r",
        stages=[],
        models={"base": "b", "ta": "t"},
        uris={"base": "file:///b", "ta": "file:///t"},
        roles={"base": "base", "ta": "variant"},
        digests={},
        tasks={"math": "accuracy"},
        scores={"base": {"math": {"accuracy": score}}, "ta": {"math": {"accuracy": score}}},
        mean_normalised={"ta": score},
        variants={},
    )


def test_table_has_value_interval_and_n(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as file:
        Console(file=file, width=100).print(score_table(report()))
    text = (tmp_path / "out").read_text()
    assert len(re.findall(r"0\.500", text)) == 3
    assert len(re.findall(r"\[0\.350, 0\.650\]", text)) == 3
    assert len(re.findall("n = 40", text)) == 3
    assert "–" in text, "the base has no normalised mean here"


def test_variants_stand_by_their_means_and_those_near_the_best_are_named(tmp_path: Path) -> None:
    means = {"base": 0.9, "none": None, "low": 0.5, "high": 0.8, "near": 0.79}
    behind = {"low": Score(0.3, 40, 0.2, 0.4), "near": Score(0.01, 40, -0.02, 0.04)}
    one = report().model_copy(
        update={
            "models": dict.fromkeys(means, "m"),
            "roles": {name: "base" if name == "base" else "variant" for name in means},
            "scores": {},
            "mean_normalised": {name: Score(mean, 40, 0, 1) for name, mean in means.items() if mean is not None},
            "behind": behind,
        }
    )
    with (tmp_path / "out").open("w") as file:
        Console(file=file, width=100).print(score_table(one))
    text = (tmp_path / "out").read_text()
    assert re.findall(r"^│ (\w+) +│ +–", text, re.MULTILINE) == ["base", "high", "near", "low", "none"]
    assert re.findall(r"0\.\d+ │ +(\S+) │", text) == ["–", "–", "0.010", "0.300"]
    assert (
        equals(one) == "not clearly worse than the first, high (the 95 % interval of the difference includes 0): near"
    )
    assert equals(one.model_copy(update={"behind": {"low": behind["low"]}})) is None


def test_heads_that_the_route_chooses_have_a_row_where_they_score_otherwise(tmp_path: Path) -> None:
    given, routed = Score(0.9, 40, 0.8, 0.95), Score(0.7, 40, 0.6, 0.8)
    route = RouteInfo(
        rule={}, trust=1.0, calibration=given, candidates=[], projection={}, routed=routed, bytes=1, source_bytes=1
    )

    def printed(name: str, by_route: Score) -> str:
        scores = {"se": {"math": {"accuracy": given, "routed_accuracy": by_route}}}
        one = report().model_copy(
            update={"roles": {"se": "variant"}, "models": {"se": "s"}, "scores": scores, "routes": {"se": route}}
        )
        with (tmp_path / name).open("w") as file:
            Console(file=file, width=100).print(score_table(one))
        return (tmp_path / name).read_text()

    table = printed("differ", routed)
    assert re.search(r"se, +│ +0\.700 │ +0\.700", table)
    assert "routed heads" in table
    assert "routed heads" not in printed("same", given)


def test_the_card_has_what_is_said_of_its_experts_and_of_its_tensors() -> None:
    notes = ["experts.x looks", "merges.ta: odd (in 1 tensors)", "merges.b: other"]
    one = report().model_copy(update={"notes": notes, "other_bases": {"x": "experts.x looks"}})
    assert card._notes(one, "ta") == ["experts.x looks", "odd (in 1 tensors)"]


def test_json_round_trip() -> None:
    assert Report.model_validate_json(report().model_dump_json()) == report()


def merge_step(name: str, status: str, taken_over: int) -> StageRecord:
    return StageRecord(
        stage="merge",
        name=name,
        status=status,
        seconds=1.0,
        bytes=1_100,
        peak_memory=1,
        pieces=1,
        pieces_run=1,
        tensors=10,
        tensor_bytes=1_000,
        taken_over=taken_over,
        taken_over_bytes=100 * taken_over,
        node="n",
        artifact="a",
        fingerprint="f",
    )


def test_merge_summary_counts_what_was_merged_now() -> None:
    stages = [merge_step("ta", "run", 7), merge_step("ties", "run", 0), merge_step("dare", "cached", 9)]
    assert merge_summary(report().model_copy(update={"stages": stages})) == (
        "13 of 20 tensors merged (1.3 kB), 7 taken over from earlier merges (700 bytes)"
    )
    assert merge_summary(report().model_copy(update={"stages": stages[2:]})) is None


OF_THE_RECIPE = {"weight": 0.5, "density": 1.0}
FAR = {"weight": 1.0, "density": 1.0}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "ta: weight 0.5, density 0.2 is the best of 6 candidates"),
        (
            {"best": FAR},
            "ta: weight 0.5, density 0.2 is the best of its grid: weight 1, density 1 lies beyond it and is not "
            "clearly better",
        ),
        (
            {"default": FAR},
            "ta: weight 0.5, density 0.2 is the best of 6 candidates, better than the recipe's weight 1, density 1 by "
            "0.580 [0.530, 0.630], n = 80",
        ),
        (
            {"default": OF_THE_RECIPE, "chosen": OF_THE_RECIPE},
            "ta: weight 0.5, density 1 is the recipe's and stays: weight 0.5, density 0.2, the best of 6, is not "
            "clearly better: by 0.080 [0.030, 0.130], n = 80",
        ),
        (
            {"default": {"weight": 0.5, "density": 0.2}},
            "ta: weight 0.5, density 0.2 is the recipe's, and the best of 6 candidates",
        ),
    ],
)
def test_lines_say_what_was_chosen_and_why(changes: dict[str, Any], line: str) -> None:
    first, second = tuning_lines("ta", tuning(**changes))
    assert first == line
    assert second == "ta: weight 0.5 was the best and at the end of the grid, so 1 came into it too"


def test_the_table_of_a_tuning_has_all_that_was_tried(tmp_path: Path) -> None:
    console = Console(width=160, record=True, file=(tmp_path / "out").open("w"))
    console.print(tuning_table("ta", tuning()))
    lines = [line.split("│") for line in console.export_text().splitlines() if "│" in line]
    assert len(lines) == 6
    cells = [[cell.strip() for cell in line] for line in lines]
    assert [line[1:3] for line in cells] == [[w, d] for w in ("0.3", "0.5", "1") for d in ("0.2", "1")]
    assert [line[1:3] for line in cells if "chosen" in line] == [["0.5", "0.2"]]
    assert cells[0][3:7] == ["0.780 [0.680, 0.880]", "0.200 [0.150, 0.250]", "0.870", "0.300"]


@pytest.mark.parametrize(
    ("settings", "best", "said"),
    [
        ({"weight": [0.2, 0.4, 0.6]}, "0.4", []),
        ({"weight": [0.2, 0.4, 0.6]}, "0.6", ["weight 0.6 leads and .*; add values beyond it: 0.9, 1.35"]),
        ({"density": [0.5, 1.0]}, "1.0", []),  # there is nothing beyond it
        ({"density": [0.5, 1.0]}, "0.5", ["density 0.5 leads and .*; add values beyond it: 0.25, 0.125"]),
        ({"seed": [1, 2]}, "2", []),  # chance has no ends
        ({"normalize": [True, False]}, "false", []),
    ],
)
def test_a_sweep_whose_best_variant_is_at_its_end(settings: dict[str, list[Any]], best: str, said: list[str]) -> None:
    entry = {"method": "dare_ties" if "seed" in settings else "ties", "density": 0.5} | dict.fromkeys(settings)
    merges = {"t": {key: value for key, value in entry.items() if value is not None} | {"sweep": settings}}
    (sweep,) = sweeps_of(merges).values()
    name = f"t-{next(iter(settings))}-{best}"
    found = at_ends(Variant.model_validate(expanded(merges)[name]).settings, sweep.members, name)
    assert len(found) == len(said)
    assert all(re.search(pattern, line) for pattern, line in zip(said, found, strict=True))


def test_of_a_large_sweep_only_the_number_that_is_near_is_printed() -> None:
    behind = {str(n): Score(0.1, 9, n / 10 - 0.3, 1) for n in range(1, 8)}
    sweep = SweepInfo(members={key: {} for key in ["0", *behind]}, best="0", behind=behind, notes=["x"])
    first, note = sweep_lines("t", sweep)
    assert first.startswith(
        "sweep t: 0 has the highest mean of 8; 3 are not clearly worse (the report has all differences"
    )
    assert note == "sweep t: x"
