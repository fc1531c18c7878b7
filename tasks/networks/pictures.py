"""Pictures as a network reads them: decoded, and prepared by the model's own image processor.

torch and transformers are imported where they are used: kinds of task, which a recipe is read by, are made of this.
"""

import base64
import binascii
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal
from warnings import catch_warnings, simplefilter

from PIL import Image, ImageOps, UnidentifiedImageError

from sensmerge.tasks.artifacts import file_bytes
from sensmerge.tasks.checkpoints.companions import CONFIG
from sensmerge.tasks.errors import InputError, shown

if TYPE_CHECKING:
    from torch import Tensor

Reads = Literal["texts", "pictures"]
"""What networks read."""
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""Files that an image processor may be described in."""
PIXELS = "pixel_values"
"""What networks call the pictures that they read."""
LARGEST = 8192
"""Side of a picture that networks read, at most."""
_NARROW = {"I", "F"}
"""Modes of Pillow, and how those of 16 bits begin, of which a conversion to 8 bits a channel would cut all bright
values off."""


def has_image_processor(folder: Path) -> bool:
    """Return whether a folder holds an image processor of its own."""
    return any((folder / name).is_file() for name in PROCESSOR_FILES)


def load_image_processor(folder: Path) -> Any:
    """Load the image processor of a model folder, always the one that works with Pillow.

    The other one, of torchvision, gives slightly different numbers: what is computed may not depend on whether that is
    installed.

    Raises:
        InputError: there is none, or it needs code of its own.
    """
    import transformers

    from sensmerge.tasks.networks.foreign import check_foreign

    if not has_image_processor(folder):
        raise InputError(
            f"{folder}: no {PROCESSOR_FILES[0]}, which says how pictures become what the model reads; copy the one of "
            "the model that it was made from"
        )
    for name in (CONFIG, *PROCESSOR_FILES):
        if (folder / name).is_file():
            check_foreign(folder / name)
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it says that torchvision is not there
    try:
        found = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, backend="pil")
        _check_sizes(folder, found.to_dict())
    except InputError:
        raise
    except Exception as error:  # settings of wrong types are found by those who use them
        reason = " ".join(str(error).split())
        raise InputError(f"{folder}: no usable image processor ({reason}); get its files again") from error
    finally:
        transformers.logging.set_verbosity(level)
    return found


def _check_sizes(folder: Path, settings: Mapping[str, Any]) -> None:
    """Check that pictures become no larger than any network takes: it would take all memory."""
    for key in ("size", "crop_size", "pad_size"):
        sizes = settings.get(key)
        for side, value in sizes.items() if isinstance(sizes, Mapping) else ():
            if isinstance(value, int) and value > LARGEST:
                raise InputError(
                    f"{folder / PROCESSOR_FILES[0]}: {key}.{side} is {shown(value)}; expected at most {LARGEST:,}"
                )


@dataclass(frozen=True)
class Picture:
    """A picture that a network reads, as its file: decoded where it is needed, for pixels take far more memory."""

    file: bytes
    processor: Any
    where: str
    """names it in messages"""

    def pixels(self) -> "Tensor":
        """Return what the network reads, (channels, height, width), float32.

        Raises:
            InputError: the file holds no picture that can be read, or one of more than 8 bits a channel.
        """
        import torch

        image = self._decoded()
        try:
            found = self.processor(image, return_tensors="np")[PIXELS][0]
        except Exception as error:  # what processors make of pictures that are a pixel high may be anything
            raise InputError(
                f"{self.where}: the model's image processor cannot prepare it ({_line(error)}); repair the picture, "
                "or leave the row out"
            ) from error
        pixels = torch.from_numpy(found).float()
        if pixels.dim() != 3:
            raise InputError(
                f"{self.where}: the model's image processor makes {tuple(pixels.shape)} of it; expected one picture, "
                "(channels, height, width)"
            )
        return pixels

    @cached_property
    def read(self) -> tuple[tuple[int, ...], bytes]:
        """Shape and sha256 of the pixels: what two pictures share that are the same to the network."""
        pixels = self.pixels()
        return tuple(pixels.shape), hashlib.sha256(pixels.numpy().tobytes()).digest()

    def _decoded(self) -> Any:
        try:
            with catch_warnings():  # of a few bytes that become gigabytes
                simplefilter("error", Image.DecompressionBombWarning)
                image = Image.open(io.BytesIO(self.file))
            with image:
                image.load()
                # As cameras mark pictures, and as `datasets` gives them to those who train on them.
                turned = ImageOps.exif_transpose(image)
        except Exception as error:  # each format has its own for a broken file
            found = f"{len(self.file):,} bytes that begin with {shown(self.file[:8])}"
            why = "" if isinstance(error, UnidentifiedImageError) else f" ({_line(error)})"
            raise InputError(
                f"{self.where} is {found}; expected a picture in a format that Pillow reads{why}: repair it, or leave "
                "the row out"
            ) from error
        if turned.mode in _NARROW or turned.mode.startswith("I;"):
            raise InputError(
                f"{self.where} has more than 8 bits a channel (mode {turned.mode}); expected at most 8: save it so"
            )
        return turned.convert("RGB")


def picture_bytes(value: Any, where: str) -> bytes:
    """Return the file of a picture that stands in a row of JSON.

    Args:
        value: the file in base64, also as a `data:` URL, or bytes.
        where: names it in messages.

    Raises:
        InputError: it is neither.
    """
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise InputError(
            f"{where} is {_kind(value)}; expected a picture: the bytes of its file, these in base64, or its path"
        )
    text = value.partition(",")[2] if value.startswith("data:") else value
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(
            f"{where} is {shown(value[:40])}; expected a picture: the bytes of its file, these in base64, or its path"
        ) from error


def picture_file(value: Any, folder: Path | None, where: str) -> bytes:
    """Return the file of a picture, which may be named by its path.

    Args:
        value: as `picture_bytes` takes it, or a path.
        folder: that paths have to lie below; None where there is none.
        where: names it in messages.

    Raises:
        InputError: as `picture_bytes`; a path that leads elsewhere: anyone may have written the rows.
    """
    # The name of a picture's file has an extension, and base64 has no dot.
    if not isinstance(value, str) or "." not in value or value.startswith("data:"):
        return picture_bytes(value, where)
    parts = PurePosixPath(value.replace("\\", "/"))
    if folder is None or parts.is_absolute() or ".." in parts.parts or "://" in value:
        expected = "the picture's bytes in base64" if folder is None else f"a path below {folder}, or these in base64"
        raise InputError(f"{where} is {shown(value)}; expected {expected}")
    try:
        return file_bytes(folder / parts)
    except OSError as error:
        raise InputError(f"{where} is {shown(value)}: {folder / parts} cannot be read ({error.strerror})") from error


def picture_text(file: bytes) -> str:
    """Return the file of a picture as a row of JSON has it, in base64."""
    return base64.b64encode(file).decode()


def _kind(value: Any) -> str:
    return "an object" if isinstance(value, Mapping) else f"a {type(value).__name__}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
