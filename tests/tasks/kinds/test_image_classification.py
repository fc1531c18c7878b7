"""Rows with pictures as samples: which files are read, what the network gets of them, and what is refused."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.image_classification import ImageClassificationTask
from tests.pictures import PROCESSOR, SIZE, in_base64, picture, pixels_of

TASK = ImageClassificationTask(kind="image_classification")
CLASSES = {"dark": 0, "bright": 1}
FILE = picture(3, 1)


def completed(value: Any, folder: Path | None = None) -> Any:
    return TASK.complete({"image": value, "label": 1}, folder, "tasks.a", "row 7")["image"]


def pixels(file: bytes) -> torch.Tensor:
    sample = TASK.sample({"image": in_base64(file), "label": "bright"}, PROCESSOR, "row 7", CLASSES)
    assert sample.label == 1
    found: torch.Tensor = sample.inputs["pixel_values"].pixels()
    return found


def saved(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_the_network_reads_what_the_processor_makes_of_the_file(form: str) -> None:
    file = picture(3, 1, form)
    found = pixels(file)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, pixels_of(file), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_other_modes_become_colours(mode: str) -> None:
    image = Image.open(io.BytesIO(FILE)).convert(mode)
    file = saved(image, "TIFF" if mode == "CMYK" else "PNG")
    assert pixels(file).shape == (3, SIZE, SIZE)


def test_a_camera_that_was_turned() -> None:
    image = Image.open(io.BytesIO(FILE))
    exif = Image.Exif()
    exif[0x0112] = 6  # its right side is the top
    turned = saved(image, "PNG", exif=exif)
    torch.testing.assert_close(pixels(turned), pixels_of(saved(image.rotate(-90, expand=True))), atol=1e-5, rtol=0)


def test_a_row_travels_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(FILE)
    text = in_base64(FILE)
    for given in (FILE, text, f"data:image/png;base64,{text}", f"{text[:40]}\n{text[40:]}"):
        assert completed(given) == text
    assert completed("in/a.png", tmp_path) == text
    assert TASK.complete({"label": 1}, None, "tasks.a", "row 7") == {"label": 1}


@pytest.mark.parametrize("path", ["../a.png", "/etc/a.png", "in/../../a.png", "s3://bucket/a.png"])
def test_paths_that_lead_elsewhere(path: str, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    (folder / "in").mkdir(parents=True)
    (tmp_path / "a.png").write_bytes(FILE)
    with pytest.raises(InputError, match=r"^tasks\.a\.image names field 'image', which in row 7 is .*; expected a p"):
        completed(path, folder)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"row 7 is 'b\.png': .*/b\.png cannot be read \(No such file"):
        completed("b.png", tmp_path)
    with pytest.raises(InputError, match=r"row 7 is 'b\.png'; expected the picture's bytes in base64"):
        completed("b.png")
    os.mkfifo(tmp_path / "b.png")
    with pytest.raises(InputError, match=r"row 7 is 'b\.png': .*/b\.png cannot be read \(not a regular file"):
        completed("b.png", tmp_path)


@pytest.mark.parametrize(("value", "found"), [(3, "a int"), ({"path": "a"}, "an object"), ("no base", "'no base'")])
def test_what_is_no_picture(value: Any, found: str) -> None:
    with pytest.raises(InputError, match=f"which in row 7 is {found}; expected a picture: the bytes of its file"):
        completed(value)


@pytest.mark.parametrize("file", [b"", b"a text", FILE[:60], b"<svg></svg>"])
def test_files_that_are_no_pictures(file: bytes) -> None:
    with pytest.raises(InputError, match=r"^row 7: field 'image' is \d+ bytes that begin with b'.*expected a picture"):
        pixels(file)


def test_a_picture_of_more_pixels_than_anyone_needs() -> None:
    with pytest.raises(InputError, match=r"bytes that begin with b'.*100000000 pixels\) exceeds limit"):
        pixels(saved(Image.new("1", (10_000, 10_000))))


def test_more_than_8_bits_are_not_cut_off() -> None:
    deep = Image.fromarray(np.full((4, 4), 40_000, np.uint16))
    with pytest.raises(InputError, match=r"^row 7: field 'image' has more than 8 bits a channel \(mode I;16\)"):
        pixels(saved(deep))


def test_classes_are_those_of_the_expert() -> None:
    with pytest.raises(InputError, match="row 7: label is 'grey', expected one of the expert's 2 classes: 0 dark, 1"):
        TASK.sample({"image": in_base64(FILE), "label": "grey"}, PROCESSOR, "row 7", CLASSES)


def test_pictures_are_the_same_if_their_pixels_are() -> None:
    png, bmp = (
        TASK.sample({"image": in_base64(picture(3, 1, form)), "label": 1}, PROCESSOR, "", CLASSES)
        for form in ("PNG", "BMP")
    )
    assert png.content == bmp.content
    other = TASK.sample({"image": in_base64(picture(4, 1)), "label": 1}, PROCESSOR, "", CLASSES)
    assert other.content != png.content


def test_pictures_have_no_length() -> None:
    with pytest.raises(ValidationError, match="pictures have no tokens to cut"):
        ImageClassificationTask(kind="image_classification", max_length=8)
