"""Weights in fp8, as they are read."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from sensmerge.tasks.checkpoints.checkpoint import open_checkpoint
from sensmerge.tasks.checkpoints.quantised import Scale, quantisation, without_quantisation
from sensmerge.tasks.errors import InputError

SIZES = st.integers(1, 9)


@given(
    rows=SIZES, columns=SIZES, block=st.tuples(SIZES, SIZES), stack=st.sampled_from([(), (3,)]), seed=st.integers(0, 99)
)
def test_blocks_share_a_scale(
    rows: int, columns: int, block: tuple[int, int], stack: tuple[int, ...], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randn((*stack, rows, columns), generator=generator).to(torch.float8_e4m3fn)
    grid = (*stack, -(-rows // block[0]), -(-columns // block[1]))
    scales = torch.rand(grid, generator=generator) + 0.1
    found = Scale("file", "name", block).times(stored, scales)
    expected = stored.double()
    for row in range(rows):
        for column in range(columns):
            expected[..., row, column] *= scales[..., row // block[0], column // block[1]].double()
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=0)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (4, 1)])
def test_scales_of_tensors_and_rows(shape: tuple[int, ...], tmp_path: Path) -> None:
    stored, scales = torch.randn(4, 6).to(torch.float8_e5m2), torch.rand(shape) + 0.5
    whole = torch.randn(3, dtype=torch.float32)
    tensors = {"a.weight": stored, "a.weight_scale": scales, "a.input_scale": torch.ones(1), "b.bias": whole}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path, dequantize=True)
    assert {name: info.dtype for name, info in checkpoint.tensors.items()} == {"a.weight": "BF16", "b.bias": "F32"}
    expected = stored.double() * scales.double()
    torch.testing.assert_close(checkpoint.read("a.weight").double(), expected, rtol=2**-8, atol=0)
    assert torch.equal(checkpoint.read("b.bias"), whole)
    with pytest.raises(InputError, match=r"a.weight has dtype F8_E5M2, which is quantised; set dequantize: true"):
        open_checkpoint(tmp_path)


def test_scales_in_another_shard(tmp_path: Path) -> None:
    stored, scales = torch.ones(4, 4).to(torch.float8_e4m3fn), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    save_file({"w": stored}, tmp_path / "m-1.safetensors")
    save_file({"w_scale_inv": scales}, tmp_path / "m-2.safetensors")
    places = {"w": "m-1.safetensors", "w_scale_inv": "m-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(InputError, match=r"w_scale_inv .* does not fit w .* names no weight_block_size"):
        open_checkpoint(tmp_path, dequantize=True)
    config = {"text_config": {"quantization_config": {"weight_block_size": [2, 2]}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = open_checkpoint(tmp_path, dequantize=True).read("w")
    assert found[:, 0].tolist() == [1, 1, 3, 3]
    assert found[0].tolist() == [1, 1, 2, 2]
    config["text_config"]["quantization_config"]["weight_block_size"] = [3, 4]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="blocks of 3 × 4"):
        open_checkpoint(tmp_path, dequantize=True)


def test_what_a_config_says_of_it_is_found_and_left_out() -> None:
    config = {"a": 1, "inner": {"compression_config": {"bits": 4}, "b": 2}}
    assert quantisation(config) == "inner.compression_config"
    assert without_quantisation(config) == {"a": 1, "inner": {"b": 2}}
    assert quantisation(without_quantisation(config)) is None
