import itertools

import numpy as np
import pytest
from matplotlib.container import BarContainer

from sensmerge.pipeline.report.pictures import (
    coefficient_heatmap,
    confusion_heatmap,
    distance_heatmap,
    representation_scatter,
    score_bars,
    tuning_curves,
)
from sensmerge.pipeline.report.report import Report, VariantInfo
from sensmerge.tasks.kinds.scores import Score
from tests.pipeline.report.tunings import tuning


def tick_names(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def overlaps(figure, axis):
    """Pairs of tick labels of an axis that cover each other, compared as unrotated boxes."""
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in axis.get_ticklabels()]
    return [(a, b) for a, b in itertools.pairwise(boxes) if a.overlaps(b)]


def coefficients(layers, experts):
    values = np.random.default_rng(0).normal(0.4, 0.01, (layers, experts))
    weights = {f"model.layers.{i}": {f"e{j}": values[i, j] for j in range(experts)} for i in range(layers)}
    return weights, values


@pytest.mark.parametrize("layers", [3, 12, 40, 100])
def test_coefficient_heatmap_shows_every_weight_with_the_first_layer_on_top(layers):
    weights, values = coefficients(layers, 3)
    figure = coefficient_heatmap(weights, "sens: weights")
    axes, bar = figure.axes
    (image,) = axes.images
    np.testing.assert_array_equal(image.get_array(), values)
    assert image.origin == "upper"
    assert axes.yaxis_inverted()
    assert axes.get_title() == "sens: weights"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("expert", "layer")
    assert tick_names(axes.xaxis) == ["e0", "e1", "e2"]
    for row, name in zip(axes.get_yticks(), tick_names(axes.yaxis), strict=True):
        assert name == f"model.layers.{row}"
    assert len(axes.get_yticks()) >= min(layers, 25)
    assert not overlaps(figure, axes.yaxis)
    assert f"{values.mean():.4g}" in bar.get_ylabel()


def test_coefficient_heatmap_colours_diverge_around_the_mean():
    figure = coefficient_heatmap({"low": {"a": 0.1, "b": 0.4}, "high": {"a": 0.3, "b": 0.4}}, "t")
    norm = figure.axes[0].images[0].norm
    assert norm(0.3) == pytest.approx(0.5)
    assert norm(0.1) == pytest.approx(0.0)
    assert norm(0.4) == pytest.approx(0.75)


@pytest.mark.parametrize("weight", [0.4, 0.0, -2.0])
def test_coefficient_heatmap_of_equal_weights_is_all_neutral(weight):
    figure = coefficient_heatmap({layer: {"a": weight, "b": weight} for layer in ("x", "y", "z")}, "t")
    image = figure.axes[0].images[0]
    figure.draw_without_rendering()
    np.testing.assert_allclose(image.norm(image.get_array()), 0.5)


def test_numbers_are_written_into_the_cells_of_small_tables_only():
    small, _ = coefficients(4, 3)
    texts = {text.get_text() for text in coefficient_heatmap(small, "t").axes[0].texts}
    assert texts == {f"{value:#.4g}" for row in small.values() for value in row.values()}
    large, _ = coefficients(40, 3)
    assert not coefficient_heatmap(large, "t").axes[0].texts


def test_distance_heatmap_shows_g_and_leaves_the_diagonal_blank():
    distances = {"a": {"b": 1.5, "c": 2.0}, "b": {"a": 3.25, "c": 4.0}, "c": {"a": 5.0, "b": 6.0}}
    axes = distance_heatmap(distances).axes[0]
    shown = np.ma.filled(axes.images[0].get_array(), np.nan)
    np.testing.assert_array_equal(shown, [[np.nan, 1.5, 2], [3.25, np.nan, 4], [5, 6, np.nan]])
    assert tick_names(axes.xaxis) == tick_names(axes.yaxis) == ["a", "b", "c"]
    for text in axes.texts:
        column, row = text.get_position()
        assert text.get_text() == f"{shown[row, column]:#.4g}"
    assert len(axes.texts) == 6


