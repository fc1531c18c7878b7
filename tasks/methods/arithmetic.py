"""Linear merges and task arithmetic, with the semantics, defaults and corner cases of mergekit 0.1.5.

Eight published methods are rows of one table: how a task vector is made sparse × whether signs must agree × defaults.
To add another of that family, add a class.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from sensmerge.tasks.methods.contract import METHODS, Additive, ForEachExpert, TaskVector

if TYPE_CHECKING:
    from torch import Tensor

    from sensmerge.tasks.methods.kernels.sparsify import Sparsifier

_NORMALIZE = "divide by the sum of the weights (with consensus: for each element, of the experts that agree)"
_ZERO = 1e-8
"""Weights whose sum is smaller sum to 0 (mergekit's rule)."""


@METHODS.register("linear")
class Linear(Additive):
    """Weighted mean of the experts themselves (model soup, arXiv 2203.05482)."""

    least_experts: ClassVar[int] = 1
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    changes_untouched: ClassVar[bool] = True

    normalize: bool = Field(True, description=_NORMALIZE)

    def check_weights(self, weights: Sequence[float]) -> None:
        """See `Method`."""
        if self.normalize and abs(sum(weights)) < _ZERO:
            raise ValueError("the weights sum to 0, which linear divides by; set normalize: false or other weights")

    def merge_elements(self, base: "Tensor", parts: "Tensor", weights: Sequence[float]) -> "Tensor":
        """See `ElementsMethod`."""
        from sensmerge.tasks.methods.kernels.delta import divide, weighted_sum

        merged = weighted_sum(parts.add_(base.float()), weights)
        return divide(merged, sum(weights)) if self.normalize else merged

    def keeps_whole(self, expert: str) -> bool:
        """See `Additive`."""
        return True

    def check_se(self) -> None:
        """See `Additive`."""
        if not self.normalize:
            raise ValueError("linear with normalize: false scales the base; application se needs normalize: true")

    def shares(self, weights: Sequence[float]) -> list[float]:
        """See `Additive`; weights that sum to 0 give NaN, as in the merge itself."""
        total = sum(weights)
        divisor = 1.0 if not self.normalize else total if abs(total) >= _ZERO else math.nan
        return [weight / divisor for weight in weights]


class _Arithmetic(Additive):
    """Base + lambda · the weighted sum or, under consensus, the disjoint sum of (sparse) task vectors."""

    least_experts: ClassVar[int] = 1
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")

    normalize: bool = Field(False, description=_NORMALIZE)
    lambda_: float = Field(1.0, alias="lambda", description="factor that scales the sum of task vectors")

    def merge_elements(self, base: "Tensor", parts: "Tensor", weights: Sequence[float]) -> "Tensor":
        """See `ElementsMethod`. Semantics of mergekit's `GeneralizedTaskArithmeticMerge`."""
        from sensmerge.tasks.methods.kernels.consensus import disjoint_sum
        from sensmerge.tasks.methods.kernels.delta import weighted_sum

        if self.consensus:
            return self._added(disjoint_sum(parts, weights, self.normalize), base, weights)
        return self._added(weighted_sum(parts, weights), base, weights)

    def _added(self, mixed: "Tensor", base: "Tensor", weights: Sequence[float]) -> "Tensor":
        """Return the base and a sum of (sparse) task vectors, which is changed, float32."""
        from sensmerge.tasks.methods.kernels.delta import divide
        from sensmerge.tasks.methods.kernels.stored import add

        if self.normalize and not self.consensus and abs(sum(weights)) >= _ZERO:
            divide(mixed, sum(weights))
        if self.lambda_ != 1:
            mixed *= self.lambda_
        return add(mixed, base)

    def shares(self, weights: Sequence[float]) -> list[float]:
        """See `Additive`."""
        total = sum(weights)
        divisor = total if self.normalize and abs(total) >= _ZERO else 1.0
        return [weight / divisor * self.lambda_ for weight in weights]

    def scales_with_weight(self) -> bool:
        """See `Method`. Divided by their sum, weights lose their common factor."""
        return not self.normalize

    def agreed_pieces(self, base: "Tensor", vectors: Sequence[TaskVector]) -> "Iterator[tuple[slice, list[Tensor]]]":
        """See `Additive`. Signs are elected, and sums divided, with the weights given.

        So each part is the same for every input. Up to rounding, for the sum is divided part by part.
        """
        from sensmerge.tasks.methods.kernels.consensus import agreeing, agreeing_weight

        assert self.consensus
        weights = [vector.weight for vector in vectors]
        for where, parts in self.parts(base, vectors):
            sign, magnitudes = agreeing(parts, weights)
            if self.normalize:
                sign /= agreeing_weight(magnitudes, weights)
            if self.lambda_ != 1:
                sign *= self.lambda_
            yield where, [magnitude.mul_(sign) for magnitude in magnitudes]


@METHODS.register("task_arithmetic")
class TaskArithmetic(_Arithmetic):
    """Base plus the weighted sum of task vectors (arXiv 2212.04089)."""

    def merged_pieces(self, base: "Tensor", vectors: Sequence[TaskVector]) -> "Iterator[tuple[slice, Tensor]]":
        """See `Method`; the task vectors themselves need not be in memory."""
        from sensmerge.tasks.methods.kernels.delta import sums

        base, weights = base.reshape(-1), [vector.weight for vector in vectors]
        for where, mixed in sums(base, [vector.delta for vector in vectors], weights):
            yield where, self._added(mixed, base[where], weights)

    def keeps_whole(self, expert: str) -> bool:
        """See `Additive`."""
        return True


class _Sparse(_Arithmetic):
    """Task arithmetic that first sets elements of each task vector to zero."""

    version: ClassVar[int] = 2

    density: ForEachExpert = Field(
        1.0, description="share of each task vector's elements to keep; one number, or one per expert"
    )
    rescale: bool = Field(False, description="scale each sparse task vector back to the L1 norm that it had before")

    @model_validator(mode="after")
    def _check_densities(self) -> "_Sparse":
        for density in self.density.values() if isinstance(self.density, dict) else [self.density]:
            if not 0 <= density <= 1:
                raise ValueError(f"density is {density}; expected a number between 0 and 1")
        return self

    def density_of(self, expert: str) -> float:
        """Return the density of an expert."""
        return self.density[expert] if isinstance(self.density, dict) else self.density

    def keeps_whole(self, expert: str) -> bool:
        """See `Additive`."""
        return not self.consensus and self.density_of(expert) >= 1

    @abstractmethod
    def sparsifier(self, vector: TaskVector, base: "Tensor", density: float) -> "Sparsifier":
        """Return what sets elements of a task vector to zero.

        Args:
            vector: the task vector.
            base: the base's tensor, flat, in any float dtype.
            density: share of elements to keep, above 0 and below 1.
        """

    def parts(self, base: "Tensor", vectors: Sequence[TaskVector]) -> "Iterator[tuple[slice, Tensor]]":
        """See `ElementsMethod`. Before the first piece, each task vector is looked through.

        Once to trim, once more where its histogram is not known, and once to rescale. Memory: what `Trim.of` says.
        """
        from sensmerge.tasks.methods.kernels.delta import parts

        sparsifiers = [self._sparsifier(vector, base) for vector in vectors]
        for where, found in parts(base, [vector.delta for vector in vectors]):
            for part, sparsify in zip(found, sparsifiers, strict=True):
                if sparsify is not None:
                    sparsify(part, where)
            yield where, found

    def _sparsifier(self, vector: TaskVector, base: "Tensor") -> "Sparsifier | None":
        from sensmerge.tasks.methods.kernels.sparsify import Rescaled, drop_all

        density = self.density_of(vector.expert)
        if density >= 1 or not len(base):
            return None
        if density <= 0:
            return drop_all
        sparsify = self.sparsifier(vector, base, density)
        return Rescaled.of(vector.delta, base, sparsify) if self.rescale else sparsify


class _ByMagnitude(_Sparse):
    """Keeps elements by the order of their magnitudes."""

    @property
    def reads_histograms(self) -> bool:
        """See `Method`: an expert that keeps a share of its elements has the others set to zero."""
        densities = self.density.values() if isinstance(self.density, dict) else [self.density]
        return any(0 < density < 1 for density in densities)

    def sparsifier(self, vector: TaskVector, base: "Tensor", density: float) -> "Sparsifier":
        """See `_Sparse`."""
        from sensmerge.tasks.methods.kernels.sparsify import histogram_of

        known = vector.histogram()
        return self.kept(vector, base, density, histogram_of(vector.delta, base) if known is None else known)

    @abstractmethod
    def kept(self, vector: TaskVector, base: "Tensor", density: float, histogram: "Tensor") -> "Sparsifier":
        """Do as `sparsifier`; `histogram` is that of the task vector's magnitudes."""


@METHODS.register("ties")
class Ties(_ByMagnitude):
    """Trims task vectors to their largest elements, and sums those that agree in sign (arXiv 2306.01708)."""

    consensus: ClassVar[bool] = True

    normalize: bool = Field(True, description=_NORMALIZE)

    def kept(self, vector: TaskVector, base: "Tensor", density: float, histogram: "Tensor") -> "Sparsifier":
        """See `_ByMagnitude`."""
        from sensmerge.tasks.methods.kernels.sparsify import Trim, kept_elements

        return Trim.of(vector.delta, base, kept_elements(len(base), density), histogram)


class _Dare(_Sparse):
    """Drops random elements of each task vector (arXiv 2311.03099)."""

    rescale: bool = Field(True, description="scale each sparse task vector back to the L1 norm that it had before")
    seed: int = Field(0, description="seed of the random masks")

    def sparsifier(self, vector: TaskVector, base: "Tensor", density: float) -> "Sparsifier":
        """See `_Sparse`."""
        from sensmerge.tasks.methods.kernels.sparsify import Drop

        return Drop(f"{self.seed}/{vector.expert}/{vector.tensor}", density)


@METHODS.register("dare_linear")
class DareLinear(_Dare):
    """Drops random elements of task vectors and sums the rest (arXiv 2311.03099)."""


@METHODS.register("dare_ties")
class DareTies(_Dare):
    """Drops random elements of task vectors and sums those that agree in sign (arXiv 2311.03099, 2306.01708)."""

    consensus: ClassVar[bool] = True


@METHODS.register("breadcrumbs")
class Breadcrumbs(_ByMagnitude):
    """Drops the largest and the smallest elements of task vectors and sums the rest (arXiv 2312.06795)."""

    gamma: ForEachExpert = Field(
        0.01,
        description="share of each task vector's elements that are dropped for being the largest, as far as density "
        "leaves room; one number, or one per expert",
    )

    @model_validator(mode="after")
    def _check_gammas(self) -> "Breadcrumbs":
        for gamma in self.gamma.values() if isinstance(self.gamma, dict) else [self.gamma]:
            if not 0 <= gamma <= 1:
                raise ValueError(f"gamma is {gamma}; expected a number between 0 and 1")
        return self

    def kept(self, vector: TaskVector, base: "Tensor", density: float, histogram: "Tensor") -> "Sparsifier":
        """See `_ByMagnitude`; shares are rounded down, so of few elements none may stay."""
        from sensmerge.tasks.methods.kernels.sparsify import Band, drop_all

        gamma = self.gamma[vector.expert] if isinstance(self.gamma, dict) else self.gamma
        keep = int(density * len(base))
        if not keep:
            return drop_all
        return Band.of(vector.delta, base, min(int(gamma * len(base)), len(base) - keep), keep, histogram)


@METHODS.register("breadcrumbs_ties")
class BreadcrumbsTies(Breadcrumbs):
    """Drops task vectors' largest and smallest elements and sums those that agree (arXiv 2312.06795, 2306.01708)."""

    consensus: ClassVar[bool] = True


class _Della(_Sparse):
    """Drops random elements of each task vector, small ones rather than large ones (arXiv 2406.11617)."""

    devices: ClassVar[tuple[str, ...]] = ("cpu",)

    rescale: bool = Field(True, description="scale each sparse task vector back to the L1 norm that it had before")
    epsilon: ForEachExpert = Field(
        0.15,
        description="an element is kept with a probability between density − epsilon, for the smallest of its row, and "
        "density + epsilon, for the largest; one number, or one per expert",
    )
    seed: int = Field(0, description="seed of the random masks")

    @model_validator(mode="after")
    def _check_epsilons(self) -> "_Della":
        named = {*self.density} if isinstance(self.density, dict) else set()
        for expert in named | ({*self.epsilon} if isinstance(self.epsilon, dict) else set()) or {""}:
            density = self.density.get(expert, 1.0) if isinstance(self.density, dict) else self.density
            epsilon = self.epsilon.get(expert, 0.0) if isinstance(self.epsilon, dict) else self.epsilon
            if epsilon < 0 or (0 < density < 1 and not epsilon < density < 1 - epsilon):
                raise ValueError(
                    f"epsilon is {epsilon} where density is {density}; expected 0 or more, and density ± epsilon "
                    "between 0 and 1"
                )
        return self

    def sparsifier(self, vector: TaskVector, base: "Tensor", density: float) -> "Sparsifier":
        """See `_Sparse`. Memory: a bit for each element, and 17 bytes for each in a piece of whole rows."""
        from sensmerge.tasks.methods.kernels.ranked import Chosen, by_rank

        epsilon = self.epsilon[vector.expert] if isinstance(self.epsilon, dict) else self.epsilon
        key = f"{self.seed}/{vector.expert}/{vector.tensor}"
        return Chosen(by_rank(vector, base, (density - epsilon, density + epsilon), key))


@METHODS.register("della")
class Della(_Della):
    """Drops random elements, small ones rather, and sums those that agree in sign (arXiv 2406.11617)."""

    consensus: ClassVar[bool] = True

    normalize: bool = Field(True, description=_NORMALIZE)


@METHODS.register("della_linear")
class DellaLinear(_Della):
    """Drops random elements of task vectors, small ones rather, and sums the rest (arXiv 2406.11617)."""
