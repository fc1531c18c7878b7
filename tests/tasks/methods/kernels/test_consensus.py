import torch
from hypothesis import given
from hypothesis import strategies as st

from sensmerge.tasks.methods.kernels.consensus import agreeing, agreeing_weight, elected_sign


def agreement(deltas: list[torch.Tensor]) -> list[list[bool]]:
    _, magnitudes = agreeing([delta.clone() for delta in deltas], [1.0] * len(deltas))
    return [(magnitude > 0).tolist() for magnitude in magnitudes]


def test_the_heavier_sign_wins() -> None:
    deltas = [torch.tensor([3.0, -3.0, 1.0]), torch.tensor([-1.0, 1.0, -4.0]), torch.tensor([-1.0, -1.0, 2.0])]
    assert agreement(deltas) == [[True, True, False], [False, False, True], [False, True, False]]


def test_a_sum_of_zero_is_positive_and_zeros_never_agree() -> None:
    deltas = [torch.tensor([2.0, 0.0, 0.0]), torch.tensor([-2.0, 0.0, -1.0])]
    assert agreement(deltas) == [[True, False, False], [False, False, True]]


def test_one_task_vector_agrees_with_itself_where_it_is_not_zero() -> None:
    delta = torch.tensor([[1.0, -1.0], [0.0, -0.0]])
    assert agreement([delta]) == [[[True, True], [False, False]]]


float32 = st.floats(width=32, min_value=-(2.0**99), max_value=2.0**99)


@given(rows=st.lists(st.tuples(float32, float32, float32), min_size=1, max_size=20), weights=st.tuples(*[float32] * 3))
def test_element_by_element(rows: list[tuple[float, float, float]], weights: tuple[float, float, float]) -> None:
    deltas = [torch.tensor(column) for column in zip(*rows, strict=True)]
    total = deltas[0] + deltas[1] + deltas[2]
    sign = elected_sign(deltas)
    assert torch.equal(sign, torch.where(total >= 0, 1.0, -1.0))
    _, agreed = agreeing([delta.clone() for delta in deltas], [1.0] * 3)
    for delta, kept in zip(deltas, agreed, strict=True):
        assert torch.equal(kept * sign, torch.where(delta.sign() == sign, delta, 0.0))
    summed = torch.zeros(len(rows))
    for delta, weight in zip(agreed, weights, strict=True):
        summed += torch.where(delta != 0, weight, 0.0)
    assert torch.equal(agreeing_weight(agreed, weights), torch.where(summed == 0, 1.0, summed))
