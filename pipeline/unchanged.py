"""Commands that find nothing changed: they say what the last run found, without torch, Ray and transformers."""

from typing import Literal

from pydantic import ValidationError
from rich.console import Console

from sensmerge.pipeline.options import Options
from sensmerge.pipeline.plan.kept import KeptPlan, Recorded, find
from sensmerge.pipeline.plan.models import list_models
from sensmerge.pipeline.report.printed import print_results
from sensmerge.pipeline.report.report import Report
from sensmerge.pipeline.store.history import has_passed, last_run, lasting_uri
from sensmerge.pipeline.tracking.uri import check_server
from sensmerge.tasks.artifacts import write_json


def say_unchanged(command: Literal["run", "refresh", "record"], options: Options, console: Console) -> bool:
    """Print and report what the last run found if this one would find and do nothing else; return whether that is so.

    Nothing else: no input and no artifact has changed, and what MLflow was told is still there.

    Args:
        command: what the user started.
        options: what to run; its store is locked.
        console: where the result goes.

    Raises:
        InputError: bad input.
        StepError: MLflow fails.
    """
    check_server(options.uri)
    listings = list_models(options.recipe, options.folder, options.store.hub_cache)
    kept = find(options.recipe, options.folder, options.store, listings)
    if kept is None or last_run(options.store, kept.recipe, kept.step_keys()) is None:
        return False
    try:
        report = None if kept.recorded is None else Report.model_validate(kept.recorded.report)
    except ValidationError:  # damaged
        return False
    if report is None and options.report is not None:
        return False
    said = _say_refreshed(options, kept, console) if command == "refresh" else _say_run(options, kept, report, console)
    if said and options.report is not None and report is not None:
        write_json(options.report, report.model_dump())
    return said


def _say_refreshed(options: Options, kept: KeptPlan, console: Console) -> bool:
    """Say that nothing changed if the best variant has passed this gate, or not, and the champion can be loaded."""
    if not has_passed(options.store, kept.recipe, kept.step_keys(), options.recipe.gate.text()):
        return False
    from sensmerge.pipeline.tracking.registry import loss_of_champion

    if loss_of_champion(options.recipe.name, options.store, options.uri) is not None:
        return False
    console.print(f"{kept.recipe}: nothing changed", highlight=False)
    return True


def _say_run(options: Options, kept: KeptPlan, report: Report | None, console: Console) -> bool:
    """Print the result again if MLflow, where this run is to be recorded, has it."""
    recorded: Recorded | None = kept.recorded
    if report is None or recorded is None or recorded.tracking_uri != lasting_uri(options.tracking_uri):
        return False
    from sensmerge.pipeline.tracking.runs import where_recorded

    where = where_recorded(options.uri, recorded.mlflow_run)
    if where is None:
        return False
    for line in (*kept.lines, kept.summary()):
        console.print(line, highlight=False, soft_wrap=True)
    print_results(report, options.recipe.gate, len(kept.lines), console)
    console.print(f"MLflow has this run: {where}", highlight=False, soft_wrap=True)
    return True
