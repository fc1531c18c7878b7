"""The command line: python -m pipeline plan | run | predict | schema."""

import atexit
import gc
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pipeline.models import list_models
from pipeline.recipe import Recipe, load_recipe
from pipeline.store import Store
from tasks.artifacts import write_json
from tasks.errors import InputError, StepError

app = typer.Typer(
    name="sensmerge",
    help="Merge fine-tuned experts of one base model into one model, without training.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file; see `schema` for its keys")]
StoreOption = Annotated[Path, typer.Option("--store", metavar="DIR", help="folder of all artifacts")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="override one value of the recipe; repeatable")
]
TrackingOption = Annotated[
    str | None,
    typer.Option("--tracking-uri", metavar="URI", help="MLflow server or database; default: mlflow.db in the store"),
]
AddressOption = Annotated[
    str | None,
    typer.Option("--address", metavar="RAY", help="Ray cluster; default: RAY_ADDRESS, else Ray on this machine"),
]
ReportOption = Annotated[Path | None, typer.Option("--report", metavar="FILE", help="write the result as JSON")]

DEFAULT_STORE = Path("store")


@app.command()
def plan(recipe: RecipePath, store: StoreOption = DEFAULT_STORE, overrides: SetOption = None) -> None:
    """Print every step, RUN or SKIP and why, and the bytes to read and write. Finds bad input; does no work."""
    loaded, target, folder = load_recipe(recipe, overrides or ()), Store(store.absolute()), recipe.absolute().parent
    target.make()
    with ThreadPoolExecutor(1) as beside, _quick_imports():
        # Files are hashed while transformers is imported, which takes seconds as well.
        listings = beside.submit(list_models, loaded, folder, target.hub_cache)

        from pipeline.plan import make_plan, plan_table

    Console().print(plan_table(make_plan(loaded, folder, target, listings.result())))


@app.command()
def run(
    recipe: RecipePath,
    store: StoreOption = DEFAULT_STORE,
    overrides: SetOption = None,
    tracking_uri: TrackingOption = None,
    address: AddressOption = None,
    report: ReportOption = None,
) -> None:
    """Run all stages of a recipe, as far as the store lacks their results, and print the scores."""
    console = Console()
    loaded = load_recipe(recipe, overrides or ())
    if report is not None and report.is_dir():
        raise InputError(f"--report {report}: is a folder; name a file in it")
    if report is not None and not report.absolute().parent.is_dir():
        raise InputError(f"--report {report}: folder {report.absolute().parent} does not exist; make it first")
    locked, folder = Store(store.absolute()), recipe.absolute().parent
    with locked.lock(), ThreadPoolExecutor(1) as beside:
        # Files are hashed while transformers, MLflow, Ray and matplotlib are imported, which takes seconds as well.
        listings = beside.submit(list_models, loaded, folder, locked.hub_cache)
        with _quick_imports():
            from pipeline import tracking
            from pipeline.card import write_cards
            from pipeline.plan import make_plan, plan_summary, plan_table
            from pipeline.report import route_table, route_warnings, score_table
            from pipeline.results import collect, data_sets
            from pipeline.run import execute

        uri = tracking_uri or tracking.default_uri(locked.root)
        tracking.check_server(uri)
        planned = make_plan(loaded, folder, locked, listings.result())
        console.print(plan_summary(planned), highlight=False)
        execute(planned, address, console)
        result = collect(planned)
        recipe_text = recipe_yaml(loaded)
        write_cards(planned, result, recipe_text)
        if report is not None:
            write_json(report, result.model_dump())
        if result.tasks:
            console.print(score_table(result))
        if result.routes:
            console.print(route_table(result))
        for warning in route_warnings(result):
            console.print(warning, highlight=False, soft_wrap=True)
        for name in loaded.merges:
            console.print(f"{name}: {result.models[name]}", highlight=False, soft_wrap=True)
        where = tracking.record(result, recipe_text, _text(plan_table(planned)), data_sets(planned), uri, locked.root)
    shown = where if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"
    console.print(f"MLflow: {shown}", highlight=False, soft_wrap=True)


@app.command()
def predict(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="dynamic model, as `run` makes it")],
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="JSON Lines file with a text in each row")],
    target: Annotated[Path, typer.Argument(metavar="OUTPUT", help="JSON Lines file to write")],
    field: Annotated[str, typer.Option(metavar="NAME", help="field of the row that holds the text")] = "text",
    batch_size: Annotated[int, typer.Option(min=1, help="rows that a worker answers at once")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest continuation; language models")] = 64,
    workers: Annotated[
        int | None, typer.Option(min=1, help="how many; each loads the model. Default: as many as the cluster has room")
    ] = None,
    num_gpus: Annotated[float, typer.Option(min=0, help="GPUs of each worker; with any, the model runs on cuda")] = 0,
    address: AddressOption = None,
) -> None:
    """Answer every row of a file by a dynamic model: the row, its prediction, expert and coefficients."""
    from pipeline.predict import predict_file
    from pipeline.run import Workers

    console = Console()
    rows = predict_file(
        folder, source, target, field, batch_size, max_new_tokens, Workers(workers, num_gpus), address, console
    )
    console.print(f"{target}: {rows} rows", highlight=False, soft_wrap=True)


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    sys.stdout.write(json.dumps(Recipe.model_json_schema(), indent=2) + "\n")


@contextmanager
def _quick_imports() -> Iterator[None]:
    """Import without looking for garbage among a million new objects that all stay: that takes a fifth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def recipe_yaml(recipe: Recipe) -> str:
    """Return a recipe, overrides applied, as YAML that says no more than was set."""
    import yaml

    return yaml.safe_dump(recipe.model_dump(by_alias=True, exclude_unset=True), sort_keys=False, allow_unicode=True)


def _text(table: object) -> str:
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def main() -> None:
    """Run the command line: bad input is one line on standard error and exit status 2, a failed step exit status 1."""
    # Ray 2.60 warns at every task that it will one day leave CUDA_VISIBLE_DEVICES alone; this is the future behaviour.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # On its way out the interpreter would look through all modules for garbage, for more than a second.
    atexit.register(gc.freeze)
    try:
        app()
    except InputError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(2)
    except StepError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
