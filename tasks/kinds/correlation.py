"""Correlations of predictions with what is right, of all samples or of many resamples at once.

scipy's would be called for every resample, and its import takes longer than a refresh may.
"""

import numpy as np

from sensmerge.tasks.kinds.scores import Columns, Values


def pearson(columns: Columns) -> Values:
    """Pearson's correlation r = Σ(x − x̄)(y − ȳ) ÷ √(Σ(x − x̄)² Σ(y − ȳ)²) of two columns; 0 where one is constant."""
    # In units of the largest value, whose squares are finite whatever the model says.
    largest = np.abs(columns).max(axis=-2, keepdims=True)
    apart = np.divide(columns, largest, out=np.zeros_like(columns), where=largest > 0)
    apart = apart - apart.mean(axis=-2, keepdims=True)
    # The mean of equal numbers may differ from them by rounding, which is no variance.
    apart[np.broadcast_to((columns == columns[..., :1, :]).all(axis=-2, keepdims=True), apart.shape)] = 0.0
    x, y = np.moveaxis(apart, -1, 0)
    scale = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return np.divide((x * y).sum(-1), scale, out=np.zeros_like(scale), where=scale > 0)


def spearman(columns: Columns) -> Values:
    """Spearman's correlation of two columns: Pearson's of their ranks, of which equal values share the mean."""
    return pearson(np.stack([_ranks(columns[..., 0]), _ranks(columns[..., 1])], axis=-1))


def mean_squared_error(columns: Columns) -> Values:
    """Mean of the squared difference of two columns."""
    return ((columns[..., 0] - columns[..., 1]) ** 2).mean(-1)


def _ranks(values: Values) -> Values:
    """Return the rank of each value among those of its resample, counted from 1; values are (..., samples)."""
    several = values.reshape(-1, values.shape[-1])
    distinct, codes = np.unique(several, return_inverse=True)
    codes = codes.reshape(several.shape)
    places = codes + len(distinct) * np.arange(len(several))[:, None]
    counts = np.bincount(places.ravel(), minlength=len(distinct) * len(several)).reshape(len(several), -1)
    ranks = np.cumsum(counts, axis=1) - (counts - 1) / 2
    return np.take_along_axis(ranks, codes, axis=1).reshape(values.shape)
