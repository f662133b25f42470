from .box_head import GNFastRCNNConvFCHead
from .classifier import ResNetClassifier
from .detectron import DetectronAnchorGenerator, DetectronROIHeads, DetectronROIPooler
from .fpn import build_gn_resnet_fpn_backbone, build_gn_retinanet_resnet_fpn_backbone
from .keypoint_head import GNKRCNNConvDeconvUpsampleHead
from .mask_head import GNMaskRCNNConvUpsampleHead
from .meta_arch import (
    GNGeneralizedRCNN,
    GNPanopticFPN,
    GNRetinaNet,
    GNSemSegFPNHead,
    build_detector,
)
from .norm import GroupNormFactory, finish_norms
from .resnet import build_gn_resnet_backbone
from .resnetv2 import build_gn_resnetv2_backbone, build_gn_resnetv2_fpn_backbone
from .roi_heads import GNRes5ROIHeads
from .rpn import GNRPN, GNRPNHead
from .tensorpack import (
    TensorpackFastRCNNConvFCHead,
    TensorpackMaskRCNNConvUpsampleHead,
    build_tensorpack_resnet_fpn_backbone,
)

__all__ = [
    "DetectronAnchorGenerator",
    "DetectronROIHeads",
    "DetectronROIPooler",
    "GNFastRCNNConvFCHead",
    "GNGeneralizedRCNN",
    "GNKRCNNConvDeconvUpsampleHead",
    "GNMaskRCNNConvUpsampleHead",
    "GNPanopticFPN",
    "GNRPN",
    "GNRPNHead",
    "GNRes5ROIHeads",
    "GNRetinaNet",
    "GNSemSegFPNHead",
    "GroupNormFactory",
    "ResNetClassifier",
    "TensorpackFastRCNNConvFCHead",
    "TensorpackMaskRCNNConvUpsampleHead",
    "build_detector",
    "build_gn_resnet_backbone",
    "build_gn_resnet_fpn_backbone",
    "build_gn_resnetv2_backbone",
    "build_gn_resnetv2_fpn_backbone",
    "build_gn_retinanet_resnet_fpn_backbone",
    "build_tensorpack_resnet_fpn_backbone",
    "finish_norms",
]
