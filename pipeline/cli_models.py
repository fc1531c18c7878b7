"""Commands that use merged models and their versions."""

from pathlib import Path
from typing import Annotated

import typer

from sensmerge.pipeline.arguments import DEFAULT_STORE, AddressOption, StoreOption, TrackingOption
from sensmerge.pipeline.console import console_of
from sensmerge.pipeline.execute.stop import stoppable
from sensmerge.pipeline.tracking.uri import checked_uri


def predict(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="folder of a merged model that `run` made")],
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="JSON Lines file, or a folder of pictures")],
    target: Annotated[Path, typer.Argument(metavar="OUTPUT", help="JSON Lines file to write")],
    field: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="field that holds a row's text, messages or picture; default: text or messages, or image",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="rows that a worker answers at once")] = 32,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="task of the recipe whose prompt format all rows use, or, of a static merge, whose head answers; "
            "default: what each row says",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="maximum length of a continuation, in tokens; default: 64")
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="draw the tokens of continuations, logits divided by this; 0: take the likeliest")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="draw from the likeliest tokens whose probabilities add up to this")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="of the draws; equal questions and seeds give equal answers")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="text that ends a continuation; may be given several times")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="number of workers, each with a copy of the model; default: as many as fit in the cluster"
        ),
    ] = None,
    num_gpus: Annotated[float, typer.Option(min=0, help="GPUs for each worker; above 0, the model runs on cuda")] = 0,
    address: AddressOption = None,
) -> None:
    """Answer every row of a file with a merged model, and add the prediction to the row.

    A dynamic model also adds expert and coefficients.
    """
    from sensmerge.pipeline.execute.batches import Workers
    from sensmerge.pipeline.predict import Settings, predict_file
    from sensmerge.tasks.networks.generation import Decoding

    console, decoding = console_of(), Decoding(temperature, top_p, seed, tuple(stop or ()))
    settings = Settings(field, task, batch_size, max_new_tokens, decoding, Workers(workers, num_gpus))
    with stoppable():
        rows = predict_file(folder, source, target, settings, address, console)
    console.print(f"{target}: {rows} rows", highlight=False, soft_wrap=True)


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
    names, means, outcomes = [], [], []
    for text in (first, second):
        recipe, which = parse_version(text)
        registry = ModelRegistry(uri, recipe)
        version = registry.find(which)
        check_whole(version, store)
        names.append(str(version) if text == f"{recipe}/{version.number}" else f"{text}, {version}")
        means.append(registry.mean(version))
        outcomes.append(registry.outcomes(version))
    console_of().print(comparison_table(names, means, judge(outcomes[1], outcomes[0], 0.0)))


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
    console_of().print(f"{found} is champion", highlight=False, soft_wrap=True)


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
    console_of().print(f"{now} is champion again, instead of {before}", highlight=False, soft_wrap=True)
