"""Σ |p · ∂L/∂p| by layer, summed up as backward gives the gradients, of which none is kept."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

CPU_CHUNK = 2**15
"""Elements whose products exist at a time on the CPU: they stay in its cache, and are too few for torch to wake threads
for, which takes longer than the work where they are not idle."""
GPU_CHUNK = 2**26


class GradientProducts:
    """The sums of the parameters it watches; of any number of backward passes between two calls of `take`."""

    def __init__(self) -> None:
        """Start with no parameters."""
        self._totals: dict[str, Tensor] = {}

    def watch(self, parameter: nn.Parameter, layer: str) -> None:
        """Use up every gradient of a parameter as soon as backward has it; `layer` is where its products count."""
        parameter.requires_grad_()
        total = self._totals.setdefault(layer, torch.zeros((), dtype=torch.float64, device=parameter.device))
        parameter.register_post_accumulate_grad_hook(_use_up(total))  # type: ignore[no-untyped-call]

    def take(self) -> dict[str, float]:
        """Return the sums by layer and start again at zero; a layer without gradients has zero."""
        found = {layer: float(total) for layer, total in self._totals.items()}
        for total in self._totals.values():
            total.zero_()
        return found


def _use_up(total: Tensor) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        total.add_(sum_of_products(parameter.detach(), parameter.grad))
        parameter.grad = None

    return hook


def sum_of_products(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Return Σ |parameter · gradient|, a float64 scalar on their device.

    The products are float32, as one of two float16 numbers underflows; so is the (pairwise) sum of a chunk.

    Args:
        parameter: any shape and float dtype.
        gradient: of the parameter's shape and dtype; may be sparse in its rows.
    """
    if gradient.is_sparse:
        gradient = gradient.coalesce()
        parameter, gradient = parameter[gradient.indices()[0]], gradient.values()
    chunk = CPU_CHUNK if parameter.device.type == "cpu" else GPU_CHUNK
    pairs = zip(torch.split(parameter.reshape(-1), chunk), torch.split(gradient.reshape(-1), chunk), strict=True)
    products = torch.empty(min(chunk, parameter.numel()), dtype=torch.float32, device=parameter.device)
    parts = [products[: len(p)].copy_(p).mul_(g).abs_().sum() for p, g in pairs]
    return torch.stack(parts).sum(dtype=torch.float64)
