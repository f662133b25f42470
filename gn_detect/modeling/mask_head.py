"""Mask head of Mask R-CNN with Group Normalization."""

from __future__ import annotations

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_MASK_HEAD_REGISTRY, MaskRCNNConvUpsampleHead

from .norm import GroupNormFactory


@ROI_MASK_HEAD_REGISTRY.register()
class GNMaskRCNNConvUpsampleHead(MaskRCNNConvUpsampleHead):
    """Convolutions with GN and ReLU, then a deconvolution and the predictor, on each RoI.

    With four convolutions of 256 channels it is the mask head of the GN paper (Detectron
    ``mask_rcnn_fcn_head_v1up4convs_gn``). The deconvolution has no norm there, nor here. Mask
    logits: (R, num_classes, 2H, 2W) from (R, C, H, W).

    Args:
        input_shape: channels of the pooled RoI features.
        num_classes: foreground classes, or 1 for class-agnostic masks.
        conv_dims: output channels of the 3x3 convolutions and, last, of the deconvolution.
        conv_norm: ``channels -> nn.Module``; by default 32 groups, eps 1e-5.
        **kwargs: of ``BaseMaskRCNNHead`` (``loss_weight``, ``vis_period``).

    Raises:
        ConfigError: the groups do not divide a layer's channels.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_classes: int,
        conv_dims: list[int],
        conv_norm: GroupNormFactory | None = None,
        **kwargs,
    ):
        super().__init__(
            input_shape,
            num_classes=num_classes,
            conv_dims=conv_dims,
            conv_norm=conv_norm or GroupNormFactory(),
            **kwargs,
        )
        GroupNormFactory.check(self, "roi_heads.mask_head")

    @classmethod
    def from_config(cls, cfg, input_shape):
        args = super().from_config(cfg, input_shape)
        args["conv_norm"] = GroupNormFactory.from_config(cfg, "MODEL.ROI_MASK_HEAD.NORM")
        return args
