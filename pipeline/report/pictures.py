"""Pictures of a report as matplotlib figures: coefficients, cross-task distances, scores, routes.

The figures own their state (no pyplot), so they can be made on any thread and without a display.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import NDArray

from sensmerge.pipeline.report.report import Report, TriedInfo, TuningInfo

Values = NDArray[np.float64]

LABELLED_ROWS = 40  # more layer names than this would overlap on a page
COLUMN = 0.7  # inches of a column of a heat map
ANNOTATED = 12  # numbers in the cells stay readable up to this many rows or columns
MARKERS = "o^sDvPX*"  # tasks differ in colour and marker: both repeat, but not in step


def coefficient_heatmap(weights: Mapping[str, Mapping[str, float]], title: str) -> Figure:
    """Heat map of `weights[layer][expert]`: a row per layer, the first on top, and a column per expert.

    Colours diverge around the mean of all weights, because coefficients usually differ from it by a few per cent only.
    """
    layers, experts = list(weights), list(next(iter(weights.values())))
    values = np.array([[weights[layer][expert] for expert in experts] for layer in layers], dtype=np.float64)
    mean = float(values.mean())
    # A uniform table has no spread: any half range does, and one in proportion keeps the ticks of the bar apart.
    spread = float(np.abs(values - mean).max())
    half_range = spread if spread > 1e-9 * abs(mean) else abs(mean) / 10 or 1.0

    width = 2.6 + max(len(experts) * COLUMN, 2.4)
    figure, axes = _figure(width, min(max(len(layers) * 0.3, 1.6) + 1.4, 9.0))
    image = axes.imshow(values, aspect="auto", cmap="RdBu_r", norm=CenteredNorm(mean, half_range))
    step = math.ceil(len(layers) / LABELLED_ROWS)
    axes.set_yticks(range(0, len(layers), step), layers[::step], fontsize=8)
    _label_columns(axes, experts, COLUMN)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, label=f"weight (mean {mean:.4g})").ax.ticklabel_format(useOffset=False, style="plain")
    if len(layers) <= ANNOTATED and len(experts) <= ANNOTATED:
        _annotate(axes, image, values)
    return figure


def distance_heatmap(distances: Mapping[str, Mapping[str, float]]) -> Figure:
    """Heat map of the logit distances `distances[i][j]` of expert i (row) to expert j on j's samples (column).

    A pair that is not given (an expert and itself) is left blank.
    """
    experts = list(distances)
    values = np.array([[distances[i].get(j, math.nan) for j in experts] for i in experts], dtype=np.float64)
    side = max(len(experts) * COLUMN, 2.6)
    figure, axes = _figure(side + 2.2, side + 1.2)
    image = axes.imshow(values, cmap="viridis")
    axes.set_yticks(range(len(experts)), experts, fontsize=8)
    _label_columns(axes, experts, COLUMN)
    axes.set_xlabel("from expert, on its samples")
    axes.set_ylabel("expert")
    axes.set_title("Distance between the experts' logits", fontsize=10)
    figure.colorbar(image, label="mean L2 distance per token", shrink=0.8)
    if len(experts) <= ANNOTATED:
        _annotate(axes, image, values)
    return figure


def confusion_heatmap(confusion: Mapping[str, Mapping[str, int]], title: str) -> Figure:
    """Heat map of `confusion[task][expert]`, how many samples of a task (row) were taken for an expert (column).

    Colours are shares of the row, from 0 to 1; the cells of small tables say share and count.
    """
    tasks, experts = list(confusion), list(next(iter(confusion.values())))
    counts = np.array([[confusion[task][expert] for expert in experts] for task in tasks])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axes = _figure(max(len(experts) * COLUMN, 2.6) + 2.2, max(len(tasks) * COLUMN, 1.6) + 1.2)
    image = axes.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=1)
    axes.set_yticks(range(len(tasks)), tasks, fontsize=8)
    _label_columns(axes, experts, COLUMN)
    axes.set_xlabel("taken for a sample of expert")
    axes.set_ylabel("samples of task")
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, label="share of the task's samples")
    if len(tasks) <= ANNOTATED and len(experts) <= ANNOTATED:
        _annotate(axes, image, shares, lambda row, column: f"{shares[row, column]:.2f}\n{counts[row, column]}")
    return figure


def representation_scatter(projection: Mapping[str, Sequence[tuple[float, float]]], title: str) -> Figure:
    """Points of `projection[task]`, its samples in two dimensions: a colour and a marker for each task."""
    figure, axes = _figure(6.4, 4.2)
    colours = colormaps["tab10"].colors  # type: ignore[attr-defined]
    for number, (task, points) in enumerate(projection.items()):
        first, second = np.array(points, dtype=np.float64).reshape(-1, 2).T
        style = {"color": colours[number % len(colours)], "marker": MARKERS[number % len(MARKERS)]}
        axes.scatter(first, second, s=18, alpha=0.7, linewidths=0, label=task, **style)
    axes.set_xlabel("first principal component")
    axes.set_ylabel("second principal component")
    axes.set_title(title, fontsize=10)
    figure.legend(loc="outside right upper", fontsize=8, ncols=math.ceil(len(projection) / 18))
    return figure


def tuning_curves(tuning: TuningInfo, title: str) -> Figure:
    """Curves of what was tried: score ÷ own expert's against each tuned setting, the others as chosen.

    A panel per setting, a line per task, and the mean over tasks with its 95 % interval; the chosen value is marked.
    """
    keys = list(tuning.chosen)
    figure = Figure(figsize=(min(4.2 * len(keys) + 2.2, 16.0), 4.2), dpi=150, layout="constrained")
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        line = _line(tuning, key)
        x = list(line)
        for number, task in enumerate(tuning.metrics):
            colour = colormaps["tab10"].colors[number % 10]  # type: ignore[attr-defined]
            style = {"color": colour, "marker": MARKERS[number % len(MARKERS)], "linewidth": 1, "markersize": 3.5}
            axes.plot(x, [one.tasks[task].value for one in line.values()], label=task, **style)
        low, mean, high = ([getattr(one.mean, end) for one in line.values()] for end in ("low", "value", "high"))
        axes.fill_between(x, low, high, color="black", alpha=0.12, linewidth=0)
        axes.plot(x, mean, color="black", linewidth=2, label="mean")
        chosen = tuning.chosen[key]
        if isinstance(chosen, int | float):
            axes.axvline(chosen, color="black", linestyle=":", linewidth=1, label="chosen")
        axes.set_xlabel(key)
        axes.set_ylabel("main metric ÷ own expert's")
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, ncols=math.ceil(len(labels) / 18))
    figure.suptitle(title, fontsize=10)
    return figure


def _line(tuning: TuningInfo, key: str) -> dict[float, TriedInfo]:
    """Return what was tried with the chosen settings but for one, by the values of that, ascending."""
    others = [(name, value) for name, value in tuning.chosen.items() if name != key]
    found = {}
    for one in tuning.tried:
        value = one.values[key]
        if isinstance(value, int | float) and all(one.values[name] == other for name, other in others):
            found[value] = one
    return dict(sorted(found.items()))


def score_bars(report: Report) -> Figure:
    """Bars of the main metric with 95 % intervals: a group per task, a bar per model; one panel per kind of metric.

    The base is grey, experts are blue, variants are orange; a model without a score on a task has no bar there.
    """
    models = [name for name in report.models if name in report.scores]
    colours = _colours(models, report)
    panels = {
        metric: [task for task in report.tasks if report.tasks[task] == metric]
        for metric in dict.fromkeys(report.tasks.values())
    }
    # A group is as wide as its bars, but never narrower than the name of its task.
    width = min(max(len(report.tasks) * max(len(models) * 0.2 + 0.3, 1.0), 4.0), 18.0)
    figure = Figure(figsize=(width + 2.6, 4.2), dpi=150, layout="constrained")
    ratios = [len(tasks) for tasks in panels.values()]
    all_axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=ratios)[0]
    bar = 0.8 / len(models)
    for axes, (metric, tasks) in zip(all_axes, panels.items(), strict=True):
        for index, model in enumerate(models):
            scores = [report.scores[model].get(task, {}).get(metric) for task in tasks]
            value, low, high = (
                np.array([getattr(score, end) if score else math.nan for score in scores])
                for end in ("value", "low", "high")
            )
            # A bootstrap interval need not contain the value itself, and matplotlib refuses negative error bars.
            errors = np.maximum([value - low, high - value], 0)
            centre = np.arange(len(tasks)) + (index - (len(models) - 1) / 2) * bar
            error_style = {"elinewidth": 0.8, "capsize": min(2.0, 24 / len(models))}
            axes.bar(centre, value, bar, yerr=errors, label=model, color=colours[model], error_kw=error_style)
        _label_columns(axes, tasks, width / len(report.tasks))
        axes.set_ylabel(metric)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    figure.suptitle(f"{report.recipe}: scores with 95 % intervals")
    handles, labels = all_axes[0].get_legend_handles_labels()
    columns = math.ceil(len(models) / 18)
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, ncols=columns)
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of one panel, sizes in inches."""
    figure = Figure(figsize=(min(width, 16.0), min(height, 14.0)), dpi=150, layout="constrained")
    return figure, figure.subplots()


