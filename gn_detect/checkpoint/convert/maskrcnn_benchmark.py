"""Faster and Mask R-CNN with FPN of maskrcnn-benchmark (github.com/facebookresearch/
maskrcnn-benchmark), such as those of its configs/gn_baselines, and of its fork by the authors of
Weight Standardization (github.com/joe-siyuan-qiao/maskrcnn-benchmark).

They compute what Detectron does, with its anchors and RoIAlign (``modeling/detectron.py``,
configs/Detectron). The fork standardizes the weights of each convolution in front of a GN, which
leaves no trace in a file.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping

import torch

from ..origin import DETECTRON, Origin
from ..safe_load import WeightsError
from . import torchvision
from .weights import Weights

logger = logging.getLogger(__name__)

# Layer -> Detectron2's; k1 is k + 1. Convolutions with GN are X.0 and X.1 of a Sequential
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
    r"roi_heads\.box\.predictor\.(cls_score|bbox_pred)": r"roi_heads.box_predictor.{0}",
    r"roi_heads\.mask\.feature_extractor\.(mask_fcn\d+)": "roi_heads.mask_head.{0}",
    r"roi_heads\.mask\.predictor\.conv5_mask": "roi_heads.mask_head.deconv",
    r"roi_heads\.mask\.predictor\.mask_fcn_logits": "roi_heads.mask_head.predictor",
}
_XCONVS = "roi_heads.box.feature_extractor.xconvs."
_ANCHORS = "rpn.anchor_generator."  # constants: the config gives them


def recognizes(names: Collection[str]) -> bool:
    return "backbone.body.stem.conv1.weight" in names


def convert(state: Mapping[str, torch.Tensor]) -> Weights:
    """Put the background, which is class 0 in all heads, last, as in Detectron2; it has neither box
    nor mask there.

    Raises:
        WeightsError: the detector has layers, channels or anchors with no place in Detectron2's.
    """
    # ReLUs count in this Sequential, too: of three modules per convolution, or of two without GN.
    step = 3 if f"{_XCONVS}3.weight" in state else 2
    names = {name: _rename(name, step) for name in state if not name.startswith(_ANCHORS)}
    if unknown := [name for name, new in names.items() if new is None]:
        raise WeightsError(
            f"{len(unknown)} weights of maskrcnn-benchmark have no place in Detectron2's Faster "
            f"and Mask R-CNN with FPN: {', '.join(unknown[:3])}{', ...' if unknown[3:] else ''}. "
            "Convert a detector without these layers"
        )
    group_norm = "backbone.body.stem.bn1.running_mean" not in state
    if group_norm:
        logger.warning(
            "a file of maskrcnn-benchmark does not tell whether Weight Standardization was used: "
            'if so, as in the fork of its authors, set MODEL.GN.WEIGHT_STANDARDIZATION "authors"'
        )
    return Weights(
        "maskrcnn-benchmark",
        {new: state[name] for name, new in names.items()} | _background_last(state),
        partial=False,
        # Of its config/defaults.py and configs/gn_baselines.
        origin=Origin(
            **DETECTRON,
            stride_in_1x1=False if group_norm else None,
            num_groups=32 if group_norm else None,
        ),
        left_out=[name for name in state if name not in names],
    )


def _rename(name: str, step: int = 3) -> str | None:
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
    for pattern, new in _LAYERS.items():
        if parameter in ("weight", "bias") and (match := re.fullmatch(pattern, layer)):
            k1 = int(match.groupdict().get("k") or 0) + 1
            return f"{new.format(*match.groups(), k1=k1)}{norm}.{parameter}"
    return None


def _background_last(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The class weights with Detectron2's names and classes; boxes for all classes in common have
    the rows of a background, too (modeling/roi_heads/box_head/roi_box_predictors.py)."""
    if "rpn.head.cls_logits.weight" in state and len(state["rpn.head.cls_logits.weight"]) > 3:
        raise WeightsError(
            "rpn.head.cls_logits has more than 3 anchors per position: with several sizes on one "
            "level their order is not Detectron2's; up to 3 can be converted"
        )
    result = {}
    for parameter in ("weight", "bias"):
        scores = state.get(f"roi_heads.box.predictor.cls_score.{parameter}")
        if scores is None:
            continue
        classes = len(scores)
        result[f"roi_heads.box_predictor.cls_score.{parameter}"] = scores.roll(-1, 0)
        for name, rows, first in (
            ("box.predictor.bbox_pred", (4 * classes, 8), 4),
            ("mask.predictor.mask_fcn_logits", (classes,), 1),
        ):
            value = state.get(name := f"roi_heads.{name}.{parameter}")
            if value is None:
                continue
            if len(value) not in rows:
                raise WeightsError(
                    f"{name} has {len(value)} channels for {classes} classes with the background: "
                    f"expected {' or '.join(map(str, rows))}"
                )
            result[_rename(name)] = value[first:]
    return result
