"""A :class:`.summary.DataSummary` as a picture, and as a page for a browser."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .summary import LARGE, SMALL, DataSummary


def draw_summary(summary: DataSummary) -> bytes:
    """A picture of ``summary``, PNG."""
    figure = Figure((15, 8), layout="constrained")
    figure.suptitle(summary.heading(), parse_math=False, wrap=True)
    panels = figure.subplot_mosaic([["classes", "objects", "ratios"], ["classes", "sides", "iou"]])
    _classes(panels["classes"], *summary.top_classes(20))
    most = summary.image_objects.max(initial=0)
    step = most // 40 + 1
    bins = np.arange(0, most + step + 1, step) - 0.5
    _histogram(panels["objects"], summary.image_objects, bins, "objects per image")
    _octaves(panels["ratios"], summary.aspect_ratios, "height / width of boxes", [1])
    use = "training" if "training" in summary.areas else "original"
    sides, title = np.sqrt(summary.areas[use].clip(0)), f"√area of objects, {use}"
    _octaves(panels["sides"], sides, title, np.sqrt([SMALL, LARGE]))
    panels["sides"].set_xlabel("lines: 32 and 96 pixels")
    if summary.best_iou is None:
        panels["iou"].set_axis_off()
    else:
        title, text = summary.anchor_fit().split(": ")
        _histogram(panels["iou"], summary.best_iou, np.linspace(0, 1, 41), title, [0.5])
        panels["iou"].set_xlabel(text)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def html_page(summary: DataSummary, png: bytes) -> str:
    """The text of ``summary`` and its picture in a single file."""
    picture = base64.b64encode(png).decode("ascii")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f"<title>{html.escape(summary.json_file)}</title>\n<pre>{html.escape(summary.text())}</pre>\n"
        f'<img src="data:image/png;base64,{picture}" alt="the same as a picture" '
        'style="max-width: 100%">\n</html>\n'
    )


def _classes(axes: Axes, names: list[str], counts: list[int]) -> None:
    axes.bar_label(axes.barh(range(len(names)), counts), padding=3)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set(title="objects by class", ylim=(max(len(names), 6) - 0.4, -0.6))
    axes.margins(x=0.15)  # room for the numbers


def _octaves(axes: Axes, values: np.ndarray, title: str, lines: Sequence[float]) -> None:
    """A histogram over the logarithm of ``values``, in quarters of octaves."""
    octaves = np.log2(values[(values > 0) & (values < np.inf)])
    low, high = (octaves.min(), octaves.max()) if len(octaves) else (0, 0)
    bins = np.exp2(np.arange(np.floor(low), high + 0.5, 0.25))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    _histogram(axes, np.exp2(octaves), bins, title, lines)


def _histogram(
    axes: Axes, values: np.ndarray, bins: np.ndarray, title: str, lines: Sequence[float] = ()
) -> None:
    axes.hist(values, bins)
    axes.set_title(title)
    for x in lines:
        axes.axvline(x, color="orange")
