"""Mask head of Mask R-CNN with any norm."""

from __future__ import annotations

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling.roi_heads import ROI_MASK_HEAD_REGISTRY, MaskRCNNConvUpsampleHead
from detectron2.structures import Instances

from .blocks import Block, in_memory_mode, run_layers
from .norm import GroupNormFactory, finish_from_config, finish_norms, insert_after, norm_from_config
from .normalizer import running_mean


@ROI_MASK_HEAD_REGISTRY.register()
class GNMaskRCNNConvUpsampleHead(Block, MaskRCNNConvUpsampleHead):
    """Convolutions with norm and ReLU, then a deconvolution and the predictor, on each RoI.

    With four convolutions of 256 channels it is the mask head of the GN paper (Detectron
    ``mask_rcnn_fcn_head_v1up4convs_gn``). The deconvolution has no norm there; ``deconv_norm``
    gives it one. Mask logits: (R, num_classes, 2H, 2W) from (R, C, H, W).

    Args:
        input_shape: channels of the pooled RoI features.
        num_classes: foreground classes, or 1 for class-agnostic masks.
        conv_dims: output channels of the 3x3 convolutions and, last, of the deconvolution.
        conv_norm: as ``get_norm`` takes it; by default GN with 32 groups, eps 1e-5.
        deconv_norm: as ``get_norm`` takes it; by default none.
        finish: ``weight_standardization``, ``memory`` and ``channels_last`` of ``finish_norms``.
        loss_normalizer: "batch": the loss is a mean over the masks of a pass; "running": their sum
            is divided by the images, and by a running mean of the masks per image
            (``normalizer.RunningMean``).
        masks_per_image: that mean at the start.
        **kwargs: of ``BaseMaskRCNNHead`` (``loss_weight``, ``vis_period``).

    Raises:
        ConfigError: the groups do not divide a layer's channels, or ``loss_normalizer`` is unknown.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_classes: int,
        conv_dims: list[int],
        conv_norm: GroupNormFactory | str | None = None,
        deconv_norm: GroupNormFactory | str = "",
        finish: dict[str, str | bool] | None = None,
        loss_normalizer: str = "batch",
        masks_per_image: float = 128,
        **kwargs,
    ):
        super().__init__(
            input_shape,
            num_classes=num_classes,
            conv_dims=conv_dims,
            conv_norm=GroupNormFactory() if conv_norm is None else conv_norm,
            **kwargs,
        )
        if deconv_norm:
            self.deconv.bias = None
            norm = get_norm(deconv_norm, self.deconv.out_channels)
            insert_after(self, "deconv", "deconv_norm", norm)
        finish_norms(self, "roi_heads.mask_head", **finish or {})
        key = "MODEL.ROI_MASK_HEAD.LOSS_NORMALIZER"
        self.normalizer = running_mean(loss_normalizer, key, masks_per_image)

    layers = in_memory_mode(run_layers)

    def forward(self, x: torch.Tensor, instances: list[Instances]):
        found = super().forward(x, instances)
        if self.training and self.normalizer:
            found["loss_mask"] *= len(x) / self.normalizer(len(x), len(instances))
        return found

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {
            **super().from_config(cfg, input_shape),
            "conv_norm": norm_from_config(cfg, "MODEL.ROI_MASK_HEAD.NORM"),
            "deconv_norm": norm_from_config(cfg, "MODEL.ROI_MASK_HEAD.DECONV_NORM"),
            "loss_normalizer": cfg.MODEL.ROI_MASK_HEAD.LOSS_NORMALIZER,
            # The most that are sampled
            "masks_per_image": cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE
            * cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION,
            "finish": finish_from_config(cfg, of_rois=True),
        }
