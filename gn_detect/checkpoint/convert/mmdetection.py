"""Faster, Mask and Cascade R-CNN with FPN of mmdetection (github.com/open-mmlab/mmdetection), such
as those of its configs/gn, configs/gn+ws and configs/scratch.

Versions 2 and 3 compute what Detectron2 does. These are the same in both (files of mmdetection 2):

- Anchors of 8 strides, centred on the corner of a cell (``ANCHOR_GENERATOR.OFFSET`` 0), in the
  order of their ratios, one channel of objectness and four of deltas each
  (mmdet/core/anchor/anchor_generator.py, mmdet/models/dense_heads/rpn_head.py).
- Deltas (dx, dy, dw, dh) times ``target_stds``, 1 in the RPN and (0.1, 0.1, 0.2, 0.2) in the box
  head, where Detectron2 divides by ``BBOX_REG_WEIGHTS`` (mmdet/core/bbox/coder). Other
  ``target_stds`` in a config need other ``BBOX_REG_WEIGHTS``. The third stage of Cascade has 0.033
  and 0.067 for Detectron2's 1/30 and 1/15, so its deltas are up to 1 % apart.
- RoIAlign with half-pixel offset, all samples and the same levels
  (mmdet/models/roi_heads/roi_extractors), features flattened channel by channel, and P6 as each
  second pixel of P5 (mmdet/models/necks/fpn.py).
- Weight Standardization of the authors (mmcv/cnn/bricks/conv_ws.py).

Version 1 has the background as class 0 in all heads, which is put right here. It also has anchors
in the middle of a cell, rounded to whole pixels, and RoIAlign of 2 x 2 samples without the half
pixel. Detectron2 computes that, but for the rounding, with ``MODEL.ANCHOR_GENERATOR.OFFSET`` 0.5,
and ``POOLER_TYPE`` "ROIAlign" and ``POOLER_SAMPLING_RATIO`` 2 of both RoI heads; with its defaults
such a detector is worth less until it is fine-tuned (its docs/compatibility.md has up to 1 AP).
Boxes are the same: a version 1 box of whole pixels, width x2 - x1 + 1, ends at x2 + 1 of a later
one.

Classes have the order of the categories in the annotations that mmdetection was trained with
(mmdet/datasets/coco.py), Detectron2's that of their ids. For COCO the two are one.
"""

from __future__ import annotations

import ast
import contextlib
import logging
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch

from ..origin import Origin, only
from ..safe_load import WeightsError
from . import detectors, torchvision
from .weights import Weights

logger = logging.getLogger(__name__)

# Of ``detectors.rename``, once conv and norm of a ConvModule (mmcv/cnn/bricks/conv_module.py) are
# called X and X.norm.
_BOX_HEAD = r"bbox_head(\.(?P<stage>\d))?"
_LAYERS = {
    r"neck\.lateral_convs\.(?P<k>[0-3])": "backbone.fpn_lateral{k2}",
    r"neck\.fpn_convs\.(?P<k>[0-3])": "backbone.fpn_output{k2}",
    r"rpn_head\.rpn_conv": "proposal_generator.rpn_head.conv",
    r"rpn_head\.rpn_cls": "proposal_generator.rpn_head.objectness_logits",
    r"rpn_head\.rpn_reg": "proposal_generator.rpn_head.anchor_deltas",
    rf"{_BOX_HEAD}\.shared_convs\.(?P<k>\d+)": "roi_heads.box_head.{stage}conv{k1}",
    rf"{_BOX_HEAD}\.shared_fcs\.(?P<k>\d+)": "roi_heads.box_head.{stage}fc{k1}",
    rf"{_BOX_HEAD}\.fc_cls": "roi_heads.box_predictor.{stage}cls_score",
    rf"{_BOX_HEAD}\.fc_reg": "roi_heads.box_predictor.{stage}bbox_pred",
    r"mask_head\.convs\.(?P<k>\d+)": "roi_heads.mask_head.mask_fcn{k1}",
    r"mask_head\.upsample": "roi_heads.mask_head.deconv",
    r"mask_head\.conv_logits": "roi_heads.mask_head.predictor",
}
# A classifier, the averages of EMAHook (mmcv/runner/hooks/ema.py), and counters of BN.
_LEFT_OUT = r"backbone\.fc\.\w+|ema_.*|.*\.num_batches_tracked"


def recognizes(names: Collection[str]) -> bool:
    return any(name.startswith(("neck.lateral_convs.", "rpn_head.rpn_")) for name in names)


