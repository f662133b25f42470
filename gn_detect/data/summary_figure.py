"""A :class:`.summary.DataSummary` as a picture, and as a page for a browser."""

from __future__ import annotations

import base64
import html
import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from .summary import MANY, SIZES, DataSummary, short

COLORS = ("#4878a8", "#8fb8de", "#e8a33d")  # of small, medium, large
_BINS = 40


def draw_summary(summary: DataSummary) -> bytes:
    """A picture of ``summary``, PNG."""
    figure = Figure((17, 8.5), layout="constrained")
    figure.suptitle(str(summary).split("\n\n")[0], parse_math=False)
    panels = figure.subplot_mosaic(
        [["classes", "images", "objects", "ratios"], ["classes", "sizes", "sides", "anchors"]],
        width_ratios=(1.1, 1, 1, 1),
    )
    _classes(panels["classes"], summary)
    _images(panels["images"], summary)
    _histogram(panels["objects"], summary.image_objects, "objects per image", "images")
    _histogram(panels["ratios"], summary.aspect_ratios, "height / width of boxes", "boxes", True)
    _sizes(panels["sizes"], summary)
    _sides(panels["sides"], summary)
    _anchors(panels["anchors"], summary)
    png = io.BytesIO()
    figure.savefig(png, dpi=100, format="png")
    return png.getvalue()


def html_page(summary: DataSummary, png: bytes) -> str:
    """The text of ``summary`` and its picture in a single file."""
    title = html.escape(summary.json_file)
    picture = base64.b64encode(png).decode("ascii")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<pre>{html.escape(str(summary))}</pre>\n"
        f'<img src="data:image/png;base64,{picture}" alt="the same as a picture" '
        'style="max-width: 100%">\n</html>\n'
    )


def _classes(axes: Axes, summary: DataSummary) -> None:
    names = [short(name, 20) for name in summary.classes[:MANY]]
    counts = list(summary.class_objects[:MANY])
    if others := len(summary.classes) - len(names):
        names.append(f"{others:,} other{'s' * (others > 1)}")
        counts.append(summary.class_objects[MANY:].sum())
    bars = axes.barh(range(len(names)), counts, color=COLORS[0])
    axes.bar_label(bars, [f"{count:,}" for count in counts], padding=3, fontsize="small")
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_ylim(max(len(names), 6) - 0.4, -0.6)
    axes.set_xlim(0, 1.25 * max(1, *counts))  # room for the numbers
    axes.set_title("objects by class")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    _thousands(axes.xaxis)


def _images(axes: Axes, summary: DataSummary) -> None:
    sizes, counts = np.unique(summary.image_sizes, axis=0, return_counts=True)
    area = 5 + 300 * counts / counts.max()
    axes.scatter(sizes[:, 1], sizes[:, 0], area, color=COLORS[0], alpha=0.4, linewidth=0)
    limit = 1.1 * sizes.max()
    axes.set(title="sizes of images", xlabel="width, pixels", ylabel="height, pixels")
    axes.set(xlim=(0, limit), ylim=(0, limit))


def _sizes(axes: Axes, summary: DataSummary) -> None:
    axes.set_title("areas of objects")
    left = np.zeros(len(summary.areas))
    shares = 100 * np.stack([summary.size_shares(use) for use in summary.areas])
    for size, share, color in zip(SIZES, shares.T, COLORS, strict=True):
        bars = axes.barh(list(summary.areas), share, 0.6, left, color=color, label=size)
        axes.bar_label(bars, [f"{s:.0f} %" if s >= 8 else "" for s in share], label_type="center")
        left += share
    axes.set(xlabel="share, %; small < 32², large > 96² pixels", xlim=(0, 100))
    axes.set_ylim(len(summary.areas) - 0.5, -1.2)  # room for the legend
    axes.legend(loc="upper center", ncols=3, frameon=False)


def _sides(axes: Axes, summary: DataSummary) -> None:
    use = "training" if "training" in summary.areas else "original"
    sides = np.sqrt(summary.areas[use])
    text = "√area of objects" + (", resized for training" if use == "training" else "")
    _histogram(axes, sides[sides > 0], text, "objects", True)
    axes.set_xlabel("pixels" + ("; lines: sizes of the anchors" if summary.anchor_sizes else ""))
    for size in summary.anchor_sizes:
        axes.axvline(size, color=COLORS[2], linewidth=1)


def _anchors(axes: Axes, summary: DataSummary) -> None:
    if summary.best_iou is None:
        axes.set_axis_off()
        return
    bins = np.linspace(0, 1, _BINS + 1)
    axes.hist(summary.best_iou, bins, color=COLORS[0])
    axes.axvline(0.5, color=COLORS[2], linewidth=1)
    poor = 100 * (summary.best_iou < 0.5).mean()
    xlabel = f"IoU: mean {summary.best_iou.mean():.2f}, {poor:.0f} % of the boxes below 0.5"
    title = "best IoU of a box with an anchor"
    axes.set(title=title, xlabel=xlabel, ylabel="boxes", xlim=(0, 1))
    _thousands(axes.yaxis)


def _histogram(axes: Axes, values: np.ndarray, text: str, ylabel: str, log: bool = False) -> None:
    axes.set(title=text, ylabel=ylabel)
    if not len(values):
        return
    low, high = values.min(), values.max()
    if log:
        low, high = min(low, 0.9 * high), max(high, 1.1 * low)
        axes.hist(values, np.geomspace(low, high, _BINS + 1), color=COLORS[0])
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    else:
        step = max(1, -(-(high - low + 1) // _BINS))  # whole numbers: bins of as many each
        axes.hist(values, np.arange(low, high + step + 1, step) - 0.5, color=COLORS[0])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _thousands(axes.yaxis)


def _thousands(axis) -> None:
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x == int(x) else ""))
