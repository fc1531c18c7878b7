"""Correlations against scipy's, one by one and of many resamples at once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import pearsonr, rankdata, spearmanr
from sklearn.metrics import mean_squared_error as reference_error

from sensmerge.tasks.kinds.correlation import mean_squared_error, pearson, spearman
from sensmerge.tasks.kinds.scores import Metric, score


def columns(seed: int, count: int, digits: int) -> NDArray[np.float64]:
    """Correlated numbers, rounded so that some are equal."""
    generator = np.random.default_rng(seed)
    label = generator.normal(size=count)
    return np.round(np.stack([label, label + generator.normal(size=count)], -1), digits)


@pytest.mark.parametrize("digits", [0, 1, 12])
@pytest.mark.parametrize("count", [5, 40, 300])
def test_correlations_are_those_of_scipy(count: int, digits: int) -> None:
    found = columns(count, count, digits)
    assert float(pearson(found)) == pytest.approx(pearsonr(*found.T).statistic, abs=1e-12)
    assert float(spearman(found)) == pytest.approx(spearmanr(*found.T).statistic, abs=1e-12)
    assert float(mean_squared_error(found)) == pytest.approx(reference_error(*found.T), abs=1e-12)


def test_resamples_are_ranked_apart() -> None:
    whole = columns(1, 30, 1)
    picks = np.random.default_rng(2).integers(30, size=(7, 30))
    resamples = whole[picks]
    for metric, reference in ((pearson, pearsonr), (spearman, spearmanr)):
        expected = [reference(*one.T).statistic for one in resamples]
        assert metric(resamples).tolist() == pytest.approx(expected, abs=1e-12)
    assert mean_squared_error(resamples).shape == (7,)


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=12))
def test_ranks_of_equal_values_are_their_mean(pairs: list[tuple[int, int]]) -> None:
    found = np.array(pairs, np.float64)
    ranks = np.stack([rankdata(found[:, 0]), rankdata(found[:, 1])], -1)
    assert float(spearman(found)) == pytest.approx(float(pearson(ranks)), abs=1e-12)


@pytest.mark.parametrize("value", [0.1, 0.0, 1e300, -7.3])
def test_a_constant_has_no_correlation(value: float) -> None:
    found = np.stack([np.full(7, value), np.arange(7.0)], -1)
    for metric in (pearson, spearman):
        assert float(metric(found)) == float(metric(found[:, ::-1])) == 0.0
        assert float(metric(found[:1])) == 0.0


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_numbers_of_any_size(scale: float) -> None:
    found = columns(3, 20, 12)
    assert float(pearson(found * scale)) == pytest.approx(float(pearson(found)), abs=1e-12)
    assert float(pearson(found * [scale, -1.0])) == pytest.approx(-float(pearson(found)), abs=1e-12)


def test_an_interval_is_that_of_the_bootstrap() -> None:
    """Of a correlation of normal variables, Fisher's z-interval, up to what chance makes of either."""
    found = columns(5, 400, 12)
    records = [{"label": float(label), "prediction": float(other)} for label, other in found]
    one = score(Metric(("label", "prediction"), pearson), records)
    low, high = pearsonr(*found.T).confidence_interval()
    assert (one.low, one.value, one.high) == pytest.approx((low, float(pearson(found)), high), abs=0.03)
    assert one.low < one.value < one.high