@pytest.mark.parametrize(("experts", "numbers"), [(12, 12 * 11), (13, 0)])
def test_distances_are_written_for_up_to_twelve_experts(experts, numbers):
    names = [f"expert-{i}" for i in range(experts)]
    figure = distance_heatmap({i: {j: 1.0 for j in names if j != i} for i in names})
    assert len(figure.axes[0].texts) == numbers


def test_confusion_heatmap_shows_shares_of_the_row_and_counts():
    confusion = {"a": {"a": 9, "b": 1, "c": 0}, "b": {"a": 1, "b": 3, "c": 0}}
    figure = confusion_heatmap(confusion, "se: task identification")
    axes = figure.axes[0]
    (image,) = axes.images
    np.testing.assert_allclose(image.get_array(), [[0.9, 0.1, 0], [0.25, 0.75, 0]])
    assert image.get_clim() == (0, 1)
    assert axes.get_title() == "se: task identification"
    assert tick_names(axes.xaxis) == ["a", "b", "c"]
    assert tick_names(axes.yaxis) == ["a", "b"]
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts == {
        (0, 0): "0.90\n9",
        (1, 0): "0.10\n1",
        (2, 0): "0.00\n0",
        (0, 1): "0.25\n1",
        (1, 1): "0.75\n3",
        (2, 1): "0.00\n0",
    }
    figure.draw_without_rendering()


def test_confusion_of_a_task_without_samples_is_zero():
    image = confusion_heatmap({"a": {"a": 0, "b": 0}}, "t").axes[0].images[0]
    np.testing.assert_array_equal(image.get_array(), [[0, 0]])


def test_large_confusions_have_no_numbers():
    names = [f"expert-{i}" for i in range(13)]
    figure = confusion_heatmap({task: dict.fromkeys(names, 1) for task in names}, "t")
    assert not figure.axes[0].texts


@pytest.mark.parametrize("tasks", [1, 4, 20])
def test_representations_are_points_with_a_look_for_each_task(tasks):
    points = np.random.default_rng(0).normal(size=(tasks, 7, 2))
    projection = {f"task-{i}": [tuple(point) for point in rows] for i, rows in enumerate(points.tolist())}
    figure = representation_scatter(projection, "se: calibration samples")
    (axes,) = figure.axes
    assert axes.get_title() == "se: calibration samples"
    for rows, drawn in zip(points, axes.collections, strict=True):
        np.testing.assert_array_equal(drawn.get_offsets(), rows)
    looks = {(tuple(drawn.get_facecolor()[0]), drawn.get_paths()[0].vertices.tobytes()) for drawn in axes.collections}
    assert len(looks) == tasks
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(projection)
    figure.draw_without_rendering()
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())


def report(tasks, scores):
    roles = {name: "base" if name == "base" else "variant" if name == "ta" else "expert" for name in scores}
    return Report(
        recipe="r",
        stages=[],
        models={name: name for name in scores},
        uris={name: f"file:///{name}" for name in scores},
        roles=roles,
        digests={},
        tasks=tasks,
        scores=scores,
        mean_normalised={},
        variants={"ta": VariantInfo(method="linear", params={}, weights={}, digest="0")},
    )


def accuracy(value, low, high):
    return {"accuracy": Score(value=value, n=50, low=low, high=high), "macro_f1": Score(value=0, n=50, low=0, high=0)}


@pytest.fixture
def scored():
    return report(
        {"a": "accuracy", "b": "accuracy"},
        {
            "base": {"a": accuracy(0.25, 0.2, 0.35), "b": accuracy(0.3, 0.2, 0.4)},
            "a": {"a": accuracy(0.9, 0.8, 0.95)},
            "b": {"b": accuracy(0.8, 0.7, 0.85)},
            "ta": {"a": accuracy(0.7, 0.6, 0.8), "b": accuracy(0.6, 0.5, 0.7)},
        },
    )


