"""Sign consensus of TIES."""

from collections.abc import Sequence

import torch


def sign_agreement(deltas: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return, per weighted task vector, which elements have the sign of the sum over all of them, bool.

    A sum of exactly zero counts as positive, and an element that is zero never agrees, as in mergekit's `get_mask`
    (TIES, arXiv 2306.01708, section 3.1, step 2).
    """
    # Stacked as mergekit does, so that a sum close to zero is rounded to the same sign.
    positive = torch.stack(list(deltas)).sum(dim=0) >= 0
    return [torch.where(positive, delta > 0, delta < 0) for delta in deltas]
