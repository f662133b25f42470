"""Box head of Faster R-CNN with Group Normalization."""

from __future__ import annotations

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_BOX_HEAD_REGISTRY, FastRCNNConvFCHead

from .norm import GroupNormFactory


@ROI_BOX_HEAD_REGISTRY.register()
class GNFastRCNNConvFCHead(FastRCNNConvFCHead):
    """Convolutions with GN and ReLU, then fully connected layers with ReLU, on each RoI.

    With four convolutions of 256 channels and one layer of 1024 it is the ``4conv1fc`` head of the
    GN paper (table 5; Detectron ``add_roi_Xconv1fc_gn_head``). The fully connected layers have no
    norm there, nor here. Output: (R, fc_dims[-1]) from (R, C, H, W).

    Args:
        input_shape: channels, height and width of the pooled RoI features.
        conv_dims: output channels of the 3x3 convolutions.
        fc_dims: output sizes of the fully connected layers.
        conv_norm: ``channels -> nn.Module``; by default 32 groups, eps 1e-5.

    Raises:
        ConfigError: the groups do not divide a layer's channels.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        conv_dims: list[int],
        fc_dims: list[int],
        conv_norm: GroupNormFactory | None = None,
    ):
        conv_norm = conv_norm or GroupNormFactory()
        super().__init__(input_shape, conv_dims=conv_dims, fc_dims=fc_dims, conv_norm=conv_norm)
        GroupNormFactory.check(self, "roi_heads.box_head")

    @classmethod
    def from_config(cls, cfg, input_shape):
        args = super().from_config(cfg, input_shape)
        args["conv_norm"] = GroupNormFactory.from_config(cfg, "MODEL.ROI_BOX_HEAD.NORM")
        return args
