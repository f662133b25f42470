"""ResNet (He et al., CVPR 2016) and ResNeXt (Xie et al., CVPR 2017) with any norm."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, ResNet, build_resnet_backbone
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from torch import nn

from gn_detect.config import ConfigError

from .norm import finish_from_config, finish_norms, with_norms


@BACKBONE_REGISTRY.register()
def build_gn_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Detectron2's ``build_resnet_backbone`` with our norms in stem, blocks and shortcuts.

    Same keys and shapes as with ``MODEL.RESNETS.NORM: "GN"`` there; groups, eps, Weight
    Standardization and the initial gamma of each block come from ``MODEL.GN``.

    Raises:
        ConfigError: ``MODEL.RESNETS.NORM`` is unknown, or the groups do not divide a layer's
            channels.
    """
    backbone = build_resnet_backbone(with_norms(cfg, "MODEL.RESNETS.NORM"), input_shape)
    finish_resnet(backbone, "backbone", cfg)
    return backbone


def finish_resnet(module: nn.Module, name: str, cfg: CfgNode, of_rois: bool = False) -> None:
    """Complete, in place, a module of residual blocks built with ``with_norms``.

    Args:
        module: a ResNet, or a stage of one.
        name: its name in the model.
        of_rois: its maps are those of RoIs.

    Raises:
        ConfigError: the groups do not divide a layer's channels, or ``ZERO_INIT_RESIDUAL`` finds
            a norm without gamma.
    """
    finish_norms(module, name, **finish_from_config(cfg, of_rois))
    if cfg.MODEL.GN.ZERO_INIT_RESIDUAL and not zero_init_residual(module):
        raise ConfigError(
            "MODEL.GN.ZERO_INIT_RESIDUAL is True, but MODEL.RESNETS.NORM is "
            f"{cfg.MODEL.RESNETS.NORM!r}, which has no gamma to train; set it to False"
        )


def zero_init_residual(module: nn.Module) -> int:
    """Set gamma of the last norm of each residual block in ``module`` to 0, so that the block
    starts as the identity. Returns of how many."""
    blocks = [m for m in module.modules() if isinstance(m, (BottleneckBlock, BasicBlock))]
    last = [block.conv3 if isinstance(block, BottleneckBlock) else block.conv2 for block in blocks]
    # BN of frozen stages is FrozenBN, without parameters.
    gammas = [getattr(conv.norm, "weight", None) for conv in last]
    gammas = [gamma for gamma in gammas if isinstance(gamma, nn.Parameter)]
    for gamma in gammas:
        nn.init.zeros_(gamma)
    return len(gammas)
