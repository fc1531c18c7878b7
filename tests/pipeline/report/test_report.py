"""The final table and the model card say every score with n and interval."""

import re
from pathlib import Path

from rich.console import Console

from sensmerge.pipeline.report.report import Report, StageRecord, merge_summary, score_table
from sensmerge.tasks.kinds.scores import Score


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
    assert len(re.findall(r"0\.350–0\.650", text)) == 3
    assert len(re.findall("n = 40", text)) == 3
    assert "–" in text, "the base has no normalised mean here"


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
