"""What a step does. Every stage has a job: a frozen dataclass whose fields are all that the step reads, and how."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from sensmerge.tasks.checkpoints.sparse import Tensors
from sensmerge.tasks.identity import identity


class Earlier(Protocol):
    """Artifacts of earlier runs that a step may take results from."""

    def newest(self) -> Path | None:
        """Return the newest artifact of the same stage and name, whether whole or damaged; None if there is none."""

    def last(self) -> Path | None:
        """Return the newest artifact of the same stage and name; None if there is none, or it is damaged."""

    def artifacts(self) -> Iterator[Path]:
        """Yield all artifacts of the stage."""

    def is_intact(self, folder: Path, name: str) -> bool:
        """Return whether a file of an artifact is as it was written."""


@dataclass(frozen=True)
class Job(ABC):
    """One step's work. It goes to the workers once; what it names is small, or is read from files."""

    stage: ClassVar[str]
    version: ClassVar[int]
    """counts up whenever equal inputs give other results than before"""
    uses_torch: ClassVar[bool] = True
    """whether torch computes in it; where it does not, a worker starts without it"""
    resumes: ClassVar[bool] = False
    """whether `finish` takes care of what a try that was interrupted left in the folder; else the folder is emptied,
    unless the job has parts"""

    def identity(self) -> dict[str, Any]:
        """Return all that the result depends on, as JSON: stage, version, and every field that is not local."""
        return {"stage": self.stage, "version": self.version, **identity(self)}

    def resumed(self, earlier: Earlier) -> Self:
        """Return the job with what it can take over from earlier artifacts; called once, as the step begins."""
        return self

    def parts(self) -> Sequence[int | str]:
        """Return what names the pieces that may run side by side before `finish`; doing one twice is harmless."""
        return ()

    def reads(self, part: int | str | None) -> Tensors | None:
        """Return all that a piece reads of the weights of models, or `finish`, for None; None where it is whole files.

        Of a model at a URL, nothing else comes to the machine that does the piece.
        """
        return None

    def run(self, part: int | str, out: Path) -> bool:
        """Do one of the pieces in the folder under construction; return whether there was something left to do."""
        raise NotImplementedError

    def bundles(self) -> Sequence[Sequence[int | str]]:
        """Return the parts in bundles: no two write to the same file. Where machines share no disk, one does a bundle.

        Of several bundles each is completed by `pack`, where its parts were done, and the artifact by `unite`.
        """
        return (self.parts(),)

    def pack(self, bundle: Sequence[int | str], out: Path) -> tuple[list[str], dict[str, Any]]:
        """Complete the files that the parts of a bundle wrote; return their names, and as JSON what `unite` is told."""
        raise NotImplementedError

    def unite(self, packed: Sequence[Mapping[str, Any]], out: Path) -> dict[str, Any]:
        """Complete the artifact as `finish` does, in a folder without the files of the bundles.

        Args:
            packed: what `pack` told of each bundle.
            out: the folder.
        """
        raise NotImplementedError

    @abstractmethod
    def finish(self, out: Path) -> dict[str, Any]:
        """Complete the artifact in its folder, after all pieces; what is returned is kept in the manifest."""