def convert(state: Mapping[str, torch.Tensor], meta: Any) -> Weights:
    """
    Args:
        state: ``state_dict`` of the checkpoint.
        meta: of the checkpoint, if it has any. The text of the config in it says the origin.

    Raises:
        WeightsError: of ``detectors.converted``, or the FPN lacks stages.
    """
    names = {name: _rename(name) for name in state if not re.fullmatch(_LEFT_OUT, name)}
    # The background is the first class of version 1 (mmdet/models/bbox_heads/bbox_head.py and
    # mmdet/models/mask_heads/fcn_mask_head.py), without ``roi_head.``, and the last of version 2,
    # without a box and a mask (its docs/compatibility.md).
    first = any(n.startswith("bbox_head.") for n in state)
    converted = detectors.converted(state, names, "mmdetection", background_first=first)
    if "neck.lateral_convs.3.conv.weight" not in state:
        raise WeightsError(
            "neck.lateral_convs.3.conv.weight is missing: only detectors of mmdetection with an "
            "FPN of all four stages (start_level 0) can be converted"
        )
    if first:
        logger.warning(
            "the detector is of mmdetection 1: for its anchors and RoIAlign, set "
            "MODEL.ANCHOR_GENERATOR.OFFSET 0.5, and for both RoI heads POOLER_TYPE ROIAlign and "
            "POOLER_SAMPLING_RATIO 2"
        )
    return Weights(
        "mmdetection",
        converted,
        partial=False,
        origin=_origin(meta, bottleneck="backbone.layer1.0.conv3.weight" in state),
        left_out=[name for name in state if name not in names],
    )


def _rename(name: str) -> str | None:
    """Detectron2's name of a weight; None for what Detectron2's R-CNN does not have."""
    layer, _, parameter = name.rpartition(".")
    if parameter not in ("weight", "bias", "running_mean", "running_var"):
        return None
    if layer.startswith("backbone."):
        new = torchvision.rename(name.removeprefix("backbone."))
        return new and f"backbone.bottom_up.{new}"
    norm = ""
    if match := re.fullmatch(r"(.*convs\.\d+)\.(conv|[bg]n)", layer):
        layer, norm = match[1], "" if match[2] == "conv" else ".norm"
    new = detectors.rename(layer.removeprefix("roi_head."), _LAYERS)
    return new and f"{new}{norm}.{parameter}"


def _origin(meta: Any, bottleneck: bool) -> Origin:
    """What the text of the config says; None for what it does not, or not unambiguously."""
    known = meta if isinstance(meta, Mapping) else {}
    dicts = _read_dicts(known.get("config") or known.get("cfg"))  # version 1 and 2, or 3
    if not dicts:
        return Origin()
    # ``img_norm_cfg`` and the transform ``Normalize``, or version 3's ``data_preprocessor``
    rgb, mean, std = only(
        (d.get("to_rgb", d.get("bgr_to_rgb")), d["mean"], d["std"])
        for d in dicts
        if isinstance(d.get("mean"), tuple) and isinstance(d.get("std"), tuple)
    ) or (None, None, None)
    style = only(d["style"] for d in dicts if d.get("style") in ("pytorch", "caffe"))
    return Origin(
        input_format={True: "RGB", False: "BGR"}.get(rgb),
        pixel_mean=mean,
        pixel_std=std,
        stride_in_1x1=style == "caffe" if bottleneck and style else None,
        weight_standardization="authors" if any(d.get("type") == "ConvWS" for d in dicts) else "",
        num_groups=only(d.get("num_groups") for d in dicts if d.get("type") == "GN"),
    )


def _read_dicts(text: Any) -> list[dict[str, Any]]:
    """The literal items of each ``dict(...)`` in a config. Nothing in it is executed.

    Version 1 has the path of the config in front of its text, without a comment sign
    (tools/model_converters/upgrade_model_version.py).
    """
    for source in (text, f"#{text}"):
        with contextlib.suppress(SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
            return [
                {k.arg: value for k in node.keywords if (value := _literal(k.value)) is not None}
                for node in ast.walk(ast.parse(source))
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "dict"
            ]
    return []


def _literal(node: ast.expr) -> Any:
    """A constant, or a list of numbers as a tuple; None for all else."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, (ast.List, ast.Tuple)):
        numbers = tuple(_literal(item) for item in node.elts)
        return numbers if all(isinstance(number, (int, float)) for number in numbers) else None
    return None
