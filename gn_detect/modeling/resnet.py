"""ResNet (He et al., CVPR 2016) with Group Normalization: R18, R34, R50, R101, R152."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, ResNet, build_resnet_backbone

from .norm import GroupNormFactory, with_gn_norms


@BACKBONE_REGISTRY.register()
def build_gn_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Detectron2's ``build_resnet_backbone`` with our GN in stem, blocks and shortcuts.

    Same keys and shapes as with ``MODEL.RESNETS.NORM: "GN"`` there; groups and eps come from
    ``MODEL.GN``.

    Raises:
        ConfigError: ``MODEL.RESNETS.NORM`` is not GN, or the groups do not divide a layer's
            channels.
    """
    backbone = build_resnet_backbone(with_gn_norms(cfg, "MODEL.RESNETS.NORM"), input_shape)
    GroupNormFactory.check(backbone, "backbone")
    return backbone
