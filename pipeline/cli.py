"""The command line: what a user starts, a function for each command."""

import atexit
import gc
import json
import os
import sys
import traceback
from collections.abc import Collection
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Annotated

import typer
from rich.console import Console

from sensmerge.pipeline.arguments import (
    DEFAULT_STORE,
    AddressOption,
    CronOption,
    MetricsOption,
    RecipePath,
    ReportOption,
    SetOption,
    StoreOption,
    TimezoneOption,
    TrackingOption,
    WaitOption,
)
from sensmerge.pipeline.execute.stop import Stopped, stoppable
from sensmerge.pipeline.store.store import Store
from sensmerge.pipeline.tracking.uri import TRACKING_URI, checked_uri
from sensmerge.tasks.errors import InputError, StepError, disk_trouble
from sensmerge.tasks.urls import public_text

# Commands import what they need themselves: --help and what reads no recipe do not wait for torch.

app = typer.Typer(
    name="sensmerge",
    help="Merge fine-tuned experts of one base model into one model, without training.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.command()
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

    print_plan(recipe, overrides or (), store, Console(), quick)


@app.command()
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
    work("run", Options(loaded, folder, store, tracking_uri, address, report, wait, metrics), Console())


@app.command()
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
) -> None:
    """Run the steps that depend on changed models, and make the best variant champion if it passes the gate.

    If nothing changed, do nothing. Exit status 3: the best variant did not pass and stays challenger.

    With --cron, SIGTERM and Ctrl-C end the schedule and the refresh in progress, with exit status 0.
    """
    from sensmerge.pipeline.options import Options
    from sensmerge.pipeline.recipe.load import load_recipe
    from sensmerge.pipeline.start import check_report, work

    loaded, folder = load_recipe(recipe, overrides or ()), recipe.absolute().parent
    check_report(report)
    options = Options(loaded, folder, store, tracking_uri, address, report, wait, metrics)
    if cron is not None:
        from sensmerge.pipeline.schedule import Times, keep

        again = [sys.executable, "-m", "sensmerge.pipeline", *_words(context, leave_out=("cron", "timezone"))]
        keep(again, Times(cron, timezone or "UTC"), options.store, Console())
    elif timezone is not None:
        raise InputError(f"--timezone {timezone}: needs --cron; give both or neither")
    elif status := work("refresh", options, Console()):
        raise typer.Exit(status)


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


@app.command()
def predict(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="folder of a dynamic model that `run` made")],
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="JSON Lines file, or a folder of pictures")],
    target: Annotated[Path, typer.Argument(metavar="OUTPUT", help="JSON Lines file to write")],
    field: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="field that holds a row's text or picture; default: text or image"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="rows that a worker answers at once")] = 32,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="maximum length of a continuation, in tokens (language models)")
    ] = 64,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="number of workers, each with a copy of the model; default: as many as fit in the cluster"
        ),
    ] = None,
    num_gpus: Annotated[float, typer.Option(min=0, help="GPUs for each worker; above 0, the model runs on cuda")] = 0,
    address: AddressOption = None,
) -> None:
    """Answer every row of a file with a dynamic model, and add prediction, expert and coefficients to the row."""
    from sensmerge.pipeline.execute.batches import Workers
    from sensmerge.pipeline.predict import Settings, predict_file

    console, settings = Console(), Settings(field, batch_size, max_new_tokens, Workers(workers, num_gpus))
    with stoppable():
        rows = predict_file(folder, source, target, settings, address, console)
    console.print(f"{target}: {rows} rows", highlight=False, soft_wrap=True)


