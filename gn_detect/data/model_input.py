"""What a model sees of images and boxes: their sizes after the resizing, and its anchors."""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass, field

import numpy as np
from detectron2.data import transforms as T
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator


class Resizing:
    """Detectron2's resizing, at one of the sizes that it draws: the mean of the shorter sides; of
    large-scale jitter scale 1, which is padded to ``full``.

    Args:
        share: of the sides of an image, what a crop before has of them.

    Attributes:
        full: height and width of images that are padded, else 0.
        text: the same in words.
    """

    def __init__(self, augmentation: T.ResizeShortestEdge | T.ResizeScale, share: float = 1.0):
        self.full = (0, 0)
        if isinstance(augmentation, T.ResizeScale):
            self.full = (augmentation.target_height, augmentation.target_width)
            scales = f"{augmentation.min_scale:g} to {augmentation.max_scale:g}"
            self.text = f"within {self.full[1]} x {self.full[0]}, at scale 1 of {scales}"
            return
        edges = augmentation.short_edge_length
        self.edge = round(statistics.fmean(edges) / share)
        self.longest = augmentation.max_size / share
        self.text = f"shorter side {self.edge}" if self.edge else "not resized"
        if len(set(edges)) > 1:
            self.text += f" (mean of {min(edges) / share:.0f} to {max(edges) / share:.0f})"
        if self.edge and self.longest < sys.maxsize:
            self.text += f", longer at most {self.longest:.0f}"

    def __call__(self, sizes: np.ndarray) -> np.ndarray:
        """Height and width of images, (I, 2) int64 in pixels, after the resizing."""
        if any(self.full):  # as ResizeScale does
            scale = (self.full / sizes).min(axis=1, keepdims=True)
            return np.round(sizes * scale).astype(np.int64)
        if not self.edge:
            return sizes
        shape = T.ResizeShortestEdge.get_output_shape
        return np.array([shape(*size, self.edge, self.longest) for size in sizes.tolist()])


@dataclass(frozen=True)
class ModelInput:
    """
    Attributes:
        resizing: "training", "evaluation" -> that of the images, where it is known.
        anchors: None where the model has none, or others than horizontal boxes.
        size_divisibility: images are padded to a multiple of it.
    """

    resizing: dict[str, Resizing] = field(default_factory=dict)
    anchors: DefaultAnchorGenerator | None = None
    size_divisibility: int = 0

    def best_iou(self, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """The IoU of each box with the anchor that covers it best, (N,) float64.

        Anchors of one shape overlap a box the more, the nearer they are, in x and in y apart: of
        all positions of a feature map, only the nearest need be looked at.

        Args:
            boxes: x1, y1, x2, y2 in pixels of the resized images, (N, 4).
            sizes: height and width of the image of each box, resized, in pixels, (N, 2).
        """
        divisor = max(self.size_divisibility, 1)
        sizes = np.ceil(sizes[:, ::-1].T / divisor) * divisor  # x, y in rows, from here on
        low, high = boxes.T[:2], boxes.T[2:]
        centre, side = (low + high) / 2, high - low
        area, best, offset = side.prod(axis=0), np.zeros(len(boxes)), self.anchors.offset
        for stride, anchors in zip(self.anchors.strides, self.anchors.cell_anchors, strict=True):
            last = np.ceil(sizes / stride) - 1  # position in the feature map
            nearest = np.clip(np.round(centre / stride - offset), 0, last)
            distance = np.abs(centre - (nearest + offset) * stride)
            for anchor in (anchors[:, 2:] - anchors[:, :2]).double().numpy()[..., None]:
                overlap = np.minimum(side, anchor)
                overlap = np.minimum(overlap, (side + anchor) / 2 - distance).clip(0).prod(axis=0)
                best = np.maximum(best, overlap / (area + anchor.prod() - overlap))
        return best
