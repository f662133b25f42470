"""FPN and heads as tensorpack computes them (github.com/tensorpack/tensorpack, examples/FasterRCNN,
modeling/model_{fpn,frcnn,mrcnn}.py), for its weights (``checkpoint.convert.tensorpack``).

Where a norm follows, its convolutions have biases all the same, and those of the heads are followed
by ReLU and then the norm, with no other ReLU behind it.
"""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN
from detectron2.modeling.roi_heads import ROI_BOX_HEAD_REGISTRY, ROI_MASK_HEAD_REGISTRY
from torch import nn

from .blocks import GNConv2d, like
from .box_head import GNFastRCNNConvFCHead
from .fpn import build_gn_resnet_fpn_backbone
from .mask_head import GNMaskRCNNConvUpsampleHead


@BACKBONE_REGISTRY.register()
def build_tensorpack_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """``build_gn_resnet_fpn_backbone`` with biases in the FPN.

    Raises:
        ConfigError: of ``build_gn_resnet_fpn_backbone``.
    """
    backbone = build_gn_resnet_fpn_backbone(cfg, input_shape)
    for conv in (*backbone.lateral_convs, *backbone.output_convs):
        _add_bias(conv)
    return backbone


@ROI_BOX_HEAD_REGISTRY.register()
class TensorpackFastRCNNConvFCHead(GNFastRCNNConvFCHead):
    """``fastrcnn_4conv1fc_gn_head``, with the arguments of :class:`GNFastRCNNConvFCHead`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _activate_first(self)


@ROI_MASK_HEAD_REGISTRY.register()
class TensorpackMaskRCNNConvUpsampleHead(GNMaskRCNNConvUpsampleHead):
    """``maskrcnn_up4conv_gn_head``, with the arguments of :class:`GNMaskRCNNConvUpsampleHead`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _activate_first(self)


def _add_bias(conv: Conv2d) -> None:
    if conv.bias is None:
        conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels))


def _activate_first(head: nn.Sequential) -> None:
    for name, conv in list(head.named_children()):
        if getattr(conv, "norm", None) is not None:
            conv = like(conv, GNConv2d)
            conv.activation_first = True
            _add_bias(conv)
            setattr(head, name, conv)
