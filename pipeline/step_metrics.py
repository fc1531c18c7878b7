"""Finished steps as metrics of Ray, which every node offers to Prometheus."""

from ray.util.metrics import Counter, Histogram

from pipeline.plan import Step
from pipeline.worker import Done

SECONDS = [1.0, 10.0, 60.0, 600.0, 3600.0, 36000.0]
"""Bounds of the histogram of times."""
TAGS = ("recipe", "stage")


class StepMetrics:
    """`ray_sensmerge_steps_total`, `ray_sensmerge_bytes_total` and `ray_sensmerge_step_seconds`, by recipe and stage.

    Ray collects them every 10 seconds.
    """

    def __init__(self, recipe: str) -> None:
        """Begin to count; Ray is connected."""
        self._recipe = recipe
        self._steps = Counter("sensmerge_steps", "Steps that have ended well.", TAGS)
        self._bytes = Counter("sensmerge_bytes", "Bytes of their artifacts.", TAGS)
        self._seconds = Histogram("sensmerge_step_seconds", "Time of a step on the workers.", SECONDS, TAGS)

    def count(self, step: Step, done: Done) -> None:
        """Count a step that has ended well."""
        tags = {"recipe": self._recipe, "stage": step.stage}
        self._steps.inc(1, tags)
        if done.bytes:
            self._bytes.inc(done.bytes, tags)
        self._seconds.observe(max(done.spent.seconds, 1e-3), tags)
