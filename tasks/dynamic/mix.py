"""The coefficients of one batch and the task vectors on one parameter, in the form that modules need them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sensmerge.tasks.dynamic.vectors import Dense, LowRank, Sparse, Vector


@dataclass(frozen=True)
class Share:
    """The samples of a batch that take some of one expert."""

    rows: slice | Tensor
    """a slice where they follow each other: then their inputs and outputs are views"""
    scale: Tensor
    """(samples,): their coefficients"""


@dataclass
class Mix:
    """The coefficients of one batch."""

    coefficients: Tensor
    """(B, K), on the network's device and in its dtype"""
    shares: Mapping[int, Share]
    """by expert, of the experts that any sample takes"""
    length: int | None = None
    """tokens of every sample of the forward pass under way"""

    @classmethod
    def of(cls, coefficients: Tensor, network: PreTrainedModel) -> "Mix":
        """Return the coefficients (B, K) as a network needs them."""
        # Which rows are zero decides what is computed: looked up once, as a GPU has to wait for the answer.
        taken = coefficients.cpu() != 0
        coefficients = coefficients.to(network.device, network.dtype)
        shares = {}
        for expert, column in enumerate(taken.unbind(1)):
            indices = column.nonzero().flatten()
            if len(indices):
                first, end = int(indices[0]), int(indices[-1]) + 1
                rows = slice(first, end) if end - first == len(indices) else indices.to(network.device)
                shares[expert] = Share(rows, coefficients[rows, expert])
        return cls(coefficients, shares)

    @property
    def size(self) -> int:
        """Number of samples, B."""
        return len(self.coefficients)


@dataclass(frozen=True)
class Factors:
    """The low-rank task vectors of all experts on one weight, one below the other."""

    first: Tensor
    """(R, columns), R the sum of the ranks"""
    second: Tensor
    """(rows, R)"""
    owner: Tensor
    """(R,): index of the expert"""

    def scale(self, mix: Mix) -> Tensor:
        """Return each sample's coefficient of each rank, (B, 1, R)."""
        return mix.coefficients.index_select(1, self.owner).unsqueeze(1)


@dataclass(frozen=True)
class Change:
    """What the experts change in one parameter."""

    whole: Mapping[int, Dense | Sparse]
    """by expert, task vectors that are not low-rank"""
    factors: Factors | None
    """those that are"""
    experts: frozenset[int]

    @classmethod
    def of(cls, vectors: Mapping[int, Vector]) -> "Change":
        """Return the task vectors of one parameter by expert in the form that terms need."""
        low = {expert: vector for expert, vector in vectors.items() if isinstance(vector, LowRank)}
        factors = None
        if low:
            first = torch.cat([vector.first for vector in low.values()])
            owner = [expert for expert, vector in low.items() for _ in range(len(vector.first))]
            factors = Factors(
                first,
                torch.cat([vector.second for vector in low.values()], dim=1),
                torch.tensor(owner, device=first.device),
            )
        whole = {expert: vector for expert, vector in vectors.items() if not isinstance(vector, LowRank)}
        return cls(whole, factors, frozenset(vectors))

    def vector(self, expert: int) -> Tensor | None:
        """Return an expert's whole task vector; None if it has none."""
        if expert in self.whole:
            return self.whole[expert].dense()
        if self.factors is None or expert not in self.experts:
            return None
        own = self.factors.owner == expert
        return self.factors.second[:, own] @ self.factors.first[own]

    def shared(self, mix: Mix) -> Iterator[tuple[Share, Dense | Sparse]]:
        """Yield share and task vector, if not low-rank, of each expert that has both."""
        for expert, vector in self.whole.items():
            if expert in mix.shares:
                yield mix.shares[expert], vector


class Stack:
    """The task vectors of a small parameter, as the rows of one matrix."""

    def __init__(self, change: Change) -> None:
        """Stack what the experts change in one parameter."""
        assert change.factors is None, "vectors, norms and positions have no low-rank task vectors"
        self._values = torch.stack([vector.dense() for vector in change.whole.values()])
        self._experts = torch.tensor(list(change.whole), device=self._values.device)

    def per_sample(self, mix: Mix, dimensions: int) -> Tensor:
        """Return Σₖ cₖ·δₖ of every sample, (B, 1, …, 1, *shape) with as many dimensions as asked for."""
        mixed = mix.coefficients.index_select(1, self._experts) @ self._values.flatten(1)
        shape = self._values.shape[1:]
        return mixed.view(mix.size, *[1] * (dimensions - 1 - len(shape)), *shape)
