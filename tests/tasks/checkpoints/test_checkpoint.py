import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sensmerge.tasks.checkpoints.checkpoint import DTYPES, INDEX, WEIGHTS, open_checkpoint, tensor_bytes
from sensmerge.tasks.checkpoints.header import SIZES, TensorInfo, read_header
from sensmerge.tasks.checkpoints.planned import CheckpointPlan, CheckpointWriter, plan_checkpoint, preallocate
from sensmerge.tasks.checkpoints.quantised import FP8
from sensmerge.tasks.errors import InputError
from tests.conftest import make_llama


def some_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(shape, generator=generator)).to(dtype)


def write(tensors: dict[str, torch.Tensor], folder: Path, shard_size: int) -> CheckpointPlan:
    plan = plan_checkpoint({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, shard_size)
    preallocate(plan, folder)
    for name, tensor in tensors.items():
        with CheckpointWriter(plan, folder) as writer:
            writer.write(name, tensor)
    return plan


def identical(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and tensor_bytes(one) == tensor_bytes(other)


def safetensors_file(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: tuple[int, ...] = (4,), offsets: tuple[int, int] = (0, 16)) -> dict[str, object]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards with the tensors a and b, and their index."""
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(3, dtype=torch.int64)}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    return tmp_path


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_reads_one_file(tmp_path: Path) -> None:
    tensors = {"x.weight": some_tensor(torch.bfloat16, (3, 2)), "ids": torch.arange(4)}
    save_file(tensors, tmp_path / WEIGHTS)
    checkpoint = open_checkpoint(tmp_path)
    assert {name: (t.dtype, t.shape, t.file) for name, t in checkpoint.tensors.items()} == {
        "x.weight": ("BF16", (3, 2), WEIGHTS),
        "ids": ("I64", (4,), WEIGHTS),
    }
    weight = checkpoint.tensors["x.weight"]
    assert (weight.numel, weight.nbytes, weight.is_floating_point) == (6, 12, True)
    assert not checkpoint.tensors["ids"].is_floating_point
    assert all(identical(checkpoint.read(name), tensor) for name, tensor in tensors.items())


def test_reads_shards(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    assert {name: info.file for name, info in checkpoint.tensors.items()} == {
        "a": "one.safetensors",
        "b": "two.safetensors",
    }
    assert checkpoint.read("b").tolist() == [0, 0, 0]


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in one_line(error)
    assert "expected a checkpoint saved as safetensors" in str(error.value)


def test_a_file_that_is_gone(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    (sharded / "two.safetensors").unlink()
    with pytest.raises(InputError, match=r"two.safetensors: no such file"):
        checkpoint.read("b")


@pytest.mark.parametrize(
    "content",
    {
        "empty": b"",
        "no header": b"\x08\0\0",
        "text": b"<html>404 Not Found</html>" * 10,
        "header longer than the file": struct.pack("<Q", 1000) + b"{}",
        "header longer than any memory": struct.pack("<Q", 2**62) + b"{}",
        "header is no JSON": safetensors_file(b"{bad", b""),
        "data cut off": safetensors_file(entry(), b"12345678"),
        "data left over": safetensors_file(entry(), b"1" * 20),
        "offsets beyond the file": safetensors_file(entry(offsets=(16, 32)), b"1" * 16),
        "offsets backwards": safetensors_file(entry(offsets=(16, 0)), b"1" * 16),
        "offsets do not fit the shape": safetensors_file(entry(shape=(5,)), b"1" * 16),
        "shape overflows": safetensors_file(entry(shape=(2**40, 2**40)), b"1" * 16),
        "negative shape": safetensors_file(entry(shape=(-4,)), b"1" * 16),
        "unknown dtype": safetensors_file(entry(dtype="F99"), b"1" * 16),
        "overlapping tensors": safetensors_file(entry() | {"b": entry()["a"]}, b"1" * 16),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_corrupt_file_is_named(content: tuple[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS
    path.write_bytes(content[1])
    with pytest.raises(InputError) as error:
        open_checkpoint(tmp_path)
    assert one_line(error).startswith(f"{path}: truncated or corrupt safetensors file")


def test_a_quantised_dtype_is_refused(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(safetensors_file(entry("F8_E4M3", (16,)), b"1" * 16))
    with pytest.raises(InputError, match="tensor a has dtype F8_E4M3"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("file", ["../one.safetensors", "/etc/passwd", "sub/one.safetensors", "..", "", "a\\b"])
def test_an_index_that_leaves_its_folder(file: str, sharded: Path) -> None:
    save_file({"a": torch.ones(2)}, sharded.parent / "one.safetensors")
    write_index(sharded, {"a": file})
    with pytest.raises(InputError, match="only files beside it are read") as error:
        open_checkpoint(sharded)
    assert one_line(error).startswith(f"{sharded / INDEX}: names {file!r}")


@pytest.mark.parametrize("file", ["three.safetensors", "x" * 5000])
def test_an_index_that_names_a_missing_shard(file: str, sharded: Path) -> None:
    write_index(sharded, {"a": file})
    with pytest.raises(InputError, match=r"names '(three.safetensors'|x+ … ).*, which is not in the folder") as error:
        open_checkpoint(sharded)
    assert one_line(error).startswith(str(sharded / INDEX))


@pytest.mark.parametrize("weight_map", [{"c": "one.safetensors"}, {"a": "one.safetensors", "b": "one.safetensors"}])
def test_an_index_that_names_the_wrong_shard(weight_map: dict[str, str], sharded: Path) -> None:
    write_index(sharded, weight_map)
    with pytest.raises(InputError, match=r"tensor [bc] is in one.safetensors, which does not hold it") as error:
        open_checkpoint(sharded)
    assert one_line(error).startswith(str(sharded / INDEX))


@pytest.mark.parametrize(
    "text", ["{bad", "[]", "{}", "5", '{"weight_map": 5}', '{"weight_map": ["one.safetensors"]}', "\ud800"]
)
def test_an_index_that_is_none(text: str, sharded: Path) -> None:
    (sharded / INDEX).write_bytes(text.encode(errors="surrogatepass"))
    expected = "not an index of safetensors shards|not valid JSON|expected a JSON object"
    with pytest.raises(InputError, match=expected) as error:
        open_checkpoint(sharded)
    assert one_line(error).startswith(str(sharded / INDEX))


def test_headers_tell_of_dtypes_what_torch_does() -> None:
    assert {code: dtype.itemsize for code, dtype in (DTYPES | FP8).items()} == SIZES
    for code, dtype in DTYPES.items():
        assert TensorInfo(code, (1,), WEIGHTS).is_floating_point == dtype.is_floating_point


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3)], ids=str)
def test_writes_what_safetensors_reads(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    # The odd neighbours push the tensor off its alignment unless the plan sees to it.
    tensors = {"first": some_tensor(torch.uint8, (3,)), "x": some_tensor(dtype, shape), "last": torch.ones(1).bool()}
    write(tensors, tmp_path, 10**6)
    loaded = load_file(tmp_path / WEIGHTS)
    assert loaded.keys() == tensors.keys()
    assert all(identical(loaded[name], tensor) for name, tensor in tensors.items())


def test_every_tensor_is_aligned_to_its_size() -> None:
    shapes = {f"{code}{i}": (dtype, (i,)) for i in (1, 3) for code, dtype in DTYPES.items()}
    plan = plan_checkpoint(shapes, 10**6)
    assert all(tensor.offset % tensor.dtype.itemsize == 0 for tensor in plan.tensors.values())
    assert len(plan.headers[WEIGHTS]) % 8 == 0


def test_a_view_is_written_in_its_own_order(tmp_path: Path) -> None:
    tensor = some_tensor(torch.float32, (3, 5)).T
    write({"x": tensor}, tmp_path, 10**6)
    assert torch.equal(load_file(tmp_path / WEIGHTS)["x"], tensor)


def test_preallocating_again_keeps_what_is_written(tmp_path: Path) -> None:
    tensors = {"x": some_tensor(torch.float32, (7,)), "y": some_tensor(torch.float16, (3,))}
    plan = write(tensors, tmp_path, 10**6)
    preallocate(plan, tmp_path)
    assert all(identical(load_file(tmp_path / WEIGHTS)[name], tensor) for name, tensor in tensors.items())


def test_a_preallocated_file_is_whole_before_its_tensors_are(tmp_path: Path) -> None:
    plan = plan_checkpoint({"x": (torch.float32, (7,))}, 10**6)
    preallocate(plan, tmp_path)
    assert (tmp_path / WEIGHTS).stat().st_size == plan.sizes[WEIGHTS]
    assert read_header(tmp_path / WEIGHTS)["x"].shape == (7,)


@pytest.mark.parametrize(
    ("tensor", "start"), [(torch.ones(7), 0), (torch.ones(3), 4), (torch.ones(6, dtype=torch.float64), 0)]
)
def test_more_elements_or_another_dtype_are_not_written(tensor: torch.Tensor, start: int, tmp_path: Path) -> None:
    plan = plan_checkpoint({"x": (torch.float32, (2, 3)), "y": (torch.float32, (9,))}, 10**6)
    preallocate(plan, tmp_path)
    before = (tmp_path / WEIGHTS).read_bytes()
    with pytest.raises(AssertionError), CheckpointWriter(plan, tmp_path) as writer:
        writer.write("x", tensor, start)
    assert (tmp_path / WEIGHTS).read_bytes() == before


@pytest.mark.parametrize("shard_size", [1, 10**6])
def test_pieces_may_come_in_any_order(shard_size: int, tmp_path: Path) -> None:
    tensors = {"x": some_tensor(torch.bfloat16, (5, 4)), "y": some_tensor(torch.float32, (11,))}
    plan = plan_checkpoint({name: (one.dtype, tuple(one.shape)) for name, one in tensors.items()}, shard_size)
    preallocate(plan, tmp_path)
    with CheckpointWriter(plan, tmp_path) as writer:
        for name, start, stop in (("y", 7, 11), ("x", 9, 20), ("y", 0, 7), ("x", 0, 9)):
            writer.write(name, tensors[name].view(-1)[start:stop], start)
    found = open_checkpoint(tmp_path)
    assert all(identical(found.read(name), tensor) for name, tensor in tensors.items())


def test_shards_that_transformers_loads(save: Callable[..., Path], tmp_path: Path) -> None:
    network = make_llama()
    folder = save(network, "llama", tmp_path)
    source = open_checkpoint(folder)
    tensors = {name: source.read(name) for name in source.tensors}
    (folder / WEIGHTS).unlink()
    plan = write(tensors, folder, 20_000)
    data = {file: size - len(plan.headers[file]) for file, size in plan.sizes.items()}
    alone = {file for file in data if sum(tensor.file == file for tensor in plan.tensors.values()) == 1}
    assert len(data) > 2
    assert all(size <= 20_000 or file in alone for file, size in data.items())
    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values()) == sum(data.values())
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(10)[None]
    assert torch.equal(loaded(ids).logits, network.eval()(ids).logits)


# The safetensors format reserves this name, and JSON text can hold no lone surrogates.
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@settings(max_examples=60)
@given(
    specs=st.dictionaries(names, st.tuples(st.sampled_from(list(DTYPES.values())), shapes), max_size=8),
    shard_size=st.integers(1, 200),
)
def test_round_trip(
    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]], shard_size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("round")
    tensors = {name: some_tensor(*spec, seed=i) for i, (name, spec) in enumerate(specs.items())}
    plan = write(tensors, folder, shard_size)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tensors.keys() == tensors.keys()
    assert all(identical(checkpoint.read(name), tensor) for name, tensor in tensors.items())
    for file, header in plan.headers.items():
        loaded = load_file(folder / file)
        assert all(identical(loaded[name], tensors[name]) for name in loaded)
        assert (
            sum(tensor.nbytes for tensor in loaded.values()) <= shard_size
            or len(loaded) == 1
            or all(tensor.numel() == 0 for tensor in list(loaded.values())[1:])
        )
        with safe_open(folder / file, "pt") as handle:
            assert handle.metadata() == {"format": "pt"}
        assert plan.sizes[file] == (folder / file).stat().st_size >= len(header)
