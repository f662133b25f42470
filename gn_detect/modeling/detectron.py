"""What Detectron (Caffe2) and maskrcnn-benchmark compute otherwise than Detectron2.

Their boxes end with their last pixel, so one of width x2 - x1 + 1 is Detectron2's (x1, y1, x2 + 1,
y2 + 1). With that, deltas, levels of the FPN and IoU are the same. Anchors and RoIAlign are not;
both are written here from facebookresearch/maskrcnn-benchmark,
maskrcnn_benchmark/modeling/rpn/anchor_generator.py and modeling/poolers.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.layers import ROIAlign, ShapeSpec
from detectron2.modeling.anchor_generator import (
    ANCHOR_GENERATOR_REGISTRY,
    BufferList,
    DefaultAnchorGenerator,
)
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, StandardROIHeads
from torch import nn

from gn_detect.config import ConfigError


@ANCHOR_GENERATOR_REGISTRY.register()
class DetectronAnchorGenerator(DefaultAnchorGenerator):
    """Anchors whose sides are whole multiples of size / stride: on stride 4, 48 x 24 in place of
    45.25 x 22.63. They are those of the first ratio, then those of the next. Their centre is the
    middle of a cell, ``MODEL.ANCHOR_GENERATOR.OFFSET`` 0.5."""

    def _calculate_anchors(self, sizes: list[list[float]], aspect_ratios: list[list[float]]):
        cells = []
        for stride, of_level, ratios in zip(self.strides, sizes, aspect_ratios, strict=True):
            widths = np.round(np.sqrt(stride**2 / np.array(ratios)))
            sides = np.stack([widths, np.round(widths * ratios)], 1)  # of an anchor of one cell
            halves = sides[:, None] * np.array(of_level)[:, None] / stride / 2
            cells.append(torch.from_numpy(np.concatenate([-halves, halves], 2)).reshape(-1, 4))
        return BufferList([cell.float() for cell in cells])


class _ROIAlign(ROIAlign):
    def forward(self, input: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) and (R, 5) to (R, C, *output_size): up to the last pixel, not its end."""
        return super().forward(input, rois - rois.new_tensor([0, 0, 0, 1, 1]))


class DetectronROIPooler(ROIPooler):
    """``ROIPooler`` with RoIAlign up to the last pixel of a box, one before its end; the level is
    that of the whole box.

    Args:
        output_size, scales, sampling_ratio, **kwargs: of ``ROIPooler``.
    """

    def __init__(
        self, output_size: int | tuple[int, int], scales: list[float], sampling_ratio: int, **kwargs
    ):
        super().__init__(output_size, scales, sampling_ratio, "ROIAlign", **kwargs)
        levels = (_ROIAlign(self.output_size, s, sampling_ratio, aligned=False) for s in scales)
        self.level_poolers = nn.ModuleList(levels)


@ROI_HEADS_REGISTRY.register()
class DetectronROIHeads(StandardROIHeads):
    """``StandardROIHeads`` with this pooler for all heads of a config.

    Raises:
        ConfigError: a ``POOLER_TYPE`` is not "ROIAlign".
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        arguments = super().from_config(cfg, input_shape)
        for name, pooler in arguments.items():
            if not isinstance(pooler, ROIPooler):
                continue
            levels = list(pooler.level_poolers)
            if any(not isinstance(level, ROIAlign) or level.aligned for level in levels):
                raise ConfigError(
                    "MODEL.ROI_HEADS.NAME is DetectronROIHeads, which pools with ROIAlign: set the "
                    "POOLER_TYPE of all RoI heads to it"
                )
            scales = [level.spatial_scale for level in levels]
            ratio = levels[0].sampling_ratio
            arguments[name] = DetectronROIPooler(pooler.output_size, scales, ratio)
        return arguments
