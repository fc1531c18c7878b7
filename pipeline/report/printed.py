"""What is printed of a result."""

from rich.console import Console

from sensmerge.pipeline.recipe.gate import Gate
from sensmerge.pipeline.report.gate import choice
from sensmerge.pipeline.report.report import (
    Report,
    equals,
    merge_summary,
    route_table,
    route_warnings,
    score_table,
    sweep_lines,
    tuning_lines,
    tuning_table,
)


def print_results(report: Report, gate: Gate, said: int, console: Console) -> None:
    """Print the tables of a report, the best variant, warnings, notes, and the folders of the merged models.

    Args:
        report: what was found.
        gate: of its recipe.
        said: how many of the report's notes have been printed before.
        console: where it goes.
    """
    for name, variant in report.variants.items():
        if variant.tuning is not None:
            console.print(tuning_table(name, variant.tuning))
            _print_lines(console, *tuning_lines(name, variant.tuning))
    if report.tasks:
        console.print(score_table(report))
    for name, sweep in report.sweeps.items():
        _print_lines(console, *sweep_lines(name, sweep))
    _print_lines(console, equals(report), choice(report, gate))
    if report.routes:
        console.print(route_table(report))
    _print_lines(console, *route_warnings(report), merge_summary(report), *report.notes[said:])
    _print_lines(console, *(f"{name}: {report.models[name]}" for name in report.variants))


def _print_lines(console: Console, *lines: str | None) -> None:
    for line in lines:
        if line is not None:
            console.print(line, highlight=False, soft_wrap=True)
