"""What Detectron (Caffe2) and maskrcnn-benchmark compute otherwise than Detectron2.

Their boxes end with their last pixel, so one of width x2 - x1 + 1 is Detectron2's (x1, y1, x2 + 1,
y2 + 1). With that, deltas, levels of the FPN, IoU and clipping are the same. Anchors and RoIAlign
are not; both are written here from facebookresearch/maskrcnn-benchmark,
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


@ROI_HEADS_REGISTRY.register()
class DetectronROIHeads(StandardROIHeads):
    """``StandardROIHeads`` whose RoIAlign ends at the last pixel of a box, one before its end.

    Raises:
        ConfigError: a ``POOLER_TYPE`` is not "ROIAlign".
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        arguments = super().from_config(cfg, input_shape)
        for pooler in (p for name, p in arguments.items() if name.endswith("_pooler") and p):
            if any(type(level) is not ROIAlign or level.aligned for level in pooler.level_poolers):
                raise ConfigError(
                    "MODEL.ROI_HEADS.NAME is DetectronROIHeads, which pools with ROIAlign: set the "
                    "POOLER_TYPE of all RoI heads to it"
                )
            pooler.level_poolers = nn.ModuleList(
                _ROIAlign(level.output_size, level.spatial_scale, level.sampling_ratio, False)
                for level in pooler.level_poolers
            )
        return arguments
