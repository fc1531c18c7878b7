"""Sign consensus of TIES (arXiv 2306.01708, section 3.1, step 2), as mergekit's `get_mask` has it.

An element of a weighted task vector agrees if it has the sign of the sum over all of them; a sum of exactly zero counts
as positive, and an element that is zero never agrees. Written with arithmetic alone, which is exact here: comparisons
that give booleans are many times slower on a CPU.
"""

from collections.abc import Sequence

import torch


def elected_sign(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sign of the sum over weighted task vectors of one shape: float32, 1 or −1."""
    total = deltas[0].clone()
    for delta in deltas[1:]:
        total += delta
    return total.ge_(0).mul_(2).sub_(1)


def agreeing_magnitude_(delta: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
    """Turn a weighted task vector into its magnitude where it agrees and 0 elsewhere, in place.

    Times `sign`, from `elected_sign`, it is what agrees.
    """
    return delta.mul_(sign).relu_()


def agreeing_weight(magnitudes: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return the sum of the weights of the experts that agree, element by element, and 1 where it is 0.

    Args:
        magnitudes: of the weighted task vectors, from `agreeing_magnitude_`: an element above zero agrees.
        weights: of the experts.
    """
    total = torch.zeros_like(magnitudes[0])
    for magnitude, weight in zip(magnitudes, weights, strict=True):
        total += magnitude.sign().mul_(weight)
    return total.add_(total.clone().eq_(0))
