"""What a merge method is: its settings, what it declares, and how it merges.

A method is one class in one module of this folder (or of another package, by an entry point `sensmerge.methods`),
registered by a decorator. Recipes are read, and their schema is written, from what it declares; so a module that
declares a method imports torch and what else is heavy inside its functions.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError

from sensmerge.tasks.registry import Registry
from sensmerge.tasks.strict import Strict

if TYPE_CHECKING:
    from torch import Tensor

    from sensmerge.tasks.methods.kernels.delta import Delta


@dataclass(frozen=True)
class _ForEachExpert:
    """Marks a setting; a value, not an object: marks travel to workers with their classes."""


_FOR_EACH_EXPERT = _ForEachExpert()
ForEachExpert = Annotated[float | dict[str, float], _FOR_EACH_EXPERT]
"""A setting that is one number for all experts, or one for each."""


def _unknown() -> None:
    return None


Factors = tuple["Tensor", "Tensor", float]
"""first (r, columns), second (rows, r) and scaling of a task vector scaling · second @ first; float32"""


@dataclass(frozen=True)
class TaskVector:
    """One expert's task vector of one tensor, and what a method may read beside it."""

    expert: str
    """name of the expert"""
    tensor: str
    """name of the tensor"""
    delta: "Delta"
    """expert − base"""
    weight: float
    """of the expert in the tensor's layer"""
    histogram: Callable[[], "Tensor | None"] = _unknown
    """reads `magnitude_histogram` of delta, if it was counted before"""
    factors: Callable[[], "Factors | None"] = _unknown
    """reads what delta is the product of, where it comes from an adapter alone"""
    statistics: Path | None = None
    """the expert's artifact of stage statistics, for a method that asks for some"""
    shape: tuple[int, ...] | None = None
    """of the tensor, for a method that looks at its rows; None: it has one dimension at most"""

    def statistic(self, name: str) -> "Tensor | None":
        """Return the sum over the expert's samples of a statistic by tensor; None if this tensor has none."""
        from sensmerge.tasks.statistics.statistic import read_tensor

        assert self.statistics is not None, "the method declares what statistics it reads"
        return read_tensor(self.statistics, name, self.tensor)

    def samples(self, name: str) -> int:
        """Return how many samples the sum of a statistic by tensor is taken over."""
        from sensmerge.tasks.artifacts import read_json

        assert self.statistics is not None, "the method declares what statistics it reads"
        found: int = read_json(self.statistics / f"{name}.json")["samples"]
        return found

    def tokens(self, name: str) -> int:
        """Return how many tokens the sum of a statistic by tensor is taken over."""
        from sensmerge.tasks.statistics.statistic import read_tokens

        assert self.statistics is not None, "the method declares what statistics it reads"
        return read_tokens(self.statistics, name, self.tensor)

    def input_dim(self, name: str) -> int | None:
        """Return which dimension of the tensor the inputs run along that a statistic has seen; None if it saw none."""
        from sensmerge.tasks.statistics.statistic import read_input_dim

        assert self.statistics is not None, "the method declares what statistics it reads"
        return read_input_dim(self.statistics, name, self.tensor)

    def whole(self, base: "Tensor") -> "Tensor":
        """Return the whole task vector: float32, in the shape of `base`, the base's tensor in any float dtype."""
        import torch

        values = torch.empty(base.numel(), device=base.device)
        self.delta.fill(values, slice(0, base.numel()), base.reshape(-1))
        return values.view(base.shape)


