"""Anchors that fit boxes: k-means over the logarithms of their sizes and shapes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def log_means(values: np.ndarray, num_clusters: int) -> np.ndarray:
    """k-means of the logarithms of ``values``, (N,), all positive; the clusters' geometric means,
    ascending, (``num_clusters``,) float64.

    In the logarithm twice as large is as far as half as large, as in IoU (k-means for anchors:
    Redmon and Farhadi, https://arxiv.org/abs/1612.08242, section 2). It starts from quantiles, so
    the same values give the same means.
    """
    logs = np.log(np.sort(values))
    means = np.quantile(logs, (np.arange(num_clusters) + 0.5) / num_clusters)
    for _ in range(100):
        nearest = np.searchsorted((means[1:] + means[:-1]) / 2, logs)
        count = np.bincount(nearest, minlength=num_clusters)
        total = np.bincount(nearest, weights=logs, minlength=num_clusters)
        before, means = means, np.where(count, total / np.maximum(count, 1), means)
        if np.array_equal(means, before):
            break
    return np.exp(means)


def fit_sizes(boxes: np.ndarray, strides: Sequence[int], per_level: int) -> list[list[int]]:
    """Sizes of anchors, square roots of their areas in pixels, for each level of a pyramid.

    Each is from 2 strides of its level, nearer than which two anchors of a box lie too far apart to
    cover it, to 16, the largest of Detectron2's defaults being 8.

    Args:
        boxes: height and width in pixels of the input, (N, 2).
        strides: of the levels, ascending, in pixels.
        per_level: how many sizes each level has.
    """
    sizes = log_means(np.sqrt(boxes.prod(axis=1)), len(strides) * per_level)
    low = np.asarray(strides)[:, None] * 2
    return np.clip(sizes.round().reshape(len(strides), -1), low, 8 * low).astype(int).tolist()


def fit_aspect_ratios(boxes: np.ndarray, count: int) -> list[float]:
    """``count`` ratios, height / width, of ``boxes`` (height and width, (N, 2))."""
    return np.round(log_means(boxes[:, 0] / boxes[:, 1], count), 2).tolist()


def best_iou(
    boxes: np.ndarray, sizes: Sequence[Sequence[float]], aspect_ratios: Sequence[float]
) -> np.ndarray:
    """The IoU of each box with the anchor whose shape is nearest, both at one centre, (N,)."""
    size = np.unique(np.concatenate(sizes))
    roots = np.sqrt(np.asarray(aspect_ratios, dtype=float))
    anchors = (size[:, None, None] * np.stack([roots, 1 / roots], axis=1)).reshape(-1, 2)
    best = np.zeros(len(boxes))
    for anchor in anchors:
        overlap = np.minimum(boxes, anchor).prod(axis=1)
        best = np.maximum(best, overlap / (boxes.prod(axis=1) + anchor.prod() - overlap))
    return best
