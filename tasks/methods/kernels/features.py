"""Closed forms that fit one layer of a merged model to the outputs of several experts' layers (FeatCal).

Calibrated features, arXiv 2605.13030. Of a task, x_s are the inputs of a layer in the merged model, x_e those of the
same tokens in the task's expert, and x_t = α·x_e + (1 − α)·x_s. All sums are float64.
"""

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor


class InputMoments:
    """Weighted sums over the tokens of one task: of x_s, x_t, x_s x_sᵀ and x_s x_tᵀ."""

    def __init__(self, alpha: float) -> None:
        """Begin with no token; `alpha` is the share of x_e in x_t."""
        self._alpha = alpha
        self._tokens = 0.0
        self._sums: list[Tensor] = []
        self._waiting: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def add(self, student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> None:
        """Add tokens.

        They wait until there are as many as inputs: then their products take as long as adding these up.

        Args:
            student: x_s, (tokens, in).
            teacher: x_e, (tokens, in).
            weights: of the tokens, (tokens,); None: all 1.
        """
        self._waiting.append((student, teacher, weights))
        if sum(len(one) for one, *_ in self._waiting) >= student.shape[-1]:
            self._add_up()

    def _add_up(self) -> None:
        dtype = torch.promote_types(self._waiting[0][0].dtype, torch.float32)
        student = torch.cat([one for one, _, _ in self._waiting]).to(dtype)
        teacher = torch.cat([one for _, one, _ in self._waiting]).to(dtype)
        counted = [student.new_ones(len(one)) if each is None else each.to(dtype) for one, _, each in self._waiting]
        weights = torch.cat(counted)[:, None]
        self._waiting = []
        target = torch.lerp(student, teacher, self._alpha)
        weighted = student * weights
        found = [one.sum(0, dtype=torch.float64) for one in (weighted, target * weights)]
        found += [(weighted.T @ one).double() for one in (student, target)]
        self._tokens += float(weights.sum())
        self._sums = [total.add_(one) for total, one in zip(self._sums, found, strict=True)] if self._sums else found

    def means(self) -> list[Tensor]:
        """Return the means of x_s (in,), x_t (in,), x_s x_sᵀ (in, in) and x_s x_tᵀ (in, in), and let go of the sums.

        They are float64; the products of the tokens that were added up together are float32 where these are not wider.
        """
        if self._waiting:
            self._add_up()
        sums, self._sums = self._sums, []
        return [one.div_(self._tokens) for one in sums]


@dataclass
class LayerTargets:
    """Of one linear layer, the right sides of what is solved."""

    outputs: Tensor
    """Σ over tasks of scale · mean x_s (W_k x_t)ᵀ, (in, out)"""
    bias: Tensor | None
    """Σ over tasks of scale · (b_k + W_k mean x_t), (out,); None for a layer without bias"""


@dataclass
class LinearFit:
    """The ridge regression of the linear layers that share an input, on any number of tasks.

    A task's scale is 1 / ‖mean x_s x_sᵀ‖_F, so that tasks count alike however large their inputs are.
    """

    gram: Tensor
    """Σ over tasks of scale · mean x_s x_sᵀ, (in, in)"""
    mean: Tensor
    """Σ over tasks of scale · mean x_s, (in,)"""
    scale: float
    """Σ over tasks of scale"""
    layers: dict[str, LayerTargets]
    """by name"""

    @classmethod
    def of(cls, moments: InputMoments, layers: dict[str, tuple[Tensor, Tensor | None]]) -> "LinearFit":
        """Return the regression on one task; inputs that are all zero count nothing.

        Args:
            moments: of the task; they are used up.
            layers: the expert's weight (out, in) and bias (out,) of each layer, float64.
        """
        mean, target_mean, gram, cross = moments.means()
        norm = float(torch.linalg.matrix_norm(gram))
        scale = 1 / norm if norm else 0.0
        targets = {
            name: LayerTargets(
                (cross @ weight.T).mul_(scale), None if bias is None else (weight @ target_mean).add_(bias).mul_(scale)
            )
            for name, (weight, bias) in layers.items()
        }
        return cls(gram.mul_(scale), mean.mul_(scale), scale, targets)

    def __iadd__(self, other: "LinearFit") -> Self:
        """Add the regression on other tasks, of the same layers."""
        self.gram += other.gram
        self.mean += other.mean
        self.scale += other.scale
        for name, targets in other.layers.items():
            mine = self.layers[name]
            mine.outputs += targets.outputs
            if mine.bias is not None and targets.bias is not None:
                mine.bias += targets.bias
        return self

    def solve(self, anchors: dict[str, tuple[Tensor, Tensor | None]], ridge: float) -> dict[str, tuple[Tensor, ...]]:
        """Return weight (out, in), and bias (out,) where there is one, of each layer.

        W = (gram + ridge·I)⁻¹ (outputs + ridge·anchor), transposed; then
        b = (Σ scale·(b_k + W_k mean x_t − W mean x_s) + ridge·anchor) / (Σ scale + ridge).

        Args:
            anchors: what weight and bias of each layer are held to, float64.
            ridge: how strongly; gram has a norm of at most the number of tasks, so that 1e-6 is enough to solve with.
        """
        factor = torch.linalg.cholesky(self.gram + ridge * torch.eye(len(self.gram)).to(self.gram))
        solved: dict[str, tuple[Tensor, ...]] = {}
        for name, targets in self.layers.items():
            anchor, anchor_bias = anchors[name]
            weight = torch.cholesky_solve(targets.outputs + ridge * anchor.T, factor).T
            solved[name] = (weight,)
            if targets.bias is not None and anchor_bias is not None:
                rest = targets.bias - weight @ self.mean + ridge * anchor_bias
                solved[name] += (rest / (self.scale + ridge),)
        return solved


@dataclass
class NormMoments:
    """Weighted sums over the tokens of one task of a norm's normalised inputs z, and of z²."""

    tokens: float = 0.0
    """sum of the tokens' weights"""
    sums: list[Tensor] = field(default_factory=list)

    def add(self, normalised: Tensor, weights: Tensor | None = None) -> None:
        """Add tokens: z of the merged model, (tokens, width), and their weights, (tokens,); None: all 1."""
        values = normalised.double()
        weighted = values if weights is None else values * weights.double()[:, None]
        found = [weighted.sum(0), (weighted * values).sum(0)]
        self.tokens += float(len(values) if weights is None else weights.sum())
        self.sums = [total + one for total, one in zip(self.sums, found, strict=True)] if self.sums else found


class NormFit:
    """The regression of a norm's scale γ, and its shift β where it has one, on any number of tasks.

    Least squares of γ·z + β against γ_k·z + β_k, with z of the merged model, for each channel by itself.
    """

    def __init__(self, moments: NormMoments, scale: Tensor, shift: Tensor | None) -> None:
        """Begin with one task.

        Args:
            moments: of the task.
            scale: γ_k of its expert, (width,), float64.
            shift: β_k likewise; None for a norm without one.
        """
        mean, self._energy = (one / moments.tokens for one in moments.sums)
        self._mean, self._tasks, self._shift = mean, 1, None
        self._scale = self._energy * scale
        if shift is not None:
            self._scale, self._shift = self._scale + mean * shift, mean * scale + shift

    def __iadd__(self, other: "NormFit") -> Self:
        """Add the regression on other tasks, of the same norm."""
        self._mean, self._energy = self._mean + other._mean, self._energy + other._energy
        self._scale, self._tasks = self._scale + other._scale, self._tasks + other._tasks
        if self._shift is not None and other._shift is not None:
            self._shift = self._shift + other._shift
        return self

    def solve(self, scale: Tensor, shift: Tensor | None, ridge: float) -> tuple[Tensor, ...]:
        """Return γ, and β where there is one.

        Without β, γ = (Σ mean z² · γ_k + ridge·anchor) / (Σ mean z² + ridge); with it the two normal equations
        of each channel are solved.

        Args:
            scale: what γ is held to, (width,), float64.
            shift: what β is held to.
            ridge: how strongly, above 0.
        """
        energy, right = self._energy + ridge, self._scale + ridge * scale
        if self._shift is None or shift is None:
            return (right / energy,)
        tasks, other = self._tasks + ridge, self._shift + ridge * shift
        determinant = energy * tasks - self._mean.square()  # above 0: (Σ mean z)² ≤ tasks · Σ mean z²
        return (
            (tasks * right - self._mean * other) / determinant,
            (energy * other - self._mean * right) / determinant,
        )
