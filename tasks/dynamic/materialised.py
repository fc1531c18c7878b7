"""Parameters that are written out for one row of coefficients: base + Σ coefficient · task vector, as numbers."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from sensmerge.tasks.dynamic.vectors import Vector


class Materialised:
    """The parameters of a network that samples can share only where their coefficients are the same."""

    def __init__(self, parameters: Mapping[str, Tensor], vectors: Mapping[str, Mapping[int, Vector]]) -> None:
        """Write nothing yet.

        Args:
            parameters: the network's own, by name.
            vectors: name (of tied ones one) → index of the expert → its task vector.
        """
        self._changes = [(parameters[name], by_expert) for name, by_expert in vectors.items()]
        self.experts = sorted({expert for by_expert in vectors.values() for expert in by_expert})

    def together(self, coefficients: Tensor) -> list[list[int]]:
        """Return the samples of a batch, (B, K), in groups that these parameters are the same for."""
        if not self.experts:
            return [list(range(len(coefficients)))]
        groups: dict[tuple[float, ...], list[int]] = {}
        for sample, row in enumerate(coefficients[:, self.experts].tolist()):
            groups.setdefault(tuple(row), []).append(sample)
        return list(groups.values())

    @contextmanager
    def written(self, row: Tensor) -> Iterator[None]:
        """Inside the block, the parameters have the values for one row of coefficients, (K,).

        Sums are in float32 at least and rounded once. Whoever reads a parameter sees them, by whatever name or path,
        for only its storage is exchanged; afterwards it has its old one again.
        """
        coefficients = row.tolist() if self._changes else []
        before: list[tuple[Tensor, Tensor]] = []
        try:
            # What is made in inference mode could not be a parameter's storage outside it.
            with torch.inference_mode(False), torch.no_grad():
                for parameter, by_expert in self._changes:
                    taken = {expert: vector for expert, vector in by_expert.items() if coefficients[expert]}
                    if taken:
                        before.append((parameter, parameter.data))
                        parameter.data = _sum(parameter.data, taken, coefficients)
            yield
        finally:
            with torch.inference_mode(False):
                for parameter, data in before:
                    parameter.data = data


def _sum(base: Tensor, vectors: Mapping[int, Vector], coefficients: list[float]) -> Tensor:
    wide = torch.promote_types(base.dtype, torch.float32)
    total = base.to(wide, copy=True)
    for expert, vector in vectors.items():
        total.add_(vector.to(base.device, wide).dense(), alpha=coefficients[expert])
    return total.to(base.dtype)
