"""Keypoint head of Mask R-CNN with any norm."""

from __future__ import annotations

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec, interpolate
from detectron2.modeling.roi_heads import ROI_KEYPOINT_HEAD_REGISTRY
from detectron2.modeling.roi_heads.keypoint_head import KRCNNConvDeconvUpsampleHead

from .blocks import Block, in_memory_mode, run_layers
from .norm import GroupNormFactory, add_norms, finish_from_config, finish_norms, norm_from_config


@ROI_KEYPOINT_HEAD_REGISTRY.register()
class GNKRCNNConvDeconvUpsampleHead(Block, KRCNNConvDeconvUpsampleHead):
    """Detectron2's head with a norm after each 3x3 convolution.

    Keypoint heatmaps: (R, num_keypoints, 4H, 4W) from (R, C, H, W).

    Args:
        input_shape: channels of the pooled RoI features.
        num_keypoints: keypoints of an object.
        conv_dims: output channels of the convolutions.
        conv_norm: as ``get_norm`` takes it; by default none, as published.
        finish: ``weight_standardization``, ``memory`` and ``channels_last`` of ``finish_norms``.
        **kwargs: of ``BaseKeypointRCNNHead``.

    Raises:
        ConfigError: the groups do not divide a layer's channels.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_keypoints: int,
        conv_dims: list[int],
        conv_norm: GroupNormFactory | str = "",
        finish: dict[str, str | bool] | None = None,
        **kwargs,
    ):
        super().__init__(input_shape, num_keypoints=num_keypoints, conv_dims=conv_dims, **kwargs)
        add_norms(self, conv_norm)
        finish_norms(self, "roi_heads.keypoint_head", **finish or {})

    @in_memory_mode
    def layers(self, x: torch.Tensor) -> torch.Tensor:
        x = run_layers(self, x)
        x = interpolate(x, scale_factor=self.up_scale, mode="bilinear", align_corners=False)
        return x.contiguous()  # Detectron2 takes a view of the heatmaps that only NCHW has

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {
            **super().from_config(cfg, input_shape),
            "conv_norm": norm_from_config(cfg, "MODEL.ROI_KEYPOINT_HEAD.NORM"),
            "finish": finish_from_config(cfg, of_rois=True),
        }
