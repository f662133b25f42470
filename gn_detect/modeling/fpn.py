"""Feature Pyramid Network (Lin et al., CVPR 2017) with Group Normalization."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone

from .norm import GroupNormFactory, with_gn_norms


@BACKBONE_REGISTRY.register()
def build_gn_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Detectron2's ``build_resnet_fpn_backbone`` with our GN in the ResNet and after every
    lateral and output convolution of the FPN (Detectron ``projects/GN``).

    Raises:
        ConfigError: ``MODEL.RESNETS.NORM`` or ``MODEL.FPN.NORM`` is not GN, or the groups do not
            divide a layer's channels.
    """
    cfg = with_gn_norms(cfg, "MODEL.RESNETS.NORM", "MODEL.FPN.NORM")
    backbone = build_resnet_fpn_backbone(cfg, input_shape)
    GroupNormFactory.check(backbone, "backbone")
    return backbone