@app.command()
def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="version in MLflow: RECIPE@ALIAS or RECIPE/NUMBER")],
    second: Annotated[str, typer.Argument(metavar="B", help="version to compare it with")],
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: TrackingOption = None,
) -> None:
    """Print the scores of two versions of a registered model, and their paired differences, task by task."""
    from sensmerge.pipeline.report.gate import comparison_table, judge
    from sensmerge.pipeline.tracking.registry import ModelRegistry, check_whole, parse_version

    uri = checked_uri(tracking_uri, store)
    outcomes = []
    for text in (first, second):
        recipe, which = parse_version(text)
        registry = ModelRegistry(uri, recipe)
        version = registry.find(which)
        check_whole(version, store)
        outcomes.append(registry.outcomes(version))
    Console().print(comparison_table(first, second, judge(outcomes[1], outcomes[0], 0.0)))


@app.command()
def promote(
    version: Annotated[str, typer.Argument(metavar="VERSION", help="version in MLflow: RECIPE@ALIAS or RECIPE/NUMBER")],
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: TrackingOption = None,
) -> None:
    """Make a version of a registered model the champion, regardless of the gate."""
    from sensmerge.pipeline.tracking.registry import ModelRegistry, check_whole, parse_version

    recipe, which = parse_version(version)
    registry = ModelRegistry(checked_uri(tracking_uri, store), recipe)
    found = registry.find(which)
    check_whole(found, store)
    registry.promote(found)
    Console().print(f"{found} is champion", highlight=False, soft_wrap=True)


@app.command()
def rollback(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="name of the recipe, which is also that of its registered model")
    ],
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: TrackingOption = None,
) -> None:
    """Make the former champion of a registered model the champion again."""
    from sensmerge.pipeline.tracking.registry import ModelRegistry, check_whole

    registry = ModelRegistry(checked_uri(tracking_uri, store), recipe)
    before, now = registry.former()
    check_whole(now, store)
    registry.restore(now)
    Console().print(f"{now} is champion again, instead of {before}", highlight=False, soft_wrap=True)


@app.command()
def verify(
    store: StoreOption = DEFAULT_STORE,
    remove: Annotated[bool, typer.Option("--delete", help="delete whatever is damaged; a run makes it again")] = False,
    wait: WaitOption = 0,
) -> None:
    """Check all artifacts and downloaded models against their digests. Exit status 1: something is damaged."""
    from sensmerge.pipeline.store.verify import find_damage

    check_exists(store)
    console, count, damaged = Console(), 0, 0
    with store.lock(wait):
        for folder, wrong in find_damage(store):
            count += 1
            damaged += bool(wrong)
            for what in wrong:
                console.print(f"{folder.relative_to(store.root)}: {what}", highlight=False, soft_wrap=True)
            if wrong and remove:
                store.remove(folder)
    said = f", {damaged} of them damaged" if damaged else ", all intact"
    done = "; deleted, run the recipe again" if remove else "; delete them with --delete, and run the recipe again"
    console.print(f"{count} artifacts{said}{done if damaged else ''}", highlight=False)
    if damaged:
        raise typer.Exit(1)


@app.command("gc")
def collect_garbage(
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: Annotated[
        str | None,
        typer.Option(
            "--tracking-uri",
            metavar="URI",
            help=f"MLflow server or database with the champions; default: all that runs used, and {TRACKING_URI}",
        ),
    ] = None,
    keep: Annotated[int, typer.Option(min=1, metavar="N", help="keep what the last N runs of each recipe need")] = 3,
    remove: Annotated[bool, typer.Option("--delete", help="delete what is listed")] = False,
    wait: WaitOption = 0,
) -> None:
    """List the artifacts that no alias, pinned version or recent run needs; --delete deletes them."""
    from rich.filesize import decimal

    from sensmerge.pipeline.store.garbage import delete, find_garbage, needed_artifacts
    from sensmerge.pipeline.tracking.versions import known_versions, mark_deleted

    check_exists(store)
    console = Console()
    with store.lock(wait):
        versions = known_versions(store, tracking_uri)
        needed = needed_artifacts(store, keep, chain.from_iterable(versions.values()))
        garbage = find_garbage(store, needed)
        for name, size in garbage.freed.items():
            console.print(f"{name}: {decimal(size)}", highlight=False, soft_wrap=True)
        marked = mark_deleted(store, delete(store, garbage), versions) if remove else []
    for one in marked:
        console.print(f"{one.recipe}/{one.number}: its weights are deleted", highlight=False, soft_wrap=True)
    total = decimal(sum(garbage.freed.values()))
    for why in sorted(set(needed.values())):
        console.print(f"kept: {why}", highlight=False, soft_wrap=True)
    done = "freed" if remove else "can be freed with --delete"
    console.print(f"{total} {done}", highlight=False)


