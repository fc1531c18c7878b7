"""Plans of recipes with nothing left to do, kept in the store and believed while all that they depend on is as it was.

To make a plan takes torch, transformers and the rows of all tasks, which is seconds. Where nothing changed, what was
said then is said again. What cannot be told apart cheaply and surely, such as rows of a data set on the hub, or methods
of other packages, is never kept.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import TypeAdapter
from rich.table import Table

from sensmerge.pipeline.plan.models import model_digest
from sensmerge.pipeline.plan.table import StepRow, step_table
from sensmerge.pipeline.recipe.schema import Recipe
from sensmerge.pipeline.recipe.stage import Stage
from sensmerge.pipeline.store.manifest import PLANS
from sensmerge.pipeline.store.store import Key, Store
from sensmerge.tasks.artifacts import ordered, parse_json, sha256_text, write_json
from sensmerge.tasks.checkpoints.digests import compute_once
from sensmerge.tasks.checkpoints.listing import Listing
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.kind import RowTask
from sensmerge.tasks.rows.tables import TEXT_FORMATS, paths_of

if TYPE_CHECKING:
    from sensmerge.pipeline.plan.plan import Plan

_LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "safetensors", "datasets", "huggingface_hub", "numpy")
_GROUPS = ("sensmerge.methods", "sensmerge.statistics", "sensmerge.kinds")


@dataclass(frozen=True)
class Recorded:
    """What a run found, and where it told MLflow."""

    report: dict[str, Any]
    """as JSON"""
    tracking_uri: str | None
    """without a password; None: the database in the store"""
    mlflow_run: str
    """id of the run in MLflow"""


@dataclass(frozen=True)
class KeptPlan:
    """A plan of which every step is in the store."""

    made_from: str
    """digest of all that the plan depends on"""
    recipe: str
    """its name"""
    steps: list[tuple[str, str, dict[str, Any]]]
    """stage, name and identity of each"""
    lines: list[str]
    """what is to be said of the input"""
    recorded: Recorded | None
    """None where no run that ended with these steps is known"""

    def step_keys(self) -> list[Key]:
        """Return what names the artifacts of all steps."""
        return [Key(stage, name, inputs) for stage, name, inputs in self.steps]

    def summary(self) -> str:
        """Return in a line what is left to do: nothing."""
        return f"{self.recipe}: all {len(self.steps)} steps are in the store"


def keep(plan: "Plan", folder: Path, made_from: str | None, recorded: Recorded | None = None) -> None:
    """Keep a plan as it will be made from now on, if the store has all that its steps make.

    Args:
        plan: of a recipe that has run, or has nothing left to do.
        folder: the recipe's.
        made_from: what `inputs_digest` said before the plan was made: what has changed since is not in it.
        recorded: what the run has found that did these steps; None: what is kept of it stays.
    """
    if made_from is None or plan.undecided or any(plan.store.manifest(step.key) is None for step in plan.steps):
        return
    if inputs_digest(plan.recipe, folder, plan.store, plan.inputs.listings) != made_from:
        return
    earlier = _read(plan.store, plan.recipe.name)
    if recorded is None and earlier is not None and earlier.made_from == made_from:
        recorded = earlier.recorded
    steps = [(key.stage, key.name, dict(key.inputs)) for key in plan.lasting_keys()]
    kept = KeptPlan(made_from, plan.recipe.name, steps, list(plan.inputs.notes), recorded)
    with suppress(OSError):  # a store that may only be read: the next plan takes as long as this one
        (plan.store.root / PLANS).mkdir(exist_ok=True)
        write_json(_path(plan.store, plan.recipe.name), asdict(kept))


def find(recipe: Recipe, folder: Path, store: Store, listings: Mapping[str, Listing]) -> KeptPlan | None:
    """Return the plan of a recipe if one is kept that would be made again; else None.

    Args:
        recipe: the recipe.
        folder: what its relative paths are relative to.
        store: where artifacts are looked for.
        listings: its models, with the digests of all files that are known.
    """
    kept = _read(store, recipe.name)
    if kept is None or kept.made_from != inputs_digest(recipe, folder, store, listings):
        return None
    return kept if all(store.manifest(key) is not None for key in kept.step_keys()) else None


def _read(store: Store, name: str) -> KeptPlan | None:
    """Return the plan that is kept of a recipe; None if there is none, or none that this version has kept."""
    try:
        return TypeAdapter(KeptPlan).validate_python(parse_json(_path(store, name).read_bytes()))
    except (OSError, ValueError):
        return None


def kept_table(kept: KeptPlan) -> Table:
    """Return the plan for people, as `plan_table` does."""
    rows = [StepRow(cast(Stage, stage), name, "SKIP", "in the store") for stage, name, _ in kept.steps]
    return step_table(kept.summary(), rows)


def _path(store: Store, name: str) -> Path:
    return store.root / PLANS / f"{name}.json"


def inputs_digest(recipe: Recipe, folder: Path, store: Store, listings: Mapping[str, Listing]) -> str | None:
    """Return a digest of all that a plan depends on; None if some of it cannot be told."""
    if any(listing.unhashed() for listing in listings.values()) or any(entry_points(group=one) for one in _GROUPS):
        return None
    try:
        rows = {str(path): compute_once(path, store.hub_cache / ".digests") for path in _row_files(recipe, folder)}
    except (InputError, OSError, LookupError):  # what is wrong with them is said when the plan is made
        return None
    models = {name: [str(listing.folder), model_digest(listing)] for name, listing in listings.items()}
    depends = {
        "recipe": recipe.model_dump(mode="json", by_alias=True),
        "disposable": recipe.disposable(),
        "folder": str(folder),
        "models": models,
        "rows": rows,
        **program(),
    }
    return sha256_text(ordered(depends))


def _row_files(recipe: Recipe, folder: Path) -> Iterator[Path]:
    """Yield the files with the rows of all tasks; raises LookupError for rows that are elsewhere."""
    for name, task in recipe.tasks.items():
        if not isinstance(task, RowTask):
            raise LookupError(name)
        for split in ("calibration", "tuning", "evaluation"):
            source = getattr(task, split)
            if source is None:
                continue
            files = source.data_files
            if source.path not in TEXT_FORMATS or not files or "://" in str(files):
                raise LookupError(name)
            for file in [files] if isinstance(files, str) else files:
                yield from paths_of(file, folder, f"tasks.{name}.{split}")


def program() -> dict[str, Any]:
    """Return what tells one state of the program from another: versions of libraries, and a digest of its source."""
    libraries = {name: _version(name) for name in _LIBRARIES} | {"python": sys.version}
    return {"libraries": libraries, "source": _source()}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def rooms() -> list[Path]:
    """Return the folders of the program."""
    return [Path(__file__).parents[1], Path(sys.modules["sensmerge.tasks"].__path__[0])]


def _source() -> str:
    """Return a digest of the program itself."""
    digest = sha256()
    for room in rooms():
        for path in sorted(room.rglob("*.py")):
            digest.update(f"{path.relative_to(room)} {path.stat().st_size} ".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
