"""RegMean: every linear layer is the least-squares fit to what each expert's does to that expert's own inputs."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.methods.contract import METHODS, Method, TaskVector
from sensmerge.tasks.methods.remarks import remark

if TYPE_CHECKING:
    from torch import Tensor


@METHODS.register("regmean")
class RegMean(Method):
    """Makes each linear layer answer every expert's inputs as that expert does, by least squares (arXiv 2212.09849)."""

    needs: ClassVar[Literal["elements", "matrix"]] = "matrix"
    statistics: ClassVar[tuple[str, ...]] = ("gram",)
    weights: ClassVar[tuple[float, ...]] = (0.6, 0.8, 1.0, 1.2, 1.5, 2.0)

    reduce: float = Field(
        0.9, ge=0, le=1, description="factor of the off-diagonal elements of the experts' Gram matrices"
    )
    others: Literal["mean", "sum"] = Field(
        "mean",
        description="how task vectors are combined in tensors without Gram matrices (embeddings, norms, biases)",
    )

    def scales_with_weight(self) -> bool:
        """See `Method`."""
        return True

    def check_weights(self, weights: Sequence[float]) -> None:
        """See `Method`."""
        if min(weights) < 0:
            raise ValueError(
                f"found the weight {min(weights):g}; {self.name} weighs squared errors of the experts, so expected "
                "weights of 0 or more"
            )

    def merged_pieces(self, base: "Tensor", vectors: Sequence[TaskVector]) -> "Iterator[tuple[slice, Tensor]]":
        """See `Method`.

        Memory, in float64: the sum of the Gram matrices, one of them, one task vector, and the merged one.
        """
        from sensmerge.tasks.methods.kernels.delta import summed

        weights = [vector.weight for vector in vectors]
        counted = [vector for vector in vectors if vector.weight]
        change = self._fit(base, counted, self.reduce)
        if change is None:
            count = 1 if self.others == "sum" else len(vectors)
            deltas = [vector.delta for vector in vectors]
            yield from summed(base.reshape(-1), deltas, [weight / count for weight in weights])
        else:
            yield slice(0, base.numel()), change.mul_(sum(weights) / len(vectors)).add_(base).float().reshape(-1)

    def _fit(self, base: "Tensor", vectors: Sequence[TaskVector], factor: float) -> "Tensor | None":
        """Return δ of least squared error, float64; None if no expert has a Gram matrix of the tensor.

        δᵀ = (Σ wₖĜₖ)⁻¹ Σ wₖĜₖδₖᵀ, where Ĝₖ is the mean of x xᵀ over the tokens of expert k, with its off-diagonal
        multiplied by `factor`.

        Raises:
            InputError: Ĝ is not what it should be, positive semi-definite.
        """
        import torch

        from sensmerge.tasks.methods.kernels.least_squares import NEARLY_ONE, Normal, reduced
        from sensmerge.tasks.methods.kernels.matrices import matrix_of, product, rows_of

        left = right = None
        seen, is_transposed = 0, True
        for vector in vectors:
            gram = vector.statistic("gram")
            if gram is None:
                continue
            seen, is_transposed = seen + 1, vector.input_dim("gram") == 1
            # Fewer tokens than samples come to an expert of a mixture that a task hardly uses, which then says little.
            count = max(vector.tokens("gram"), vector.samples("gram"))
            gram = reduced(gram, factor).mul_(vector.weight / count)
            added = product(gram, matrix_of(vector, base, is_transposed))
            left, right = (gram, added) if left is None or right is None else (left.add_(gram), right.add_(added))
        if left is None or right is None:
            return None
        if not bool(right.any()):
            return torch.zeros(base.shape, dtype=torch.float64)
        if seen < len(vectors):
            remark("no calibration sample of some experts comes here, so the others alone decide")
        equations = Normal(left)
        if factor > NEARLY_ONE and equations.is_singular:
            remark(
                f"Gram matrices are singular, so their off-diagonal was multiplied by {NEARLY_ONE}; set reduce below "
                "that, or take more calibration samples"
            )
            return self._fit(base, vectors, NEARLY_ONE)
        if not equations.is_definite:
            raise InputError(
                f"method {self.name} cannot solve for a tensor: its Gram matrices are not positive definite with their "
                f"off-diagonal multiplied by {factor:g}; set a smaller reduce"
            )
        change = equations.solve(right)
        if bool(equations.empty.any()):
            remark("some inputs are 0 in all calibration samples; the mean of the experts was taken there")
            total = sum(vector.weight for vector in vectors)
            for vector in vectors:
                rows = rows_of(matrix_of(vector, base, is_transposed), equations.empty)
                change[equations.empty] += rows.mul_(vector.weight / total)
        return change.T if is_transposed else change
