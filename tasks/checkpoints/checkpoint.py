"""Checkpoint folders of safetensors, read lazily; `planned` writes them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sensmerge.tasks.artifacts import load_object
from sensmerge.tasks.checkpoints import sparse
from sensmerge.tasks.checkpoints.header import TensorInfo, open_file, read_header
from sensmerge.tasks.checkpoints.quantised import WAY_OUT, Scale, dequantised, is_fp8
from sensmerge.tasks.checkpoints.stems import INDEXED, MODEL, SAFETENSORS, find_stem, single_stems
from sensmerge.tasks.checkpoints.views import Gathered, Stretch, Taken, read_view
from sensmerge.tasks.errors import InputError, shown

WEIGHTS = f"{MODEL}{SAFETENSORS}"
INDEX = f"{MODEL}{INDEXED}"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one folder, read one at a time."""

    folder: Path
    tensors: Mapping[str, TensorInfo]
    notes: tuple[str, ...] = ()
    """what a user should know of the files: a line each"""
    stem: str = MODEL
    """of its files' names"""
    scales: Mapping[str, Scale] = field(default_factory=dict)
    """of tensors that are stored in fp8; they are read as bfloat16, which `tensors` says"""
    gathered: Mapping[str, Gathered] = field(default_factory=dict)
    """tensors that are put together of rows of stored ones: those that have a row for every token of a vocabulary"""

    def __post_init__(self) -> None:
        """Refuse tensors in fp8 that nobody has asked to be read.

        Raises:
            InputError: there is one.
        """
        for name, info in self.tensors.items():
            if is_fp8(info):
                raise InputError(
                    f"{self.folder / info.file}: tensor {name} has dtype {info.dtype}, which is quantised; {WAY_OUT}"
                )

    @cached_property
    def _open_files(self) -> dict[tuple[Path, int], Any]:
        return {}

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor in its stored dtype, fp8 as bfloat16; its pages are read when it is used.

        Raises:
            InputError: the file is gone or corrupt, or the tensor did not come with others of it.
        """
        if name in self.gathered:
            return self._gather(name)
        stored, scale = self._stored(self.folder / self.tensors[name].file, name), self.scales.get(name)
        if scale is None:
            return stored
        return scale.times(stored, self._stored(self.folder / scale.file, scale.name) if scale.name else None)

    def _stored(self, path: Path, name: str) -> torch.Tensor:
        # A file that is put in another's place has other holes.
        inode = path.stat().st_ino if path.exists() else 0
        if (path, inode) not in self._open_files:
            self._open_files[path, inode] = open_file(path, "pt")
        sparse.require(path, name)
        tensor: torch.Tensor = self._open_files[path, inode].get_tensor(name)
        return tensor

    def _gather(self, name: str) -> torch.Tensor:
        """Return a tensor that is put together of rows of stored ones."""
        how = self.gathered[name]
        whole = torch.zeros(how.shape, dtype=DTYPES[how.dtype])
        rows = whole.movedim(how.axis, 0)

        for part in how.parts:
            for one in part.stretches:
                rows[one.to : one.to + one.count] = self._rows(part, one, how.axis)
        for place, sources in how.means.items():
            rows[place] = sum(self._rows(one, one.stretches[0], how.axis)[0].float() for one in sources) / len(sources)
        blank = sum(one.count for one in how.blank)
        if blank:
            mean = rows.sum(0, dtype=torch.float32) / (len(rows) - blank)
            for one in how.blank:
                rows[one.to : one.to + one.count] = mean.to(rows.dtype)
        return whole

    def _rows(self, part: Taken, where: Stretch, axis: int) -> torch.Tensor:
        """Return some rows of a stored tensor, which are first in their dimensions, with what comes on top."""
        chosen = slice(where.start, where.start + where.count)
        stored, change = self._stored(part.path, part.tensor).movedim(axis, 0)[chosen], part.change
        if change is None:
            return stored
        file = Path(change.folder) / change.file
        first, second = (self._stored(file, name).float() for name in (change.first, change.second))
        product = (second @ first[:, chosen]).T if change.by_columns else second[chosen] @ first
        return stored.float() + change.scaling * product

    def require(self, *names: str) -> None:
        """Check that the files of some tensors are here, and those of others that their rows are taken from.

        Raises:
            FilesNeeded: one is not.
        """
        places = {name: self.tensors[name].file for name in names}
        lacking = {file for name, file in places.items() if not sparse.is_here(self.folder / file, name)}
        if lacking:
            raise FilesNeeded(self.folder, sorted(lacking))
        for how in [self.gathered[name] for name in names if name in self.gathered]:
            for one in (*how.parts, *(one for sources in how.means.values() for one in sources)):
                stored = [(one.path, one.tensor)]
                if one.change is not None:
                    path = Path(one.change.folder) / one.change.file
                    stored += [(path, one.change.first), (path, one.change.second)]
                for path, tensor in stored:
                    if not sparse.is_here(path, tensor):
                        raise FilesNeeded(path.parent, [path.name])

    def holds_equal(self, first: str, second: str) -> bool:
        """Return whether two tensors have the same dtype, shape and bytes.

        Raises:
            FilesNeeded: their files are not here yet.
        """
        one, other = self.tensors[first], self.tensors[second]
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        self.require(first, second)
        return tensor_bytes(self.read(first)) == tensor_bytes(self.read(second))


class FilesNeeded(Exception):
    """Headers alone do not tell what a model is: some files must be here first."""

    def __init__(self, folder: Path, files: Sequence[str]) -> None:
        """Name a model's folder and the files of it."""
        super().__init__(f"{folder}: {', '.join(files)}")
        self.folder, self.files = folder, files


