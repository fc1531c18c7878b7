"""Ways to set elements of a task vector to zero, and the random numbers they need."""

import hashlib

import torch

CHUNK = 1 << 18
"""Elements handled at a time where none needs another one: intermediate tensors then stay in the processor's cache."""


def kept_elements(numel: int, density: float) -> int:
    """Return how many elements a density keeps: at least one of a non-empty tensor unless the density is 0."""
    if density <= 0 or numel == 0:
        return 0
    return numel if density >= 1 else max(1, int(density * numel))


def magnitude_histogram(delta: torch.Tensor) -> torch.Tensor:
    """Count float32 elements by the upper 15 bits of their magnitude (8 of exponent, 7 more), int64 (32768,).

    The order of the bins is that of the magnitudes, so the bin that holds a threshold is known without sorting.
    """
    return torch.bincount(_magnitude_bins(delta), minlength=1 << 15)


def _magnitude_bins(delta: torch.Tensor) -> torch.Tensor:
    return delta.flatten().abs().view(torch.int32) >> 16


def trim_by_magnitude(delta: torch.Tensor, density: float, histogram: torch.Tensor) -> torch.Tensor:
    """Keep the `kept_elements` of largest magnitude (TIES step 1, arXiv 2306.01708); of equal ones, the first.

    Args:
        delta: task vector, float32, any shape.
        density: share of elements to keep, 0..1.
        histogram: `magnitude_histogram` of the task vector.
    """
    keep = kept_elements(delta.numel(), density)
    if keep == delta.numel():
        return delta
    if keep == 0:
        return torch.zeros_like(delta)
    from_top = histogram.flip(0).cumsum(0)
    rank = int(torch.searchsorted(from_top, keep))
    boundary = len(histogram) - 1 - rank
    above = int(from_top[rank - 1]) if rank else 0
    bins = _magnitude_bins(delta)
    mask = bins > boundary
    candidates = (bins == boundary).nonzero().flatten()
    # Stable: of equal magnitudes the one with the lower index comes first.
    order = delta.flatten()[candidates].abs().sort(descending=True, stable=True).indices
    mask[candidates[order[: keep - above]]] = True
    return delta * mask.view_as(delta)


def drop_at_random(delta: torch.Tensor, density: float, key: str) -> torch.Tensor:
    """Keep each element with probability `density`, independently (DARE, arXiv 2311.03099, without its rescaling).

    The choice depends on the key and the element's index alone.
    """
    if density <= 0:
        return torch.zeros_like(delta)
    return delta * (uniform(key, delta.numel(), delta.device) < density).view_as(delta)


def match_l1_norm(sparse: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Scale a sparse task vector to the L1 norm it had before; not if either norm is below 1e-7 (mergekit's rule)."""
    before, after = delta.abs().sum(), sparse.abs().sum()
    return sparse if before < 1e-7 or after < 1e-7 else sparse * (before / after)


def uniform(key: str, numel: int, device: torch.device) -> torch.Tensor:
    """Return `numel` float32 numbers in [0, 1), element i being a hash of (key, i): the same on every device.

    splitmix64 (Steele, Lea, Flood 2014) of a counter, upper 24 bits; the key's sha256 chooses the stream.
    """
    start = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little", signed=True)
    numbers = torch.empty(numel, device=device)
    for number, chunk in enumerate(torch.split(numbers, CHUNK)):
        begin = number * CHUNK + 1
        state = torch.arange(begin, begin + len(chunk), dtype=torch.int64, device=device)
        state = state * _signed(0x9E3779B97F4A7C15) + start
        state = (state ^ _shift(state, 30)) * _signed(0xBF58476D1CE4E5B9)
        state = (state ^ _shift(state, 27)) * _signed(0x94D049BB133111EB)
        state = state ^ _shift(state, 31)
        chunk.copy_(_shift(state, 40))
    return numbers.mul_(2.0**-24)


def _signed(value: int) -> int:
    """Return a 64-bit constant as torch's signed integers hold it."""
    return value - (1 << 64) if value >> 63 else value


def _shift(state: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift right, filling with zeros (torch fills with the sign)."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
