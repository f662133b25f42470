"""Faster and Mask R-CNN with FPN of maskrcnn-benchmark (github.com/facebookresearch/
maskrcnn-benchmark), such as those of its configs/gn_baselines, and of its fork by the authors of
Weight Standardization (github.com/joe-siyuan-qiao/maskrcnn-benchmark).

They compute what Detectron does, with its anchors and RoIAlign (``modeling/detectron.py``,
configs/Detectron). The fork standardizes the weights of each convolution in front of a GN, which
leaves no trace in a file.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch

from ..origin import DETECTRON, Origin
from . import detectors, torchvision
from .weights import Weights

# Of ``detectors.rename``. Convolutions with GN are X.0 and X.1 of a Sequential
# (maskrcnn_benchmark/modeling/make_layers.py), which become X and X.norm.
_LAYERS = {
    r"backbone\.fpn\.fpn_inner(?P<k>[1-4])": "backbone.fpn_lateral{k1}",
    r"backbone\.fpn\.fpn_layer(?P<k>[1-4])": "backbone.fpn_output{k1}",
    r"rpn\.head\.conv": "proposal_generator.rpn_head.conv",
    r"rpn\.head\.cls_logits": "proposal_generator.rpn_head.objectness_logits",
    r"rpn\.head\.bbox_pred": "proposal_generator.rpn_head.anchor_deltas",
    r"roi_heads\.box\.feature_extractor\.fc6": "roi_heads.box_head.fc1",
    r"roi_heads\.box\.feature_extractor\.fc7": "roi_heads.box_head.fc2",
    r"roi_heads\.box\.feature_extractor\.xconv(?P<k>\d+)": "roi_heads.box_head.conv{k1}",
    r"roi_heads\.box\.predictor\.cls_score": "roi_heads.box_predictor.cls_score",
    r"roi_heads\.box\.predictor\.bbox_pred": "roi_heads.box_predictor.bbox_pred",
    r"roi_heads\.mask\.feature_extractor\.mask_fcn(?P<k>\d+)": "roi_heads.mask_head.mask_fcn{k}",
    r"roi_heads\.mask\.predictor\.conv5_mask": "roi_heads.mask_head.deconv",
    r"roi_heads\.mask\.predictor\.mask_fcn_logits": "roi_heads.mask_head.predictor",
}
_XCONVS = "roi_heads.box.feature_extractor.xconvs."
_ANCHORS = "rpn.anchor_generator."  # constants: the config gives them


def recognizes(names: Collection[str]) -> bool:
    return "backbone.body.stem.conv1.weight" in names


def convert(state: Mapping[str, torch.Tensor]) -> Weights:
    """
    Raises:
        WeightsError: of ``detectors.converted``.
    """
    # ReLUs count in this Sequential, too: of three modules per convolution, or of two without GN.
    step = 3 if f"{_XCONVS}3.weight" in state else 2
    names = {name: _rename(name, step) for name in state if not name.startswith(_ANCHORS)}
    # The background has boxes in common, too (modeling/roi_heads/box_head/roi_box_predictors.py).
    converted = detectors.converted(state, names, "maskrcnn-benchmark", common_boxes=8)
    group_norm = "backbone.body.stem.bn1.running_mean" not in state
    return Weights(
        "maskrcnn-benchmark",
        converted,
        partial=False,
        # Of its config/defaults.py and configs/gn_baselines.
        origin=Origin(
            **DETECTRON,
            stride_in_1x1=False if group_norm else None,
            num_groups=32 if group_norm else None,
        ),
        left_out=[name for name in state if name not in names],
    )


def _rename(name: str, step: int) -> str | None:
    """Detectron2's name of a weight; None for what Detectron2's R-CNN does not have."""
    layer, _, parameter = name.rpartition(".")
    if layer.startswith("backbone.body."):
        new = torchvision.rename(re.sub(r"^backbone\.body\.(stem\.)?", "", name))
        return new and f"backbone.bottom_up.{new}"
    if match := re.fullmatch(rf"{re.escape(_XCONVS)}(\d+)", layer):
        index, part = divmod(int(match[1]), step)
        layer = f"{_XCONVS.removesuffix('s.')}{index}.{part}"
    norm = ""
    if match := re.fullmatch(r"(.*(?:fpn_\w+|xconv\d+|mask_fcn\d+))\.([01])", layer):
        layer, norm = match[1], ".norm" if match[2] == "1" else ""
    new = detectors.rename(layer, _LAYERS)
    return f"{new}{norm}.{parameter}" if new and parameter in ("weight", "bias") else None
