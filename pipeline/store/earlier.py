"""What a step may take over from the artifacts of earlier runs."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sensmerge.pipeline.store.store import Key, Store
from sensmerge.pipeline.store.verify import damaged_files, is_intact


@dataclass(frozen=True)
class EarlierArtifacts:
    """The artifacts of a step's stage, as `tasks.stages.job.Earlier` asks for them."""

    store: Store
    key: Key
    """of the step"""

    def newest(self) -> Path | None:
        """Return the newest artifact of the same stage and name, whether whole or damaged; None if there is none."""
        return self.store.last(self.key)

    def last(self) -> Path | None:
        """Return the newest artifact of the same stage and name; None if there is none, or it is damaged."""
        last = self.newest()
        return None if last is None or any(damaged_files(last)) else last

    def artifacts(self) -> Iterator[Path]:
        """Yield all artifacts of the stage."""
        yield from self.store.artifacts(self.key.stage)

    def is_intact(self, folder: Path, name: str) -> bool:
        """Return whether a file of an artifact is as it was written."""
        return is_intact(folder, name)
