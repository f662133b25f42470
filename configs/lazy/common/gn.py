"""GN in a detector of Detectron2: its own components with another norm, and ours where it has no
argument for that."""

from detectron2.config import LazyCall as L
from detectron2.modeling import FPN, GeneralizedRCNN, PanopticFPN, ResNet, RetinaNet
from detectron2.modeling.backbone import BasicStem
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    KRCNNConvDeconvUpsampleHead,
    MaskRCNNConvUpsampleHead,
)
from omegaconf import DictConfig, ListConfig

from gn_detect.modeling import (
    GNRPN,
    GNFastRCNNConvFCHead,
    GNGeneralizedRCNN,
    GNKRCNNConvDeconvUpsampleHead,
    GNMaskRCNNConvUpsampleHead,
    GNPanopticFPN,
    GNRetinaNet,
    GNRPNHead,
    GNSemSegFPNHead,
    GroupNormFactory,
    build_detector,
)

GN = L(GroupNormFactory)(num_groups=32)
_BOX_HEAD = dict(conv_dims=[256] * 4, fc_dims=[1024], conv_norm=GN)  # GN paper: 4conv1fc

_COMPONENTS = {  # of Detectron2 -> what takes its place, and with which arguments
    BasicStem: (BasicStem, dict(norm=GN)),
    # Public GN weights have the stride in the 3x3 convolution.
    ResNet.make_default_stages: (ResNet.make_default_stages, dict(norm=GN, stride_in_1x1=False)),
    ResNet.make_stage: (ResNet.make_stage, dict(norm=GN, stride_in_1x1=False)),
    FPN: (FPN, dict(norm=GN)),
    RetinaNetHead: (RetinaNetHead, dict(norm=GN)),
    RPN: (GNRPN, {}),
    StandardRPNHead: (GNRPNHead, {}),  # which may have a norm, and has none as published
    FastRCNNConvFCHead: (GNFastRCNNConvFCHead, _BOX_HEAD),
    MaskRCNNConvUpsampleHead: (GNMaskRCNNConvUpsampleHead, dict(conv_norm=GN)),
    KRCNNConvDeconvUpsampleHead: (GNKRCNNConvDeconvUpsampleHead, {}),  # as the RPN
    SemSegFPNHead: (GNSemSegFPNHead, dict(norm=GN)),
}
_META_ARCHITECTURES = {
    GeneralizedRCNN: GNGeneralizedRCNN,
    PanopticFPN: GNPanopticFPN,
    RetinaNet: GNRetinaNet,
}


def with_gn(model):
    """``model`` with GN wherever the GN paper has it, for fine-tuning: the stem and res2 are
    frozen, as its weights are good there."""
    _exchange(model)
    meta_arch = _META_ARCHITECTURES[model._target_]
    model.update(meta_arch=meta_arch, _target_=build_detector, mask_padding=False)
    model.update(weight_standardization="", memory="fast", channels_last=False)
    model.backbone.get("bottom_up", model.backbone).freeze_at = 2
    return model


def _exchange(node):
    for child in node.values() if isinstance(node, DictConfig) else node:
        if isinstance(child, (DictConfig, ListConfig)):
            _exchange(child)
    if isinstance(node, DictConfig) and node.get("_target_") in _COMPONENTS:
        target, arguments = _COMPONENTS[node._target_]
        node.update(arguments, _target_=target)
