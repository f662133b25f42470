"""How well anchors cover boxes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator


@dataclass(frozen=True)
class AnchorGrid:
    """The anchors of a model, at all positions of its feature maps.

    Args:
        generator: of Detectron2; it knows sizes, ratios, strides and offset of the levels.
        size_divisibility: of the backbone: images are padded to a multiple of it.
    """

    generator: DefaultAnchorGenerator
    size_divisibility: int = 0

    @property
    def sizes(self) -> list[float]:
        """The different square roots of the areas of the anchors, in pixels."""
        sides = (a[:, 2:] - a[:, :2] for a in self.generator.cell_anchors)
        return sorted({round(s, 1) for side in sides for s in side.prod(dim=1).sqrt().tolist()})

    def best_iou(self, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """The IoU of each box with the anchor that covers it best, (N,) float64.

        Anchors of one shape overlap a box the more, the nearer they are, in x and in y apart: of
        all positions of a feature map, only the nearest need be looked at.

        Args:
            boxes: x1, y1, x2, y2 in pixels of the model's input, (N, 4).
            sizes: height and width of the input of each box, in pixels, (N, 2).
        """
        divisor = max(self.size_divisibility, 1)
        input_size = np.ceil(sizes[:, ::-1].T / divisor) * divisor  # x, y in rows, from here on
        low, high = boxes.T[:2].astype(np.float64), boxes.T[2:].astype(np.float64)
        centre, side = (low + high) / 2, high - low
        area, best = side.prod(axis=0), np.zeros(len(boxes))
        offset = self.generator.offset
        levels = zip(self.generator.strides, self.generator.cell_anchors, strict=True)
        for stride, anchors in levels:
            last = np.ceil(input_size / stride) - 1  # position in the feature map
            nearest = np.clip(np.round(centre / stride - offset), 0, last)
            distance = np.abs(centre - (nearest + offset) * stride)
            for anchor in (anchors[:, 2:] - anchors[:, :2]).double().numpy():
                anchor = anchor[:, None]
                overlap = np.minimum(side, anchor)
                np.minimum(overlap, (side + anchor) / 2 - distance, out=overlap)
                inner = overlap.clip(0).prod(axis=0)
                np.maximum(best, inner / (area + anchor.prod() - inner), out=best)
        return best
