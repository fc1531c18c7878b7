"""Sign consensus of TIES (arXiv 2306.01708, section 3.1, steps 2 and 3), as mergekit's `get_mask` has it.

An element of a weighted task vector agrees if it has the sign of the sum over all of them; a sum of exactly zero counts
as positive, and an element that is zero never agrees. Written with arithmetic alone, which is exact here: comparisons
that give booleans are many times slower on a CPU.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from sensmerge.tasks.methods.kernels import loops


def disjoint_sum(parts: torch.Tensor, weights: Sequence[float], normalize: bool) -> torch.Tensor:
    """Return the weighted sum of what agrees, element by element, flat and float32.

    Args:
        parts: (sparse) task vectors, float32 (experts × elements); may be changed.
        weights: of the experts.
        normalize: whether to divide by the sum of the weights that agree, where it is not 0.
    """
    if parts.is_cpu:
        mixed = torch.empty_like(parts[0])
        loops.disjoint_sum(parts.numpy(), np.array(weights, np.float32), normalize, mixed.numpy())
        return mixed
    sign, magnitudes = agreeing(parts, weights)
    mixed = torch.zeros_like(sign)  # no −0 then where nothing agrees, as in the loop
    for magnitude in magnitudes:
        mixed += magnitude
    mixed *= sign
    return mixed.div_(agreeing_weight(magnitudes, weights)) if normalize else mixed


def agreeing(parts: Iterable[torch.Tensor], weights: Sequence[float]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Weight task vectors, in place; return the sign of their sum, and the magnitudes of what has it and 0 elsewhere.

    Times the sign, a magnitude is what agrees.
    """
    scaled = [part.mul_(weight) for part, weight in zip(parts, weights, strict=True)]
    sign = elected_sign(scaled)
    return sign, [part.mul_(sign).relu_() for part in scaled]


def elected_sign(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sign of the sum over weighted task vectors of one shape: float32, 1 or −1."""
    total = deltas[0].clone()
    for delta in deltas[1:]:
        total += delta
    return total.ge_(0).mul_(2).sub_(1)


def agreeing_weight(magnitudes: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return the sum of the weights of the experts that agree, element by element, and 1 where it is 0.

    Args:
        magnitudes: of the weighted task vectors, from `agreeing`: an element above zero agrees.
        weights: of the experts.
    """
    total = torch.zeros_like(magnitudes[0])
    for magnitude, weight in zip(magnitudes, weights, strict=True):
        total += magnitude.sign().mul_(weight)
    return total.add_(total.clone().eq_(0))
