"""Methods that interpolate by lengths and angles, with the semantics, defaults and corner cases of mergekit 0.1.5.

In each, a merged tensor is a sum of the models' tensors, whose factors depend on their inner products alone: these are
measured in float64 in one look through the tensor, and a second one sums.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.methods.contract import METHODS, Method, TaskVector
from sensmerge.tasks.methods.remarks import remark

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from sensmerge.tasks.methods.kernels.products import Float64

_ZERO = 1e-8
"""Sums of weights, and lengths, that are smaller are 0 (mergekit's rule)."""
_ROUNDING = 1e-7
"""Lengths of sums of unit vectors that are smaller say nothing in float32."""
_COLLINEAR = 1e-10
"""Squared sine of an angle that float32 cannot tell from 0 or π."""

_TASK_VECTORS = (
    "mix the experts' task vectors and add them to the base, as mergekit with base_model; false: mix the experts "
    "themselves, as without"
)

Scope = Literal["tensor", "rows", "columns"]


class _Interpolation(Method):
    """Sums vectors, which are models or task vectors, with factors that depend on their lengths and angles."""

    needs: ClassVar[Literal["elements", "tensor", "matrix"]] = "tensor"
    version: ClassVar[int] = 2  # 1 had the inner products of models from those of base and task vectors
    no_se: ClassVar[str] = "what one expert adds depends on its angles to the others"

    @property
    def scope(self) -> Scope:
        """What one vector is: a whole tensor, a row of it (along its last dimension) or a column (along its first)."""
        return "tensor"

    @abstractmethod
    def vectors(self, experts: int) -> "Float64":
        """Return what the vectors are made of, float64 (vectors × 1 + experts): how much of the base and task vectors.

        A sum of task vectors is added to the base, one of models is the merged model.
        """

    @abstractmethod
    def factors(self, products: "Float64", weights: Sequence[float]) -> "Float64":
        """Return the factors of the vectors, float64 (… × vectors).

        Args:
            products: inner products of the vectors, float64 (… × vectors × vectors).
            weights: of the experts.
        """

    def merged_pieces(self, base: "Tensor", vectors: Sequence[TaskVector]) -> "Iterator[tuple[slice, Tensor]]":
        """See `Method`. Memory: some pieces of `CHUNK` elements, or a row if it is longer.

        By columns, also 16 · (1 + experts)² bytes for each of them.
        """
        from sensmerge.tasks.methods.kernels.delta import sums
        from sensmerge.tasks.methods.kernels.products import inner_products

        if self.scope != "tensor":
            yield from self._by_rows_or_columns(base, vectors)
            return
        flat, deltas = base.reshape(-1), [vector.delta for vector in vectors]
        made_of = self.vectors(len(vectors))
        origin, *others = self._mixture(inner_products(flat, deltas, made_of), vectors).tolist()
        for where, mixed in sums(flat, deltas, others):
            yield where, mixed.add_(flat[where].float(), alpha=origin)

    def _by_rows_or_columns(self, base: "Tensor", vectors: Sequence[TaskVector]) -> "Iterator[tuple[slice, Tensor]]":
        import numpy as np
        import torch

        from sensmerge.tasks.methods.kernels.products import products_of_columns, products_of_rows, rows_of

        if not base.numel():
            return
        flat, deltas = base.reshape(-1), [vector.delta for vector in vectors]
        made_of = self.vectors(len(vectors))
        by_rows = self.scope == "rows" or base.ndim < 2
        width = base.numel() if base.ndim < 2 else base.shape[-1] if by_rows else base[0].numel()
        if not by_rows:
            mixture = self._mixture(made_of @ products_of_columns(flat, deltas, width) @ made_of.T, vectors)
        for where, found in rows_of(flat, deltas, width):
            if by_rows:
                mixture = self._mixture(made_of @ products_of_rows(found) @ made_of.T, vectors)
            factors = torch.from_numpy(mixture.T.astype(np.float32))
            yield where, found.mul_(factors[:, :, None] if by_rows else factors[:, None]).sum(0).view(-1)

    def _mixture(self, products: "Float64", vectors: Sequence[TaskVector]) -> "Float64":
        """Return how much of the base and of each task vector there is in the merged tensor, float64 (… × 1 + experts).

        Args:
            products: inner products of `vectors`, float64 (… × vectors × vectors).
            vectors: the experts' task vectors.
        """
        made_of = self.vectors(len(vectors))
        factors = self.factors(products, [vector.weight for vector in vectors])
        mixture: Float64 = factors @ made_of
        if not made_of[:, 0].any():
            mixture[..., 0] += 1
        return mixture


def _models_or_vectors(experts: int, models: bool) -> "Float64":
    import numpy as np

    return np.hstack([np.full((experts, 1), float(models)), np.eye(experts)])


def _lengths(products: "Float64") -> "Float64":
    """Return the lengths of vectors from their inner products; NaN stays."""
    import numpy as np

    # Rounding may leave the square of next to nothing below 0.
    found: Float64 = np.sqrt(np.maximum(np.diagonal(products, axis1=-2, axis2=-1), 0))
    return found


def _length(factors: "Float64", products: "Float64") -> float:
    """Return the length of a sum of vectors from its factors and their inner products; NaN stays."""
    square = float(factors @ products @ factors)
    return 0.0 if square < 0 else math.sqrt(square)


def _slerp(cosine: "np.ndarray", t: float, collinear: "np.ndarray") -> "Float64":
    """Return the factors of two vectors, float64 (… × 2): on the arc between them, or on the line if collinear."""
    import numpy as np

    angle = np.arccos(np.where(collinear, 0, cosine))
    sine = np.where(collinear, 1, np.sin(angle))
    first = np.where(collinear, 1 - t, np.sin((1 - t) * angle) / sine)
    return np.stack([first, np.where(collinear, t, np.sin(t * angle) / sine)], -1)


@METHODS.register("slerp")
class Slerp(_Interpolation):
    """Goes from the base to one expert along the arc between them, and not along the line (Shoemake 1985)."""

    least_experts: ClassVar[int] = 1
    most_experts: ClassVar[int | None] = 1
    weights: ClassVar[tuple[float, ...]] = ()
    no_weights: ClassVar[str] = "t says how much of its one expert there is"

    t: float = Field(ge=0, le=1, description="where on the arc: 0 is the base, 1 the expert")

    def vectors(self, experts: int) -> "Float64":
        """See `_Interpolation`: base and expert."""
        import numpy as np

        return np.array([[1.0, 0.0], [1.0, 1.0]])

    def factors(self, products: "Float64", weights: Sequence[float]) -> "Float64":
        """See `_Interpolation`; a line if the angle is so near to 0 or π that the arc says nothing."""
        import numpy as np

        lengths = _lengths(products)
        first, second = np.where(lengths > _ZERO, lengths, 1)
        cosine = np.clip(products[0, 1] / (first * second), -1, 1)
        if cosine < -0.9995:
            remark("base and expert point in opposite directions, so they were mixed along a line")
        return _slerp(cosine, self.t, np.abs(cosine) > 0.9995)


@METHODS.register("nuslerp")
class NuSlerp(_Interpolation):
    """Mixes two experts along the arc between their task vectors or themselves, as mergekit does."""

    least_experts: ClassVar[int] = 2
    most_experts: ClassVar[int | None] = 2
    weights: ClassVar[tuple[float, ...]] = ()

    task_vectors: bool = Field(True, description=_TASK_VECTORS)
    nuslerp_flatten: bool = Field(True, description="take each tensor for one vector; false: each of its rows")
    nuslerp_row_wise: bool = Field(
        False, description="with nuslerp_flatten: false, take its columns (along the first dimension) and not its rows"
    )

    @property
    def scope(self) -> Scope:
        """See `_Interpolation`."""
        return "tensor" if self.nuslerp_flatten else "columns" if self.nuslerp_row_wise else "rows"

    def vectors(self, experts: int) -> "Float64":
        """See `_Interpolation`."""
        return _models_or_vectors(experts, not self.task_vectors)

    def factors(self, products: "Float64", weights: Sequence[float]) -> "Float64":
        """See `_Interpolation`; weights that sum to 0 count equally."""
        import numpy as np

        total = sum(weights)
        units = np.maximum(_lengths(products), 1e-7)
        cosine = np.clip(products[..., 0, 1] / units.prod(-1), -1, 1)
        return _slerp(cosine, 0.5 if abs(total) < 1e-6 else weights[1] / total, 1 - cosine**2 <= _COLLINEAR)


@METHODS.register("multislerp")
class MultiSlerp(_Interpolation):
    """Takes the direction of the experts' weighted mean direction, and their weighted mean length, as mergekit does."""

    changes_untouched: ClassVar[bool] = True

    task_vectors: bool = Field(True, description=_TASK_VECTORS)
    normalize_weights: bool = Field(True, description="divide the weights by their sum")
    eps: float = Field(1e-8, gt=0, description="lengths that are smaller count as 0")

    def check_weights(self, weights: Sequence[float]) -> None:
        """See `Method`."""
        if self.normalize_weights and abs(sum(weights)) < _ZERO:
            raise ValueError(
                f"the weights sum to 0, which {self.name} divides by; set normalize_weights: false or other weights"
            )

    def depends_on_weight(self) -> bool:
        """See `Method`."""
        return not self.normalize_weights

    def scales_with_weight(self) -> bool:
        """See `Method`. Divided by their sum, weights lose their common factor."""
        return self.task_vectors and not self.normalize_weights

    def vectors(self, experts: int) -> "Float64":
        """See `_Interpolation`."""
        return _models_or_vectors(experts, not self.task_vectors)

    def factors(self, products: "Float64", weights: Sequence[float]) -> "Float64":
        """See `_Interpolation`.

        Mergekit then goes on along a tangent at the mean direction, which has length 0: it is the mean of what the
        directions are beside their mean.

        Raises:
            InputError: three or more directions that cancel.
        """
        import numpy as np

        if len(products) == 1:
            return np.ones(1)
        lengths = _lengths(products)
        shares = np.array(weights) / (sum(weights) if self.normalize_weights else 1)
        if not lengths.any():
            return np.zeros(len(lengths))
        directions = shares / (lengths + self.eps)
        length = _length(directions, products)
        if length < max(self.eps, _ROUNDING):
            if len(lengths) > 2:
                raise InputError(
                    f"method {self.name}: the weighted directions of the experts cancel, so their mean has none; set "
                    "other weights, or use another method"
                )
            remark("the directions of the experts cancel, so they were mixed along a line")
            return shares
        return directions * (shares @ lengths) / length


@METHODS.register("karcher")
class Karcher(_Interpolation):
    """Takes the direction nearest to the experts' own on the sphere, and their mean length (arXiv 2603.04972)."""

    weights: ClassVar[tuple[float, ...]] = ()
    no_weights: ClassVar[str] = "its mean counts all experts equally"

    max_iter: int = Field(10, ge=1, description="steps at most")
    tol: float = Field(1e-5, gt=0, description="lengths and angles that are smaller count as 0")

    def vectors(self, experts: int) -> "Float64":
        """See `_Interpolation`: the experts themselves."""
        return _models_or_vectors(experts, True)

    def factors(self, products: "Float64", weights: Sequence[float]) -> "Float64":
        """See `_Interpolation`. To an expert opposite to the mean there is no shortest way, so none is gone."""
        import numpy as np

        lengths = _lengths(products)
        found = np.zeros(len(lengths))
        valid = ~(lengths <= self.tol)
        if valid.any():
            units = lengths[valid]
            mean = self._mean(products[np.ix_(valid, valid)] / np.outer(units, units))
            found[valid] = mean * lengths.mean() / units
        return found

    def _mean(self, cosines: "Float64") -> "Float64":
        """Return how much of each unit vector there is in their Karcher mean, from their inner products."""
        import numpy as np

        count = len(cosines)
        mean = np.full(count, 1 / count)
        mean = mean / _length(mean, cosines) if _length(mean, cosines) >= self.tol else np.eye(count)[0]
        for _ in range(self.max_iter):
            tangent = np.zeros(count)
            for k, cosine in enumerate(np.clip(cosines @ mean, -1, 1)):
                angle = math.acos(cosine)
                if self.tol <= angle <= math.pi - self.tol:
                    tangent += angle / math.sin(angle) / count * (np.eye(count)[k] - cosine * mean)
            step = _length(tangent, cosines)
            if step < self.tol:
                break
            mean = math.cos(step) * mean + math.sin(step) / step * tangent
            if _length(mean, cosines) > self.tol:
                mean = mean / _length(mean, cosines)
        return mean


@METHODS.register("model_stock")
class ModelStock(_Interpolation):
    """Goes from the base to the mean of the experts, further the smaller their angles are (arXiv 2403.19522)."""

    weights: ClassVar[tuple[float, ...]] = ()
    no_weights: ClassVar[str] = "the angles between the experts say how much of their mean there is"

    filter_wise: bool = Field(False, description="look at each row of a tensor by itself, and not at all of it")

    @property
    def scope(self) -> Scope:
        """See `_Interpolation`."""
        return "rows" if self.filter_wise else "tensor"

    def vectors(self, experts: int) -> "Float64":
        """See `_Interpolation`: the task vectors."""
        return _models_or_vectors(experts, False)

    def factors(self, products: "Float64", weights: Sequence[float]) -> "Float64":
        """See `_Interpolation`: K · c / (1 + (K − 1) · c), c the mean cosine; 0 where that divides by 0."""
        import numpy as np

        count = products.shape[-1]
        assert count >= self.least_experts, "the recipe's schema refuses fewer"
        lengths = _lengths(products)
        first, second = np.triu_indices(count, 1)
        sizes = np.maximum(lengths[..., first] * lengths[..., second], 1e-6)
        cosine = np.clip(products[..., first, second] / sizes, -1, 1).mean(-1)
        if (cosine < 0).any():
            remark("task vectors point away from each other, where the ratio of the mean is not between 0 and 1")
        divisor = 1 + (count - 1) * cosine
        singular = np.abs(divisor) < 1e-6
        ratio = np.where(singular, 0, count * cosine / np.where(singular, 1, divisor))
        return np.repeat(ratio[..., None] / count, count, -1)
