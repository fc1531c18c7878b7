"""The final table and the model card say every score with n and interval."""

import re
from pathlib import Path

from rich.console import Console

from pipeline.report import Report, Score, score_table


def report() -> Report:
    score = Score(value=0.5, n=40, low=0.35, high=0.65)
    return Report(
        recipe="r",
        stages=[],
        models={"base": "b", "ta": "t"},
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
