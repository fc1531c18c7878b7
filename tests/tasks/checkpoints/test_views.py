"""Tensors that are put together of rows of stored ones."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sensmerge.tasks.checkpoints.checkpoint import FilesNeeded, open_checkpoint, viewed
from sensmerge.tasks.checkpoints.header import read_header
from sensmerge.tasks.checkpoints.views import (
    VIEWS,
    Gathered,
    Place,
    RowChange,
    VocabularyView,
    gather,
    read_view,
    write_view,
)
from sensmerge.tasks.checkpoints.vocabulary import ModelRow

SOURCES = {
    0: (ModelRow("base", 2),),
    1: (ModelRow("a", 1),),
    2: (ModelRow("a", 2),),
    3: (),
    4: (ModelRow("base", 0), ModelRow("a", 3)),
    5: (ModelRow("lora", 1),),
}
"""Of six rows; a seventh and an eighth have none."""


@pytest.mark.parametrize(("axis", "dtype"), [(0, torch.float32), (1, torch.float32), (0, torch.bfloat16)])
def test_rows_of_several_files(axis: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """Own rows, others', a mean, zeros, an adapter's changed row, and the mean of all for those that have none."""
    generator = torch.Generator().manual_seed(0)
    stored = {name: torch.randn(5, 3, generator=generator) for name in ("base", "a")}
    first, second = torch.randn(2, 5, generator=generator), torch.randn(3, 2, generator=generator)
    for name, rows in stored.items():
        (tmp_path / name).mkdir()
        tensor = rows if axis == 0 else rows.T
        save_file({"w": tensor.to(dtype).contiguous(), "other": torch.ones(2)}, tmp_path / name / "model.safetensors")
    save_file({"A": first, "B": second}, tmp_path / "lora.safetensors")

    def place(row: ModelRow) -> Place:
        change = RowChange(str(tmp_path), "lora.safetensors", "A", "B", 0.5, by_columns=True)
        owner = "base" if row.model == "lora" else row.model
        return Place(
            str(tmp_path / owner), "model.safetensors", "w", row.number, change if row.model == "lora" else None
        )

    code = "F32" if dtype == torch.float32 else "BF16"
    shape = (8, 3) if axis == 0 else (3, 8)
    how = gather(Gathered(axis, code, shape, "model.safetensors", ()), SOURCES, place)
    folder = tmp_path / VIEWS / "one"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").symlink_to(tmp_path / "a" / "model.safetensors")
    view = VocabularyView({"w": how}, (), ())
    write_view(view, folder)
    assert read_view(folder) == view

    checkpoint = open_checkpoint(folder)
    assert checkpoint.tensors["w"].shape == shape
    assert torch.equal(checkpoint.read("other"), torch.ones(2))
    base, a = (rows.to(dtype).double() for rows in stored.values())
    delta = 0.5 * (second.double() @ first.double())[:, 1]
    expected = torch.stack([base[2], a[1], a[2], torch.zeros(3), (base[0] + a[3]) / 2, base[1] + delta])
    expected = torch.cat([expected, expected.mean(0).expand(2, 3)])
    found = checkpoint.read("w").double()
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found if axis == 0 else found.T, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal((found if axis == 0 else found.T)[:3], expected[:3])  # rows of one model are copied

    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(FilesNeeded) as needed:
        checkpoint.require("w")
    assert (needed.value.folder, needed.value.files) == (tmp_path / "base", ["model.safetensors"])


def test_a_folder_elsewhere_is_no_view(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    write_view(VocabularyView({"w": Gathered(0, "F32", (9,), "/etc/passwd", ())}, (), ()), tmp_path)
    assert read_view(tmp_path) is None
    plain = open_checkpoint(tmp_path)
    assert viewed(plain) is plain
    assert plain.tensors == read_header(tmp_path / "model.safetensors")
