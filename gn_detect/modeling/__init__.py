from .box_head import GNFastRCNNConvFCHead
from .fpn import build_gn_resnet_fpn_backbone
from .mask_head import GNMaskRCNNConvUpsampleHead
from .norm import GroupNormFactory
from .resnet import build_gn_resnet_backbone

__all__ = [
    "GNFastRCNNConvFCHead",
    "GNMaskRCNNConvUpsampleHead",
    "GroupNormFactory",
    "build_gn_resnet_backbone",
    "build_gn_resnet_fpn_backbone",
]
