"""Commands that read a recipe."""

import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from sensmerge.pipeline.arguments import (
    DEFAULT_STORE,
    REFUSED,
    AddressOption,
    CronOption,
    MetricsOption,
    RecipePath,
    RefusedOption,
    ReportOption,
    SetOption,
    StoreOption,
    TimezoneOption,
    TrackingOption,
    WaitOption,
    WebhookOption,
)
from sensmerge.pipeline.console import console_of
from sensmerge.pipeline.webhook import checked_webhook
from sensmerge.tasks.errors import InputError


def init(
    base: Annotated[str, typer.Argument(metavar="BASE", help="the base: folder, hub:ORG/NAME@REVISION or URL")],
    experts: Annotated[list[str], typer.Argument(metavar="EXPERT...", help="experts, adapters among them")],
    target: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="file to write; default: it is printed")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Write a recipe for a base and experts to start from, with comments that say what they are."""
    from sensmerge.pipeline.init import check_target, new_recipe
    from sensmerge.pipeline.store.unmade import looked_at
    from sensmerge.tasks.artifacts import write_whole

    cache = looked_at(store).hub_cache
    if target is None:
        sys.stdout.write(new_recipe(base, experts, Path(), cache))
        return
    check_target(target)
    write_whole(target, new_recipe(base, experts, target.absolute().parent, cache))
    console_of().print(f"wrote {target}; next: sensmerge plan {target}", highlight=False, soft_wrap=True)


def plan(
    recipe: RecipePath,
    store: StoreOption = DEFAULT_STORE,
    overrides: SetOption = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="read no weights; what only their digests tell is marked ? where unknown")
    ] = False,
) -> None:
    """Check a recipe and print its steps: RUN or SKIP, why, and the bytes to read and write. Runs nothing."""
    from sensmerge.pipeline.start import print_plan

    print_plan(recipe, overrides or (), store, console_of(), quick)


def run(
    recipe: RecipePath,
    store: StoreOption = DEFAULT_STORE,
    overrides: SetOption = None,
    tracking_uri: TrackingOption = None,
    address: AddressOption = None,
    report: ReportOption = None,
    wait: WaitOption = 0,
    metrics: MetricsOption = False,
) -> None:
    """Run every step of a recipe whose result is not in the store, and print the scores."""
    from sensmerge.pipeline.options import Options
    from sensmerge.pipeline.recipe.load import load_recipe
    from sensmerge.pipeline.start import check_report, work

    loaded, folder = load_recipe(recipe, overrides or ()), recipe.absolute().parent
    check_report(report)
    work("run", Options(loaded, folder, store, tracking_uri, address, report, wait, metrics), console_of())


def refresh(
    context: typer.Context,
    recipe: RecipePath,
    store: StoreOption = DEFAULT_STORE,
    overrides: SetOption = None,
    tracking_uri: TrackingOption = None,
    address: AddressOption = None,
    report: ReportOption = None,
    wait: WaitOption = 0,
    metrics: MetricsOption = False,
    cron: CronOption = None,
    timezone: TimezoneOption = None,
    refused_exit_status: RefusedOption = REFUSED,
    webhook: WebhookOption = None,
) -> None:
    """Run the steps that depend on changed models, and make the best variant champion if it passes the gate.

    If nothing changed, do nothing. Exit status 3: the best variant did not pass and stays challenger; see
    --refused-exit-status.

    With --cron, SIGTERM and Ctrl-C end the schedule and the refresh in progress, with exit status 0.
    """
    from sensmerge.pipeline.options import Options
    from sensmerge.pipeline.recipe.load import load_recipe
    from sensmerge.pipeline.start import check_report, work

    loaded, folder = load_recipe(recipe, overrides or ()), recipe.absolute().parent
    check_report(report)
    told = checked_webhook(webhook)
    options = Options(loaded, folder, store, tracking_uri, address, report, wait, metrics, told)
    if cron is not None:
        from sensmerge.pipeline.schedule import Times, keep

        again = [sys.executable, "-m", "sensmerge.pipeline", *_words(context, leave_out=("cron", "timezone"))]
        keep(again, Times(cron, timezone or "UTC"), options.store, console_of())
    elif timezone is not None:
        raise InputError(f"--timezone {timezone}: needs --cron; give both or neither")
    elif not work("refresh", options, console_of()):
        raise typer.Exit(refused_exit_status)


def record(
    recipe: RecipePath,
    store: StoreOption = DEFAULT_STORE,
    overrides: SetOption = None,
    tracking_uri: TrackingOption = None,
    report: ReportOption = None,
    wait: WaitOption = 0,
) -> None:
    """Record in MLflow the result of a run that could not be recorded when it ended. Runs nothing.

    Give the recipe and the options of that run. The gate of a refresh is passed by the next refresh.
    """
    from sensmerge.pipeline.options import Options
    from sensmerge.pipeline.recipe.load import load_recipe
    from sensmerge.pipeline.start import check_report, work

    loaded, folder = load_recipe(recipe, overrides or ()), recipe.absolute().parent
    check_report(report)
    work("record", Options(loaded, folder, store, tracking_uri, None, report, wait, metrics=False), console_of())


def _words(context: typer.Context, leave_out: Collection[str]) -> list[str]:
    """Return the words of a command line that says what the present one does, but for some options."""
    options, arguments = [context.command.name or ""], ["--"]
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if parameter.name in leave_out or value is None or value is False:
            continue
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "ENVIRONMENT":  # inherited; in a command line all could read it
            continue
        if value is True:
            options.append(parameter.opts[0])
        elif parameter.param_type_name == "argument":
            arguments.append(str(value))
        else:
            for each in value if isinstance(value, list | tuple) else (value,):
                options += [parameter.opts[0], str(each)]
    return options + arguments


def schema() -> None:
    """Print the JSON Schema of recipes, for use in editors."""
    from sensmerge.pipeline.recipe.schema import Recipe

    sys.stdout.write(json.dumps(Recipe.model_json_schema(), indent=2) + "\n")
