import pytest
import torch
from torch import Tensor

from sensmerge.tasks.statistics import gram
from sensmerge.tasks.statistics.gram import Gram, add_outer, packed, unpacked

LENGTHS = [5, 1, 70, 33, 40, 64, 3]


def samples(width: int, dtype: torch.dtype = torch.float32, lengths: list[int] = LENGTHS) -> list[Tensor]:
    """Inputs that are all somewhat alike, as a network's are."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-2, 2, width)
    return [((torch.randn(one, width, generator=generator) + 0.5) * scales).to(dtype) for one in lengths]


def total(inputs: list[Tensor]) -> Tensor:
    """What is stored of the inputs of some samples."""
    adding = Gram().total()
    for one in inputs:
        adding.add(one, one)
    return adding.stored()


def error(found: Tensor, inputs: list[Tensor]) -> float:
    """The largest error of an element, relative to √(Gᵢᵢ Gⱼⱼ)."""
    rows = torch.cat(inputs).double()
    expected = rows.T @ rows
    scale = expected.diagonal().sqrt()
    return float(((found.double() - expected).abs() / torch.outer(scale, scale)).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 7, 64, 100, 700])
def test_the_sum_of_outer_products(width: int, dtype: torch.dtype) -> None:
    inputs = samples(width, dtype)
    stored = total(inputs)
    found = Gram.restored(stored)
    assert found.dtype == torch.float32
    assert torch.equal(found, found.T)
    assert error(found, inputs) < 2e-6
    assert error(torch.stack([Gram().of(one, one) for one in inputs]).sum(0), inputs) < 2e-6
    # As they are, where that is smaller than half of the matrix.
    tokens = sum(LENGTHS)
    as_inputs = tokens * dtype.itemsize <= 2 * (width + 1)
    assert stored.shape == ((tokens, width) if as_inputs else (width * (width + 1) // 2,))
    assert stored.nbytes <= Gram().stored_bytes((3, width))
    if as_inputs:
        assert torch.equal(stored, torch.cat(inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_how_it_is_stored_changes_no_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = samples(700, dtype)
    kept = total(inputs)
    monkeypatch.setattr(gram, "_fewest", lambda *_: 0)
    matrix = total(inputs)
    assert (kept.ndim, matrix.ndim) == (2, 1)
    assert torch.equal(Gram.restored(kept), Gram.restored(matrix))


def test_many_tokens() -> None:
    """Of 65 thousand tokens, float32 adds the products of a thousand at a time."""
    for dtype in (torch.float32, torch.bfloat16):
        inputs = samples(96, dtype, [256] * 256)
        assert error(Gram.restored(total(inputs)), inputs) < 2e-6


def test_what_was_added_is_a_copy() -> None:
    inputs = samples(64)
    adding = Gram().total()
    for one in inputs:
        given = one.clone()
        adding.add(given, given)
        given.zero_()
    assert torch.equal(adding.stored(), total(inputs))


def test_the_modes_of_products_stay_as_they_were() -> None:
    total(samples(8, torch.bfloat16))
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("width", [1, 4, 5, 12, 13])
def test_panels(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "PANEL", 4)
    panels: list[Tensor] = []
    inputs = [torch.randn(3, width), torch.randn(20, width)]
    for one in inputs:
        add_outer(panels, one)
    assert [panel.shape for panel in panels] == [(min(4, width - start), width - start) for start in range(0, width, 4)]
    expected = torch.cat(inputs).T @ torch.cat(inputs)
    half = packed(panels)
    torch.testing.assert_close(half, expected[tuple(torch.triu_indices(width, width))])
    torch.testing.assert_close(unpacked(half), expected)