class Method(Strict, ABC):
    """A merge method. Its fields are its settings, under the recipe's keys; its docstring begins with what it does.

    A method that draws random numbers has a setting `seed`, and draws the same ones for an element on every device.
    """

    version: ClassVar[int] = 1
    """counts up whenever equal settings and inputs give other results than before"""
    needs: ClassVar[Literal["elements", "tensor", "matrix"]]
    """how much of a tensor it sees at a time: pieces in any order (tensor: twice, for it measures all of it before it
    merges any), or all of it with its shape"""
    least_experts: ClassVar[int] = 2
    most_experts: ClassVar[int | None] = None
    """how many experts it merges; None: however many there are"""
    statistics: ClassVar[tuple[str, ...]] = ()
    """names of the statistics that it reads of every expert"""
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    """types of the torch devices that it gives the same bits on: cpu, and cuda if a merge may run there"""
    changes_untouched: ClassVar[bool] = False
    """whether it changes tensors that no expert changed"""
    weights: ClassVar[tuple[float, ...]] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
    """the weights λ to try where a recipe leaves the choice open: those that published results lie between"""
    no_weights: ClassVar[str] = ""
    """why experts have no weights in it, so that `weight` and coefficients, those of sens too, mean nothing to it"""
    no_se: ClassVar[str] = "what one expert adds cannot be separated from what the others add"
    """why the method cannot be applied per sample (application se), unless it is `Additive`"""

    name: str = Field(alias="method", description="merge method")

    def for_each_expert(self) -> dict[str, Mapping[str, Any]]:
        """Return the settings that have a value for each expert, by their keys in a recipe."""
        fields = type(self).model_fields
        marked = {key: name for key, name in keys_of(type(self)).items() if _FOR_EACH_EXPERT in fields[name].metadata}
        values = {key: getattr(self, name) for key, name in marked.items()}
        return {key: value for key, value in values.items() if isinstance(value, dict)}

    @property
    def reads_histograms(self) -> bool:
        """Whether it reads the histograms of task vectors' magnitudes (`TaskVector.histogram`)."""
        return False

    @classmethod
    def check_experts(cls, count: int) -> None:
        """Check how many experts there are.

        Raises:
            ValueError: it does not merge so many.
        """
        least, most = cls.least_experts, cls.most_experts
        if count >= least and (most is None or count <= most):
            return
        numbers = {1: "one expert", 2: "two experts"}
        wanted = numbers.get(least, f"{least} experts")
        if least == most:
            raise ValueError(f"found {count}; expected exactly {wanted}")
        raise ValueError(f"found {count}; expected at least {wanted} to merge")

    def depends_on_weight(self) -> bool:
        """Return whether a common factor of all weights makes a difference."""
        return bool(self.weights) and not self.no_weights

    def scales_with_weight(self) -> bool:
        """Return whether a common factor c > 0 of all weights scales what the merge adds to the base.

        Then merge(base, c · weights) = base + c · (merge(base, weights) − base), up to rounding, so that merges of one
        variant with other weights λ can be told from one.
        """
        return False

    def check_weights(self, weights: Sequence[float]) -> None:
        """Check the experts' weights in one layer.

        Raises:
            ValueError: weights that the method can do nothing with.
        """
        return

    @abstractmethod
    def merged_pieces(self, base: "Tensor", vectors: Sequence[TaskVector]) -> "Iterator[tuple[slice, Tensor]]":
        """Merge one tensor: yield which of its elements, in their order, and their merged values, flat and float32.

        Args:
            base: the base's tensor, in any float dtype.
            vectors: the experts' task vectors.
        """


class ElementsMethod(Method):
    """A method that merges each element by itself, or with little that it has measured before."""

    needs: ClassVar[Literal["elements", "tensor", "matrix"]] = "elements"

    @abstractmethod
    def merge_elements(self, base: "Tensor", parts: "Tensor", weights: Sequence[float]) -> "Tensor":
        """Merge some elements and return them, flat and float32.

        Args:
            base: the base's elements, flat, in any float dtype.
            parts: the experts' task vectors there, float32 (experts × elements); may be changed.
            weights: of the experts.
        """

    def merged_pieces(self, base: "Tensor", vectors: Sequence[TaskVector]) -> "Iterator[tuple[slice, Tensor]]":
        """See `Method`. Memory: some pieces of `CHUNK` elements, and what `parts` needs."""
        base, weights = base.reshape(-1), [vector.weight for vector in vectors]
        for where, parts in self.parts(base, vectors):
            yield where, self.merge_elements(base[where], parts, weights)

    def parts(self, base: "Tensor", vectors: Sequence[TaskVector]) -> "Iterator[tuple[slice, Tensor]]":
        """Yield which elements, and every task vector's (experts × elements), float32; the caller's own.

        Args:
            base: the base's tensor, flat, in any float dtype.
            vectors: the experts' task vectors.
        """
        from sensmerge.tasks.methods.kernels.delta import parts

        yield from parts(base, [vector.delta for vector in vectors])


