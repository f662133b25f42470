"""How large images and their objects are where the model sees them."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
from detectron2.data import transforms as T


@dataclass(frozen=True)
class Resizing:
    """Detectron2's resizing of an image, at one of the sizes that it draws: the mean of them; of
    large-scale jitter, the square itself.

    Args:
        augmentation: of Detectron2.
        note: what else changes the size, to follow the text.
    """

    augmentation: T.ResizeShortestEdge | T.ResizeScale
    note: str = ""

    def __str__(self) -> str:
        if isinstance(self.augmentation, T.ResizeScale):
            low, high = self.augmentation.min_scale, self.augmentation.max_scale
            size = f"{self.augmentation.target_width} x {self.augmentation.target_height} pixels"
            return f"fit into {size}, at scale 1 of {low:g} to {high:g}{self.note}"
        edge, edges = self._edge, sorted(set(self.augmentation.short_edge_length))
        if not edge:
            return f"not resized{self.note}"
        text = f"shorter side {edge} pixels"
        if len(edges) > 1:
            text += f" (the mean of {edges[0]} to {edges[-1]})"
        if self.augmentation.max_size < sys.maxsize:
            text += f", longer side at most {self.augmentation.max_size}"
        return text + self.note

    def __call__(self, sizes: np.ndarray) -> np.ndarray:
        """Height and width of images, (I, 2) int64 in pixels, after the resizing."""
        if isinstance(self.augmentation, T.ResizeScale):  # as its _get_resize
            scale = (self._square / sizes).min(axis=1, keepdims=True)
            return np.round(sizes * scale).astype(np.int64)
        edge, max_size = self._edge, self.augmentation.max_size
        if not edge:
            return sizes
        shape = T.ResizeShortestEdge.get_output_shape
        return np.array([shape(*size, edge, max_size) for size in sizes.tolist()], np.int64)

    def padded(self, sizes: np.ndarray) -> np.ndarray:
        """Of images of ``sizes``, resized, after what the augmentations pad, (I, 2) int64."""
        jitter = isinstance(self.augmentation, T.ResizeScale)
        return np.maximum(sizes, self._square) if jitter else sizes

    @property
    def _edge(self) -> int:
        return round(np.mean(self.augmentation.short_edge_length))

    @property
    def _square(self) -> np.ndarray:
        return np.array([self.augmentation.target_height, self.augmentation.target_width])
