"""What Detectron2 alone builds for one of our configs."""

from detectron2.config import get_cfg

_NAMES = {
    "build_gn_resnet_backbone": "build_resnet_backbone",
    "build_gn_resnet_fpn_backbone": "build_resnet_fpn_backbone",
    "build_gn_resnetv2_fpn_backbone": "build_resnet_fpn_backbone",
    "build_tensorpack_resnet_fpn_backbone": "build_resnet_fpn_backbone",
    "build_gn_retinanet_resnet_fpn_backbone": "build_retinanet_resnet_fpn_backbone",
    "DetectronAnchorGenerator": "DefaultAnchorGenerator",
    "DetectronROIHeads": "StandardROIHeads",
    "GNGeneralizedRCNN": "GeneralizedRCNN",
    "GNPanopticFPN": "PanopticFPN",
    "GNRPN": "RPN",
    "GNRPNHead": "StandardRPNHead",
    "GNRes5ROIHeads": "Res5ROIHeads",
    "GNFastRCNNConvFCHead": "FastRCNNConvFCHead",
    "GNMaskRCNNConvUpsampleHead": "MaskRCNNConvUpsampleHead",
    "TensorpackFastRCNNConvFCHead": "FastRCNNConvFCHead",
    "TensorpackMaskRCNNConvUpsampleHead": "MaskRCNNConvUpsampleHead",
    "GNKRCNNConvDeconvUpsampleHead": "KRCNNConvDeconvUpsampleHead",
    "GNRetinaNet": "RetinaNet",
    "GNSemSegFPNHead": "SemSegFPNHead",
}


def detectron2_config(ours):
    """The config in Detectron2's keys and names alone."""

    def copy(node, into):
        for key, value in into.items():
            if isinstance(value, dict):
                copy(node[key], value)
            else:
                name = node[key] if isinstance(node[key], str) else ""
                into[key] = _NAMES.get(name, node[key])

    cfg = get_cfg()
    copy(ours.MODEL, cfg.MODEL)
    return cfg
