from pathlib import Path

import pytest
import torch

from sensmerge.tasks.networks.states import StatesWriter, are_written, read_states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_written_and_read_again(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "states" / "a.b-merged.bin"
    states = [torch.randn(1, length, 6).to(dtype) for length in (3, 1, 7)]
    with StatesWriter(path) as writer:
        for one in states:
            writer.append(one)
    assert are_written(path)
    assert all(torch.equal(one, other) for one, other in zip(read_states(path, "cpu"), states, strict=True))


def test_what_was_interrupted_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with StatesWriter(path):
        pass
    assert are_written(path)

    def interrupted() -> None:
        with StatesWriter(path) as writer:
            writer.append(torch.zeros(1, 2, 3))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not are_written(path)