def test_score_bars_have_a_group_per_task_and_a_bar_per_model(scored):
    figure = score_bars(scored)
    (axes,) = figure.axes
    assert tick_names(axes.xaxis) == ["a", "b"]
    assert axes.get_ylabel() == "accuracy"
    bars = [container for container in axes.containers if isinstance(container, BarContainer)]
    heights = {container.get_label(): [bar.get_height() for bar in container] for container in bars}
    assert list(heights) == ["base", "a", "b", "ta"]
    np.testing.assert_array_equal(heights["base"], [0.25, 0.3])
    np.testing.assert_array_equal(heights["a"], [0.9, np.nan])
    np.testing.assert_array_equal(heights["b"], [np.nan, 0.8])
    np.testing.assert_array_equal(heights["ta"], [0.7, 0.6])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["base", "a", "b", "ta"]
    figure.draw_without_rendering()
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())


def test_score_bars_draw_the_95_percent_interval(scored):
    (axes,) = score_bars(scored).axes
    (container,) = [c for c in axes.containers if c.get_label() == "base"]
    (lines,) = container.errorbar.lines[2]
    ends = [segment[:, 1] for segment in lines.get_segments()]
    np.testing.assert_allclose(ends, [[0.2, 0.35], [0.2, 0.4]])


def test_score_bars_accept_a_bootstrap_interval_beside_its_value():
    figure = score_bars(report({"a": "accuracy"}, {"base": {"a": accuracy(0.5, 0.51, 0.6)}}))
    (lines,) = figure.axes[0].containers[-1].errorbar.lines[2]
    np.testing.assert_allclose(lines.get_segments()[0][:, 1], [0.5, 0.6])


def test_metrics_of_different_kinds_do_not_share_an_axis():
    perplexity = {"perplexity": Score(value=40, n=9, low=30, high=50)}
    mixed = report(
        {"a": "accuracy", "b": "perplexity", "c": "accuracy"},
        {"base": {"a": accuracy(0.5, 0.4, 0.6), "b": perplexity, "c": accuracy(0.5, 0.4, 0.6)}},
    )
    left, right = score_bars(mixed).axes
    assert (left.get_ylabel(), tick_names(left.xaxis)) == ("accuracy", ["a", "c"])
    assert (right.get_ylabel(), tick_names(right.xaxis)) == ("perplexity", ["b"])


def test_curves_of_a_tuning_go_through_all_that_was_tried_with_the_chosen_settings():
    figure = tuning_curves(tuning(), "ta: what was tried")
    weight, density = figure.axes
    assert [axes.get_xlabel() for axes in figure.axes] == ["weight", "density"]
    lines = {line.get_label(): line for line in weight.lines}
    assert list(lines) == ["math", "code", "mean", "chosen"]
    np.testing.assert_allclose(lines["mean"].get_xydata(), [[0.3, 0.78], [0.5, 0.98], [1.0, 0.48]])
    np.testing.assert_allclose(lines["code"].get_xydata(), [[0.3, 0.3], [0.5, 0.5], [1.0, 1.0]])
    assert list(lines["chosen"].get_xdata()) == [0.5, 0.5]
    (band,) = weight.collections
    np.testing.assert_allclose(band.get_paths()[0].get_extents().intervaly, [0.38, 1.08])
    np.testing.assert_allclose({line.get_label(): line for line in density.lines}["mean"].get_xdata(), [0.2, 1.0])


def test_a_chosen_setting_that_is_no_number_is_not_marked():
    each = {"weight": 0.5, "density": {"math": 0.2, "code": 1.0}}
    tried = tuning().tried
    figure = tuning_curves(tuning(tried=[*tried, tried[0].model_copy(update={"values": each})], chosen=each), "t")
    assert [[line.get_label() for line in axes.lines][-1] for axes in figure.axes] == ["chosen", "mean"]
