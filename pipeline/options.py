"""The options of a command that runs a recipe."""

from dataclasses import dataclass
from pathlib import Path

from sensmerge.pipeline.recipe.schema import Recipe
from sensmerge.pipeline.store.store import Store
from sensmerge.pipeline.tracking.uri import default_uri


@dataclass(frozen=True)
class Options:
    """A recipe, and where it runs and is recorded."""

    recipe: Recipe
    folder: Path
    """what the recipe's relative paths are relative to"""
    store: Store
    tracking_uri: str | None
    """`--tracking-uri` or `MLFLOW_TRACKING_URI`; None: the database in the store"""
    address: str | None
    """Ray cluster; None: RAY_ADDRESS, else Ray on this machine"""
    report: Path | None
    """file for the result as JSON"""
    wait: float
    """seconds to wait for another run on the same store"""
    metrics: bool
    """whether Ray counts the steps, and MLflow gets system metrics"""
    webhook: str | None = None
    """address that is told of a refused gate"""

    @property
    def uri(self) -> str:
        """Where runs are recorded.

        Raises:
            InputError: as `default_uri`.
        """
        return self.tracking_uri or default_uri(self.store)
