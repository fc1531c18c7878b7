"""Batches of samples."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from sensmerge.tasks.networks.tokens import batches

LENGTHS = st.lists(st.integers(0, 200), max_size=40)


@given(lengths=LENGTHS, size=st.none() | st.integers(2, 9), padding=st.sampled_from([0.0, 0.1, 0.25, 1.0]))
def test_batches_hold_every_sample_once_little_padding_and_few_tokens(
    lengths: list[int], size: int | None, padding: float
) -> None:
    found = batches(lengths, size, padding)
    assert sorted(place for places in found for place in places) == list(range(len(lengths)))
    most = float("inf") if size is None else size * max([1, *lengths])
    for places in found:
        longest = max(lengths[place] for place in places)
        assert all(lengths[place] >= (1 - padding) * longest for place in places)
        assert len(places) * max(longest, 1) <= most
    # No fewer would do: the longest of each is too much for the batch before.
    for before, after in pairwise(found):
        longest, following = lengths[before[0]], lengths[after[0]]
        assert following < (1 - padding) * longest or (len(before) + 1) * max(longest, 1) > most


@given(lengths=LENGTHS)
def test_a_size_of_one_runs_every_sample_alone_the_longest_first(lengths: list[int]) -> None:
    found = batches(lengths, 1)
    assert all(len(places) == 1 for places in found)
    assert [lengths[place] for (place,) in found] == sorted(lengths, reverse=True)
