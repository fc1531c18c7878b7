"""A recipe from its listed models to scores, MLflow and model cards: what `run` and `refresh` have in common."""

import os
from collections.abc import Mapping

import yaml
from rich.console import Console

from pipeline import tracking
from pipeline.card import write_cards
from pipeline.changes import model_changes
from pipeline.history import is_last_run, remember
from pipeline.options import Options
from pipeline.plan import Plan, make_plan, plan_summary, plan_table
from pipeline.recipe import Recipe
from pipeline.report import Report, route_table, route_warnings, score_table
from pipeline.results import collect, data_sets
from pipeline.run import execute
from tasks.artifacts import write_json
from tasks.download import Listing


def run(options: Options, listings: Mapping[str, Listing], console: Console) -> None:
    """Run what the store lacks, print and record the result.

    Args:
        options: what to run; its store is locked.
        listings: the recipe's models, from `list_models`.
        console: where progress and results go.

    Raises:
        InputError: bad input.
        StepError: a step failed.
    """
    uri = _tracking_uri(options)
    plan = make_plan(options.recipe, options.folder, options.store, listings)
    console.print(plan_summary(plan), highlight=False)
    execute(plan, options.address, console)
    _finish(options, plan, uri, console)


def refresh(options: Options, listings: Mapping[str, Listing], console: Console) -> None:
    """Run what changed since the last time; where nothing did, say so and leave everything as it is.

    Args:
        options: what to run; its store is locked.
        listings: the recipe's models as they are now, from `list_models`.
        console: where progress and results go.

    Raises:
        InputError: bad input.
        StepError: a step failed.
    """
    uri = _tracking_uri(options)
    plan = make_plan(options.recipe, options.folder, options.store, listings)
    if not plan.todo and is_last_run(plan.store, plan.recipe.name, plan.keys()):
        console.print(f"{plan.recipe.name}: nothing changed, nothing to do", highlight=False)
        if options.report is not None:
            write_json(options.report, collect(plan).model_dump())
        return
    for line in (*model_changes(plan), plan_summary(plan)):
        console.print(line, highlight=False, soft_wrap=True)
    execute(plan, options.address, console)
    _finish(options, plan, uri, console)


def _tracking_uri(options: Options) -> str:
    uri = options.tracking_uri or tracking.default_uri(options.store.root)
    tracking.check_server(uri)
    return uri


def _finish(options: Options, plan: Plan, uri: str, console: Console) -> Report:
    """Write cards and report, print the tables, and record the run."""
    report = collect(plan)
    text = recipe_yaml(plan.recipe)
    write_cards(plan, report, text)
    if options.report is not None:
        write_json(options.report, report.model_dump())
    if report.tasks:
        console.print(score_table(report))
    if report.routes:
        console.print(route_table(report))
    for warning in route_warnings(report):
        console.print(warning, highlight=False, soft_wrap=True)
    for name in plan.recipe.merges:
        console.print(f"{name}: {report.models[name]}", highlight=False, soft_wrap=True)
    where = tracking.record(report, text, _text(plan_table(plan)), data_sets(plan), uri, plan.store.root)
    remember(plan.store, plan.recipe.name, plan.keys())
    shown = where if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"
    console.print(f"MLflow: {shown}", highlight=False, soft_wrap=True)
    return report


def recipe_yaml(recipe: Recipe) -> str:
    """Return a recipe, overrides applied, as YAML that says no more than was set."""
    return yaml.safe_dump(recipe.model_dump(by_alias=True, exclude_unset=True), sort_keys=False, allow_unicode=True)


def _text(table: object) -> str:
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()
