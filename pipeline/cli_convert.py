"""Commands that turn recipes and models into other forms of them."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from sensmerge.pipeline.arguments import DEFAULT_STORE, RecipePath, SetOption, StoreOption
from sensmerge.pipeline.console import console_of


def import_(
    configuration: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="a configuration of mergekit (YAML)", show_default=False)
    ],
) -> None:
    """Print the recipe that merges what a configuration of mergekit merges."""
    import yaml

    from sensmerge.pipeline.recipe.load import checked, read_recipe
    from sensmerge.pipeline.recipe.mergekit import with_whole_paths

    recipe, folder = read_recipe(configuration, only_mergekit=True), configuration.absolute().parent
    checked(recipe, configuration)  # what the schema refuses is said now
    if folder != Path.cwd():
        recipe = with_whole_paths(recipe, folder)  # nobody knows where the recipe will lie
    sys.stdout.write(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))


def export(
    recipe: RecipePath,
    variant: Annotated[str, typer.Option("--variant", metavar="NAME", help="one of the recipe's merges")],
    store: StoreOption = DEFAULT_STORE,
    overrides: SetOption = None,
) -> None:
    """Print a configuration of mergekit that makes what a variant of a recipe makes."""
    from sensmerge.pipeline.export import export as exported

    sys.stdout.write(exported(recipe, overrides or (), variant, store, console_of(stderr=True)))


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

    extract_adapter((base, expert), parse_rank(rank), whole, folder, store.hub_cache, console_of())
