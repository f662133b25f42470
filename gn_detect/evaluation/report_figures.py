"""The figures of a report, as SVG that takes its colors and its font from the page around it."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .analysis import Analysis

NUM_COLORS = 8  # --c0, --c1, ... in the style of the page
_POINTS = 250  # of a curve: more would not be seen
# Stand for variables of the style, which Matplotlib does not know.
_TEXT, _GRID, _FAINT = "#fe01f0", "#fe01f1", "#fe01f2"
_COLORS = {f"#fe00f{i}": f"var(--c{i})" for i in range(NUM_COLORS)}
_VARIABLES = {_TEXT: "currentColor", _GRID: "var(--line)", _FAINT: "var(--faint)", **_COLORS}
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.edgecolor": _GRID,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": _TEXT,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "text.color": _TEXT,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _TEXT,
    "ytick.labelcolor": _TEXT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}
_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


class Drawing(NamedTuple):
    """A figure.

    Attributes:
        title, caption: above and below it; ``caption`` says how to read it.
        svg: with no text of the user's.
        legend: (color in CSS, name).
    """

    title: str
    svg: str
    legend: list[tuple[str, str]]
    caption: str


def _color(number: int) -> str:
    return list(_COLORS)[number % NUM_COLORS]


def _css(number: int) -> str:
    return _COLORS[_color(number)]


def _axes(xlabel: str, **limits) -> tuple[Figure, Axes]:
    """So large that its text is as large as the page's on a phone, and in a third of a screen."""
    figure = Figure((3.7, 2.5))
    axes = figure.add_axes((0.13, 0.175, 0.85, 0.795))
    axes.set(xlabel=xlabel, **limits)
    axes.locator_params(axis="x", nbins=6)
    return figure, axes


def _svg(figure: Figure) -> str:
    """Inline SVG: without what is of a file, and without names that two on a page may share."""
    figure.savefig(file := io.StringIO(), format="svg", metadata=_METADATA)
    root = r'.*?<svg [^>]*?(viewBox="[^"]*")[^>]*>'
    svg = re.sub(root, r'<svg \1 aria-hidden="true">', file.getvalue(), count=1, flags=re.S)
    svg = re.sub(r' id="[a-z][\w.]*_\d+"', "", svg).replace("xlink:href", "href")
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    return re.sub(r"\n\s*", "\n", svg).strip()


def _found(precision: np.ndarray) -> np.ndarray:
    """Without the recall that is never reached, where COCO has a precision of 0."""
    return np.where(precision > 0, precision, np.nan)