def open_checkpoint(folder: Path, dequantize: bool = False) -> Checkpoint:
    """Read the headers of a folder with one file of weights, `model.safetensors` say, or shards with an index.

    Args:
        folder: the folder.
        dequantize: whether weights in fp8 are read, as bfloat16.

    Raises:
        InputError: no weights, or several files of which it is not known which counts; an index that names files
            outside the folder or tensors they lack; a corrupt file.
    """
    names = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    stem = find_stem(names)
    if stem is None:
        several = single_stems(names)[:3]
        raise InputError(
            f"{folder}: no {WEIGHTS} and no {INDEX} in it; expected a checkpoint saved as safetensors"
            + (f": of {', '.join(several)}, put the one to merge into a folder of its own" if several else "")
        )
    whole, index = folder / f"{stem}{SAFETENSORS}", folder / f"{stem}{INDEXED}"
    if whole.is_file():
        notes: tuple[str, ...] = ()
        if index.is_file() and index_files(index) != [whole.name]:
            notes = (f"{folder} has both {whole.name} and {index.name}: {whole.name} is read, as transformers does",)
        return viewed(checkpoint_of(folder, read_header(whole), stem, dequantize, notes))
    for file in index_files(index):
        if file not in names:
            raise InputError(f"{index}: names {shown(file)}, which is not in the folder; put the file there")
    tensors = indexed_tensors(index, lambda file: read_header(folder / file))
    return viewed(checkpoint_of(folder, tensors, stem, dequantize))


def checkpoint_of(
    folder: Path, tensors: Mapping[str, TensorInfo], stem: str, dequantize: bool = False, notes: tuple[str, ...] = ()
) -> Checkpoint:
    """Return the checkpoint of headers that were read; see `open_checkpoint`."""
    read, scales = dequantised(tensors, folder) if dequantize else (tensors, {})
    return Checkpoint(folder, read, notes, stem, scales)


def viewed(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint in the vocabulary of merged models, if its folder is a view (`read_view`)."""
    view = read_view(checkpoint.folder)
    if view is None:
        return checkpoint
    tensors = {name: info for name, info in checkpoint.tensors.items() if name not in view.left_out}
    tensors |= {name: TensorInfo(how.dtype, how.shape, how.file) for name, how in view.tensors.items()}
    return replace(checkpoint, tensors=tensors, gathered=view.tensors)


def indexed_tensors(index: Path, header: Callable[[str], Mapping[str, TensorInfo]]) -> dict[str, TensorInfo]:
    """Return the tensors of a sharded checkpoint: where two shards hold one, the index says which counts.

    Args:
        index: the index file.
        header: reads the header of a shard.

    Raises:
        InputError: as `index_files`; a tensor is not where the index says, or in two shards without being in the index.
    """
    places = _weight_map(index)
    tensors: dict[str, TensorInfo] = {}
    for file in index_files(index):
        for name, info in header(file).items():
            if name not in places and name in tensors:
                raise InputError(
                    f"{index}: {tensors[name].file} and {file} both hold tensor {name}, which the index does not name; "
                    "remove one of the files, or name the tensor in the index"
                )
            if places.get(name, file) == file:
                tensors[name] = info
    for name, file in places.items():
        if name not in tensors:
            raise InputError(
                f"{index}: says that tensor {name} is in {file}, which does not hold it; the index was made for other "
                "files: take index and shards from one place"
            )
    return tensors


def index_files(index: Path) -> list[str]:
    """Return the shard names of an index file, in order.

    Raises:
        InputError: the index is no JSON of the known form, or a name is not that of a plain file beside it.
    """
    files = sorted(set(_weight_map(index).values()))
    for file in files:
        if Path(file).name != file or file in {"", ".", ".."} or "\\" in file:
            raise InputError(
                f"{index}: names {shown(file)}, which lies outside the folder; only files beside it are read"
            )
    return files


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = load_object(index)["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (KeyError, AttributeError) as error:
        raise InputError(f"{index}: not an index of safetensors shards ({error!r}); download it again") from error


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor as safetensors stores them, without a copy where it lies contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")
