"""One unit of work of a stage, and what all steps are laid out from."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from sensmerge.pipeline.plan.inputs import Inputs
from sensmerge.pipeline.recipe.schema import Recipe
from sensmerge.pipeline.recipe.stage import Stage
from sensmerge.pipeline.store.store import Key, Store
from sensmerge.tasks.artifacts import Artifact
from sensmerge.tasks.checkpoints.unchanged import NONE, PlannedModels
from sensmerge.tasks.kinds.kind import RowSet, RowTask
from sensmerge.tasks.rows.stored import StoredRows
from sensmerge.tasks.stages.job import Job

if TYPE_CHECKING:  # with transformers it takes seconds
    from sensmerge.pipeline.plan.placement import PlacementChoice
    from sensmerge.pipeline.plan.rows import TaskRows

Split = Literal["calibration", "tuning", "held_out", "evaluation"]
"""Of a task's rows."""


@dataclass(frozen=True)
class Resolved:
    """A recipe with its models and data, from which steps are laid out."""

    recipe: Recipe
    store: Store
    inputs: Inputs
    placements: "Mapping[Stage, PlacementChoice]"
    """of the stages whose networks may run in several ways"""
    inseparable: Collection[str]
    """tasks whose experts' heads are not run apart from their trunks: models are scored whole on them"""

    def rows(self, task: str, split: Split) -> StoredRows:
        """Return the rows of a task as its steps read them."""
        return StoredRows.of(getattr(self.inputs.data[task], split), self.store.rows)

    def row_sets(self, split: Split) -> dict[str, RowSet]:
        """Return the rows of every expert's task, in the order of the experts."""
        sets = {}
        for name in self.recipe.experts:
            one = self.inputs.data.get(name)
            if one is not None and isinstance(one.task, RowTask):
                sets[name] = RowSet(self.task(one, split), self.rows(name, split), self.labels(name, one))
        return sets

    def task(self, one: "TaskRows", split: Split) -> Any:
        """Return a task as rows of a split are scored on it."""
        is_tuned_on = split in ("tuning", "held_out")
        return one.task.for_tuning() if is_tuned_on and isinstance(one.task, RowTask) else one.task

    def labels(self, name: str, one: "TaskRows") -> Mapping[str, int] | None:
        """Return the classes of a task's own expert."""
        return dict(self.inputs.networks.experts[name].config.label2id) if one.task.has_own_head else None

    def write_rows(self) -> None:
        """Write the rows of all tasks to the files that steps read."""
        for one in self.inputs.data.values():
            for rows in (one.calibration, one.tuning, one.held_out, one.evaluation):
                StoredRows.of(rows, self.store.rows).write(rows)
        self.store.upload_rows()


@dataclass(frozen=True)
class Step:
    """One unit of work of a stage."""

    name: str
    key: Key
    needs: tuple[str, ...]
    """titles of the steps that must be done before"""
    job: Job
    reads: int = 0
    """bytes read"""
    writes: int = 0
    """bytes written"""
    actors: int = 0
    """workers that it starts for itself, each with the resources of the stage; then it takes none of its own"""
    models: PlannedModels = NONE
    """from outside, that it reads"""

    @property
    def stage(self) -> Stage:
        """The stage that it is a step of."""
        return cast(Stage, self.key.stage)

    @property
    def title(self) -> str:
        """The step as logs and errors name it."""
        return f"{self.stage} {self.name}"

    def artifact(self, store: Store) -> Artifact:
        """Return what it makes."""
        return Artifact(self.key.fingerprint, store.folder(self.key))