def _label_columns(axes: Axes, names: Sequence[str], inches: float) -> None:
    """Name columns that are `inches` apart, slanted where the names would run into each other."""
    axes.set_xticks(range(len(names)), names, fontsize=8)
    if max(map(len, names)) * 0.075 > inches:  # width of a letter at this size
        for label in axes.get_xticklabels():
            label.set(rotation=35, ha="right", rotation_mode="anchor")


def _annotate(axes: Axes, image: AxesImage, values: Values, text: Callable[[int, int], str] | None = None) -> None:
    """Write each number, or a text of its own, in its cell: in black or white, whichever its colour lets be read."""
    for (row, column), value in np.ndenumerate(values):
        if not math.isnan(value):
            red, green, blue, _ = image.to_rgba(np.array([value]))[0]
            bright = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5  # luma of ITU-R BT.601
            colour = "black" if bright else "white"
            shown = f"{value:#.4g}" if text is None else text(row, column)
            axes.text(column, row, shown, ha="center", va="center", fontsize=8, color=colour)


def _colours(models: Sequence[str], report: Report) -> dict[str, tuple[float, float, float, float]]:
    """A colour for each model: the role gives the hue, the place among its peers the depth."""
    hues = {"base": "Greys", "expert": "Blues", "variant": "Oranges"}
    colours = {}
    for role, hue in hues.items():
        peers = [model for model in models if report.roles[model] == role]
        for depth, model in zip(np.linspace(0.4, 0.9, len(peers)), peers, strict=True):
            colours[model] = colormaps[hue](depth)
    return colours
