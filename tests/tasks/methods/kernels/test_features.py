"""The closed forms against least squares by torch.linalg.lstsq, float64, on rows that are stacked and weighted."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sensmerge.tasks.methods.kernels.features import InputMoments, LinearFit, NormFit, NormMoments

RIDGE = 0.05


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Task:
    """Tokens of one task, and the expert's layer."""

    def __init__(self, seed: int, tokens: int = 40, width: int = 6, out: int = 4) -> None:
        self.student = randn(tokens, width, seed=seed) * (1 + seed)
        self.teacher = self.student + randn(tokens, width, seed=seed + 100)
        self.weights = randn(tokens, seed=seed + 200).abs()
        self.weight, self.bias = randn(out, width, seed=seed + 300), randn(out, seed=seed + 400)

    def fit(self, alpha: float, pieces: int = 1) -> LinearFit:
        moments = InputMoments(alpha)
        for one in zip(*(each.chunk(pieces) for each in (self.student, self.teacher, self.weights)), strict=True):
            moments.add(*one)
        return LinearFit.of(moments, {"layer": (self.weight, self.bias)})

    def scaled(self) -> Tensor:
        """The weight of every row: that of the token, of all 1, by the norm of the weighted second moments."""
        shares = self.weights / self.weights.sum()
        return shares / torch.linalg.matrix_norm(self.student.T @ (self.student * shares[:, None]))


def least_squares(left: Sequence[Tensor], right: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    roots = [one.sqrt()[:, None] for one in weights]
    left, right = (torch.cat([a * b for a, b in zip(each, roots, strict=True)]) for each in (left, right))
    return torch.linalg.lstsq(left, right).solution


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("pieces", [1, 7, 40])
def test_linear_layer(alpha: float, pieces: int) -> None:
    tasks = [Task(seed) for seed in range(3)]
    anchor, anchor_bias = randn(4, 6, seed=9), randn(4, seed=10)
    total = tasks[0].fit(alpha, pieces)
    for one in tasks[1:]:
        total += one.fit(alpha, pieces)
    weight, bias = total.solve({"layer": (anchor, anchor_bias)}, RIDGE)["layer"]

    targets = [alpha * one.teacher + (1 - alpha) * one.student for one in tasks]
    eye, held = torch.eye(6, dtype=torch.float64), torch.full((6,), RIDGE, dtype=torch.float64)
    expected = least_squares(
        [*(one.student for one in tasks), eye],
        [*(target @ one.weight.T for one, target in zip(tasks, targets, strict=True)), anchor.T],
        [*(one.scaled() for one in tasks), held],
    ).T
    torch.testing.assert_close(weight, expected, rtol=1e-9, atol=1e-9)

    rest = [
        target @ one.weight.T + one.bias - one.student @ expected.T for one, target in zip(tasks, targets, strict=True)
    ]
    ones = [torch.ones(len(one), 1, dtype=torch.float64) for one in (*rest, [0])]
    expected_bias = least_squares(ones, [*rest, anchor_bias[None]], [*(one.scaled() for one in tasks), held[:1]])[0]
    torch.testing.assert_close(bias, expected_bias, rtol=1e-9, atol=1e-9)


def test_an_expert_is_reproduced() -> None:
    task = Task(1)
    mixed = randn(6, 6, seed=5)
    task.student = task.teacher @ mixed  # what the merge has made of the inputs can be undone
    solved = task.fit(alpha=1.0).solve({"layer": (torch.zeros(4, 6), torch.zeros(4))}, 1e-13)
    weight, bias = solved["layer"]
    expected = task.teacher @ task.weight.T + task.bias
    torch.testing.assert_close(task.student @ weight.T + bias, expected, rtol=1e-6, atol=1e-6)


def test_identical_experts_are_one() -> None:
    anchor = (randn(4, 6, seed=9), randn(4, seed=10))
    total = Task(1).fit(0.25)
    for _ in range(2):
        total += Task(1).fit(0.25)
    three, one = total.solve({"layer": anchor}, 3 * RIDGE), Task(1).fit(0.25).solve({"layer": anchor}, RIDGE)
    torch.testing.assert_close(three["layer"], one["layer"])
    held = (Task(1).weight, Task(1).bias)
    task = Task(1)
    task.teacher = task.student
    torch.testing.assert_close(task.fit(0.25).solve({"layer": held}, RIDGE)["layer"], held)


def test_inputs_that_are_zero_leave_the_anchor() -> None:
    task = Task(1)
    task.student = torch.zeros_like(task.student)
    anchor = (randn(4, 6, seed=9), randn(4, seed=10))
    torch.testing.assert_close(task.fit(0.25).solve({"layer": anchor}, RIDGE)["layer"], anchor)


def test_narrow_inputs_are_multiplied_in_float32() -> None:
    task = Task(1)
    narrow = Task(1)
    narrow.student, narrow.teacher = task.student.bfloat16(), task.teacher.bfloat16()
    task.student, task.teacher = narrow.student.double(), narrow.teacher.double()
    anchor = (randn(4, 6, seed=9), randn(4, seed=10))
    found, expected = (one.fit(0.25).solve({"layer": anchor}, RIDGE)["layer"] for one in (narrow, task))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("has_shift", [True, False])
def test_norm(has_shift: bool) -> None:
    tasks = [Task(seed) for seed in range(3)]
    scales, shifts = ([randn(6, seed=seed + number) for seed in range(3)] for number in (500, 600))
    anchor, held = randn(6, seed=9), randn(6, seed=10)
    fits = []
    for task, scale, shift in zip(tasks, scales, shifts, strict=True):
        moments = NormMoments()
        for one in zip(task.student.chunk(3), task.weights.chunk(3), strict=True):
            moments.add(*one)
        fits.append(NormFit(moments, scale, shift if has_shift else None))
    total, *others = fits
    for fit in others:
        total += fit
    found = total.solve(anchor, held if has_shift else None, RIDGE)
    for channel in range(6):
        rows, right, weights = [], [], []
        for task, scale, shift in zip(tasks, scales, shifts, strict=True):
            z = task.student[:, channel]
            rows.append(torch.stack([z, torch.ones_like(z)], 1) if has_shift else z[:, None])
            right.append((scale[channel] * z + (shift[channel] if has_shift else 0))[:, None])
            weights.append(task.weights / task.weights.sum())
        rows.append(torch.eye(1 + has_shift, dtype=torch.float64))
        right.append(torch.stack([anchor[channel], held[channel]])[: 1 + has_shift, None])
        weights.append(torch.full((1 + has_shift,), RIDGE, dtype=torch.float64))
        expected = least_squares(rows, right, weights)[:, 0]
        torch.testing.assert_close(torch.stack([one[channel] for one in found]), expected, rtol=1e-9, atol=1e-9)