def _thin(iterations: Sequence[int], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Medians of as many parts as are seen; NaN where a part is nothing else."""
    number = min(len(values), _POINTS)
    middles = [
        np.median(finite) if len(finite := part[np.isfinite(part)]) else np.nan
        for part in np.array_split(np.asarray(values, dtype=float), number)
    ]
    return np.array([part.mean() for part in np.array_split(iterations, number)]), np.array(middles)


@matplotlib.rc_context(_STYLE)
def training_figures(
    curves: dict[str, tuple[list[int], list[float]]],
    evaluations: list[tuple[int, dict[str, float]]],
    names: dict[str, str],
) -> list[Drawing]:
    """Loss, evaluations and learning rate.

    Args:
        curves, evaluations: of a :class:`.run_facts.RunFacts`.
        names: metric -> what it is called.
    """
    drawings = []
    losses = [key for key in curves if key == "total_loss" or key.startswith("loss_")]
    losses.sort(key=lambda key: key != "total_loss")
    if losses:
        figure, axes = _axes("iteration", yscale="log")
        for i, key in enumerate(losses):
            axes.plot(*_thin(*curves[key]), color=_color(i), linewidth=2.2 if i == 0 else 1.1)
        low, high = axes.get_ylim()
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}" if high < 8 * low else "")
        legend = [(_css(i), key.removeprefix("loss_")) for i, key in enumerate(losses)]
        drawings.append(
            Drawing(
                *("Loss", _svg(figure), legend),
                "total_loss is the sum of its terms, on a logarithmic axis. Still falling at the "
                "end: longer training may help.",
            )
        )
    if names:
        figure, axes = _axes("iteration", ylim=(0, 100))
        for i, key in enumerate(names):
            points = [(done, values[key]) for done, values in evaluations if key in values]
            axes.plot(*zip(*points, strict=True), color=_color(i), marker="o", markersize=4)
        legend = [(_css(i), name) for i, name in enumerate(names.values())]
        drawings.append(
            Drawing(
                *("Evaluations", _svg(figure), legend),
                "Percent, higher is better. Flat, or falling while the loss falls: more training "
                "does not help, more data may.",
            )
        )
    if "lr" in curves:
        figure, axes = _axes("iteration")
        axes.plot(*_thin(*curves["lr"]), color=_color(0))
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
        caption = "The rate of the optimizer: warm-up, then the schedule."
        drawings.append(Drawing("Learning rate", _svg(figure), [], caption))
    return drawings


@matplotlib.rc_context(_STYLE)
def analysis_figures(analysis: Analysis) -> list[Drawing]:
    """Precision over recall, AP over IoU, and the calibration of the scores."""
    recall, drawings = np.linspace(0, 1, 101), []
    figure, axes = _axes("recall", xlim=(0, 1), ylim=(0, 1.02), ylabel="")
    shown = [name for name, curve in analysis.curves.items() if np.isfinite(curve[0]).any()]
    few = 1 < len(shown) < NUM_COLORS
    for i, name in enumerate(shown if len(shown) > 1 else (), 1):
        style = {"color": _color(i), "linewidth": 1.1} if few else {"color": _FAINT, "linewidth": 1}
        axes.plot(recall, _found(analysis.curves[name][0]), **style)
    for curve, style in zip(analysis.curve, ("-", "--"), strict=True):
        axes.plot(recall, _found(curve), color=_color(0), linewidth=2.2, linestyle=style)
    legend = [(_css(0), "mean" if len(shown) > 1 else (shown or ["precision"])[0])]
    legend += [(_css(i), name) for i, name in enumerate(shown, 1)] if few else []
    legend += (
        [("var(--faint)", f"each of {len(shown)} classes")] if len(shown) >= NUM_COLORS else []
    )
    drawings.append(
        Drawing(
            *("Precision over recall", _svg(figure), legend),
            "At IoU 0.5, dashed at 0.75: what part of the detections is right (up) if the score "
            "threshold is lowered until this part of the objects is found (right). A line that "
            "ends early: the others are never found.",
        )
    )
    figure, axes = _axes("IoU threshold", ylim=(0, 100))
    for i, values in enumerate((analysis.by_iou, analysis.recall_by_iou)):
        axes.plot(list(values), list(values.values()), color=_color(i), marker="o", markersize=4)
    drawings.append(
        Drawing(
            *("AP and recall by IoU", _svg(figure), [(_css(0), "AP"), (_css(1), "recall")]),
            "Percent. A steep fall to the right: objects are found, but their outlines are not "
            "exact.",
        )
    )
    figure, axes = _axes("score", xlim=(0, 1), ylim=(0, 1.02))
    filled = [b for b in analysis.calibration if b.count]
    width = [b.high - b.low for b in filled]
    low, precision = [b.low for b in filled], [b.precision for b in filled]
    axes.bar(low, precision, width, align="edge", color=_color(0), edgecolor="none", alpha=0.75)
    axes.plot([0, 1], [0, 1], color=_TEXT, linewidth=1, linestyle=(0, (4, 3)))
    error = analysis.calibration_error
    told = "" if error != error else f" Expected calibration error: {error:.3f}."
    drawings.append(
        Drawing(
            *("Calibration of scores", _svg(figure), [(_css(0), "part that is right")]),
            "Of the detections with a score like this, the part that is right at IoU 0.5. Bars "
            f"below the dashed line: scores promise too much; above: too little.{told}",
        )
    )
    return drawings
