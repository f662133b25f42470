"""Feature Pyramid Network (Lin et al., CVPR 2017) with any norm."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone.fpn import (
    build_resnet_fpn_backbone,
    build_retinanet_resnet_fpn_backbone,
)

from .norm import with_norms
from .resnet import finish_resnet


@BACKBONE_REGISTRY.register()
def build_gn_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Detectron2's ``build_resnet_fpn_backbone`` with our norms in the ResNet and after every
    lateral and output convolution of the FPN (Detectron ``projects/GN``).

    Raises:
        ConfigError: ``MODEL.RESNETS.NORM`` or ``MODEL.FPN.NORM`` is unknown, or the groups do not
            divide a layer's channels.
    """
    return _build(build_resnet_fpn_backbone, cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_gn_retinanet_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Detectron2's ``build_retinanet_resnet_fpn_backbone`` (levels p3 to p7), as above. The
    convolutions of p6 and p7 have no norm there, nor here."""
    return _build(build_retinanet_resnet_fpn_backbone, cfg, input_shape)


def _build(build, cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    backbone = build(with_norms(cfg, "MODEL.RESNETS.NORM", "MODEL.FPN.NORM"), input_shape)
    finish_resnet(backbone, "backbone", cfg)
    return backbone