def check_exists(store: Store) -> None:
    """Refuse a store in a folder that is not there.

    Raises:
        InputError: there is no such folder.
    """
    if store.remote is None and not store.root.is_dir():
        raise InputError(f"--store {store}: no such folder; name the store of earlier runs")


@app.command("import")
def import_(
    configuration: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="a configuration of mergekit (YAML)", show_default=False)
    ],
) -> None:
    """Print the recipe that merges what a configuration of mergekit merges."""
    import yaml

    from sensmerge.pipeline.recipe.load import checked, read_recipe
    from sensmerge.pipeline.recipe.mergekit import with_whole_paths

    recipe, folder = read_recipe(configuration), configuration.absolute().parent
    checked(recipe, configuration)  # what the schema refuses is said now
    if folder != Path.cwd():
        recipe = with_whole_paths(recipe, folder)  # nobody knows where the recipe will lie
    sys.stdout.write(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))


@app.command()
def export(
    recipe: RecipePath,
    variant: Annotated[str, typer.Option("--variant", metavar="NAME", help="one of the recipe's merges")],
    store: StoreOption = DEFAULT_STORE,
    overrides: SetOption = None,
) -> None:
    """Print a configuration of mergekit that makes what a variant of a recipe makes."""
    from sensmerge.pipeline.export import export as exported

    sys.stdout.write(exported(recipe, overrides or (), variant, store, Console(stderr=True)))


@app.command()
def extract(
    base: Annotated[str, typer.Argument(metavar="BASE", help="model that was fine-tuned: folder or hub:ORG/NAME@REV")],
    expert: Annotated[str, typer.Argument(metavar="EXPERT", help="the fine-tune")],
    rank: Annotated[
        str,
        typer.Option(metavar="RANK", help="of the factors; below 1: share of each task vector's squared norm to keep"),
    ],
    folder: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="folder to make")],
    whole: Annotated[
        bool, typer.Option("--whole", help="store norms, embeddings and the like whole where they changed")
    ] = False,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Write a fine-tune as a LoRA adapter of the rank given, and print what it lacks of the fine-tune."""
    from sensmerge.pipeline.extract import extract_adapter, parse_rank

    extract_adapter((base, expert), parse_rank(rank), whole, folder, store.hub_cache, Console())


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for use in editors."""
    from sensmerge.pipeline.recipe.schema import Recipe

    sys.stdout.write(json.dumps(Recipe.model_json_schema(), indent=2) + "\n")


def _print_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print what nothing expected, as Python does, but without what is secret in URLs."""
    sys.stderr.write(public_text("".join(traceback.format_exception(kind, error, trace))))


def main() -> None:
    """Run the command line: bad input is one line on standard error and exit status 2, a failed step exit status 1.

    Told to stop by a signal, it says so and exits with status 128 + number of the signal.
    """
    # Ray 2.60 warns at every task that it will one day leave CUDA_VISIBLE_DEVICES alone; this is the future behaviour.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # On its way out the interpreter would look through all modules for garbage, for more than a second.
    atexit.register(gc.freeze)
    sys.excepthook = _print_exception
    try:
        typer.main.get_command(app)()  # app() itself would have tracebacks printed by Python, whatever they show
    except InputError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(2)
    except StepError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    except OSError as error:
        trouble = disk_trouble(error)
        if trouble is None:
            raise
        sys.stderr.write(f"error: {trouble}\n")
        sys.exit(1)
    except Stopped as stopped:
        sys.stderr.write(f"error: stopped by {stopped}; run it again to finish\n")
        sys.exit(stopped.exit_status)
