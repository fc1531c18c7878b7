import torch

from tasks.methods.consensus import sign_agreement


def test_the_heavier_sign_wins() -> None:
    deltas = [torch.tensor([3.0, -3.0, 1.0]), torch.tensor([-1.0, 1.0, -4.0]), torch.tensor([-1.0, -1.0, 2.0])]
    found = torch.stack(sign_agreement(deltas)).tolist()
    assert found == [[True, True, False], [False, False, True], [False, True, False]]


def test_a_sum_of_zero_is_positive_and_zeros_never_agree() -> None:
    deltas = [torch.tensor([2.0, 0.0, 0.0]), torch.tensor([-2.0, 0.0, -1.0])]
    assert torch.stack(sign_agreement(deltas)).tolist() == [[True, False, False], [False, False, True]]


def test_one_task_vector_agrees_with_itself_where_it_is_not_zero() -> None:
    delta = torch.tensor([[1.0, -1.0], [0.0, -0.0]])
    assert sign_agreement([delta])[0].tolist() == [[True, True], [False, False]]