class MatrixMethod(Method):
    """A method that looks at a whole tensor with its shape."""

    needs: ClassVar[Literal["elements", "matrix"]] = "matrix"

    @abstractmethod
    def merge_matrix(self, base: "Tensor", vectors: Sequence[TaskVector]) -> "Tensor":
        """Merge one tensor, of any number of dimensions, and return it in float32.

        Args:
            base: the base's tensor, float32.
            vectors: the experts' task vectors; `whole` gives their values.
        """

    def merged_pieces(self, base: "Tensor", vectors: Sequence[TaskVector]) -> "Iterator[tuple[slice, Tensor]]":
        """See `Method`. Memory: base, result, and what `merge_matrix` needs."""
        import torch

        merged = self.merge_matrix(base.float(), vectors)
        if merged.shape != base.shape or merged.dtype != torch.float32:
            raise TypeError(
                f"method {self.name}: merge_matrix returned {merged.dtype} {tuple(merged.shape)}; expected "
                f"torch.float32 {tuple(base.shape)}"
            )
        yield slice(0, merged.numel()), merged.reshape(-1)


class Additive(ElementsMethod):
    """A method whose merge is the base and what each expert adds: application se takes a share of that per sample."""

    consensus: ClassVar[bool] = False
    """whether what one expert adds depends on the others, element by element; then it has `agreed_pieces`"""

    def check_se(self) -> None:
        """Check the settings for application se.

        Raises:
            ValueError: with these settings, the merge is not the base and what each expert adds.
        """
        return

    @abstractmethod
    def shares(self, weights: Sequence[float]) -> list[float]:
        """Return the factor that each expert's (sparse) task vector has in a merge without consensus."""

    def depends_on_weight(self) -> bool:
        """See `Method`."""
        return self.static_coefficient(1.0, 2) != self.static_coefficient(0.5, 2)

    def static_coefficient(self, weight: float, experts: int) -> float:
        """Return the factor of every expert's task vector under uniform coefficients: λ, or 1 / K if normalised."""
        return self.shares([weight] * experts)[0]

    def keeps_whole(self, expert: str) -> bool:
        """Return whether an expert adds a multiple of its whole task vector: nothing set to zero, no consensus.

        Then the factors of an adapter are kept instead of their product.
        """
        return False

    def contribution_pieces(self, base: "Tensor", vector: TaskVector, share: float) -> "Iterator[tuple[slice, Tensor]]":
        """Yield what one expert adds to one tensor in a merge without consensus, float32; `share` is from `shares`."""
        for where, (part,) in self.parts(base, [vector]):
            yield where, part.mul_(share)

    def agreed_pieces(self, base: "Tensor", vectors: Sequence[TaskVector]) -> "Iterator[tuple[slice, list[Tensor]]]":
        """Yield what each expert adds to one tensor under consensus, float32: base + their sum is the merged tensor."""
        raise NotImplementedError(f"method {self.name} has no consensus")


METHODS: Registry[Method] = Registry("sensmerge.methods", "sensmerge.tasks.methods")


def keys_of(method: type[Method]) -> dict[str, str]:
    """Return the names of a method's settings by their keys in a recipe."""
    return {info.alias or name: name for name, info in method.model_fields.items() if name != "name"}


def method_of(settings: Mapping[str, Any]) -> Method:
    """Return the method of a recipe's settings: `method`, and the keys that this method has.

    Raises:
        ValidationError: no such method, or settings that it refuses.
        ValueError: a setting that only other methods have.
    """
    name = settings.get("method")
    if not isinstance(name, str) or name not in METHODS:
        known = ", ".join(repr(one) for one in METHODS)
        raise ValidationError.from_exception_data(
            "method", [{"type": "literal_error", "loc": ("method",), "input": name, "ctx": {"expected": known}}]
        )
    others = {key for other in METHODS.values() for key in keys_of(other)} - keys_of(METHODS[name]).keys()
    for key in settings:
        if key in others:
            raise ValueError(f"{key} has no meaning for method {name}; leave it out")
    # null is the default, as in mergekit.
    return METHODS[name].model_validate({key: value for key, value in settings.items() if value is not None})
