"""Methods that look at the singular vectors of task vectors; they use no data."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from sensmerge.tasks.methods.contract import METHODS, Method, TaskVector

if TYPE_CHECKING:
    from torch import Tensor


class _Spectral(Method):
    """Combines matrices by their singular vectors; other tensors get the mean of the weighted task vectors."""

    needs: ClassVar[Literal["elements", "matrix"]] = "matrix"

    def scales_with_weight(self) -> bool:
        """See `Method`."""
        return True

    @abstractmethod
    def combined(self, base: "Tensor", vectors: Sequence[TaskVector]) -> "Tensor":
        """Return what is added to a tensor of two dimensions, float64.

        Args:
            base: the base's tensor, in any float dtype, with no fewer rows or columns than there are experts.
            vectors: the experts' task vectors.
        """

    def merged_pieces(self, base: "Tensor", vectors: Sequence[TaskVector]) -> "Iterator[tuple[slice, Tensor]]":
        """See `Method`."""
        from sensmerge.tasks.methods.kernels.delta import summed

        if base.ndim == 2 and min(base.shape) >= len(vectors):
            yield slice(0, base.numel()), self.combined(base, vectors).add_(base).float().reshape(-1)
        else:
            weights = [vector.weight / len(vectors) for vector in vectors]
            yield from summed(base.reshape(-1), [vector.delta for vector in vectors], weights)


@METHODS.register("tsv_m")
class TsvM(_Spectral):
    """Keeps each expert's largest singular vectors and makes those of all experts orthogonal (arXiv 2412.00081)."""

    weights: ClassVar[tuple[float, ...]] = (0.5, 0.75, 1.0, 1.25, 1.5)

    def combined(self, base: "Tensor", vectors: Sequence[TaskVector]) -> "Tensor":
        """See `_Spectral`.

        Memory, in float64: one task vector, and as much again for each side's singular vectors and for the result.
        """
        import torch

        from sensmerge.tasks.methods.kernels.matrices import matrix_of
        from sensmerge.tasks.methods.kernels.singular import isometry, singular

        count = min(base.shape) // len(vectors)
        found = [singular(matrix_of(vector, base), count) for vector in vectors]
        left, right = (isometry(torch.cat([getattr(one, side) for one in found], 1)) for side in ("left", "right"))
        values = torch.cat([one.values * vector.weight for one, vector in zip(found, vectors, strict=True)])
        return (left * values) @ right.T


@METHODS.register("iso_c")
class IsoC(_Spectral):
    """Gives all singular vectors of the sum of task vectors the mean singular value (arXiv 2502.04959)."""

    weights: ClassVar[tuple[float, ...]] = (0.5, 1.0, 1.5, 2.0, 3.0)

    def combined(self, base: "Tensor", vectors: Sequence[TaskVector]) -> "Tensor":
        """See `_Spectral`. Memory, in float64: some three times the tensor."""
        from sensmerge.tasks.methods.kernels.matrices import weighted_sum
        from sensmerge.tasks.methods.kernels.singular import singular

        found = singular(weighted_sum(vectors, base))
        return (found.left * found.values.mean()) @ found.right.T


@METHODS.register("iso_cts")
class IsoCts(_Spectral):
    """Does as iso_c, with the smaller of the common singular vectors replaced by experts' own (arXiv 2502.04959)."""

    weights: ClassVar[tuple[float, ...]] = (0.5, 1.0, 1.5, 2.0, 3.0)

    common: float = Field(
        0.8, ge=0, le=1, description="share of the directions that are the common ones; the experts share the rest"
    )

    def combined(self, base: "Tensor", vectors: Sequence[TaskVector]) -> "Tensor":
        """See `_Spectral`. Memory as of `tsv_m`."""
        import torch

        from sensmerge.tasks.methods.kernels.matrices import weighted_sum, without
        from sensmerge.tasks.methods.kernels.singular import isometry, singular

        rank, count = min(base.shape), len(vectors)
        # All experts have equally many directions of their own, so that number is rounded.
        own = min(round((rank - int(rank * self.common)) / count), rank // count)
        common = singular(weighted_sum(vectors, base), rank - own * count)
        found, scale = [common], float(common.values.max()) if len(common.values) else 0.0
        found += [singular(without(weighted_sum([one], base), common.left), own, scale) for one in vectors]
        left, right = (isometry(torch.cat([getattr(one, side) for one in found], 1)) for side in ("left", "right"))
        return (left * torch.cat([one.values for one in found]).mean()) @ right.T
