"""Kind image_classification: every expert has a classification head of its own, or is given one, and reads pictures.

Records are those of `classification`. A row has the picture's file in base64: JSON has no bytes, and workers see no
other files.
"""

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from sensmerge.tasks.identity import Local
from sensmerge.tasks.kinds.classification import ClassTask, class_index
from sensmerge.tasks.kinds.kind import KINDS, Labels
from sensmerge.tasks.kinds.sample import Sample
from sensmerge.tasks.kinds.zero_shot import ZeroShot
from sensmerge.tasks.networks.pictures import PIXELS, Picture, Reads, picture_bytes, picture_file, picture_text
from sensmerge.tasks.rows.source import Row


@KINDS.register("image_classification")
class ImageClassificationTask(ClassTask):
    """The model reads a picture, and has a classification head of its own for this task."""

    reads: ClassVar[Reads] = "pictures"
    fields: ClassVar[tuple[str, ...]] = ("image", "label")
    templates: ClassVar[tuple[str, ...]] = ()

    kind: Literal["image_classification"]
    image: str = Field(
        "image",
        description="field with the picture: an `Image` of datasets, the bytes of its file, these in base64, or, in "
        "JSON and CSV, its path below the folder of the rows",
    )

    # What it says of the head counts in the fingerprint of the expert, which has it from then on.
    zero_shot: Local[ZeroShot | None] = Field(
        None,
        description="names of classes, and templates, of which CLIP's text tower makes the head of an expert that is a "
        "vision tower: its own one, or the base's",
    )

    @field_validator("max_length")
    @classmethod
    def _no_length(cls, _: int) -> int:
        raise ValueError("pictures have no tokens to cut; leave it out")

    @property
    def made_head(self) -> ZeroShot | None:
        """See `Task`."""
        return self.zero_shot

    def complete(self, row: Row, folder: Path | None, settings: str, where: str) -> Row:
        """See `RowTask`: the picture's file in base64, in place of its path."""
        value = row.get(self.image)
        if value is None:
            return row
        named = f"{settings}.image names field {self.image!r}, which in {where}"
        return row | {self.image: picture_text(picture_file(value, folder, named))}

    def sample(self, row: Row, tokenizer: Any, where: str, labels: Labels | None = None) -> Sample:
        """See `RowTask`; in place of the tokenizer is the model's image processor."""
        assert labels is not None
        field = f"{where}: field {self.image!r}"
        picture = Picture(picture_bytes(row[self.image], field), tokenizer, field)
        return Sample({PIXELS: picture}, label=class_index(row[self.label], labels, where))

    def asked(self, row: Row) -> Mapping[str, str]:
        """See `ClassTask`: the size of the picture's file, and by which digest people find it."""
        file = picture_bytes(row[self.image], f"field {self.image!r}")
        return {"prompt": f"{len(file)} bytes, sha256 {sha256(file).hexdigest()}"}
