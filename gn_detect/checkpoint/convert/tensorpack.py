"""Mask R-CNN and Cascade Mask R-CNN with FPN of tensorpack (github.com/tensorpack/tensorpack,
examples/FasterRCNN), and the ResNets that it starts from (github.com/ppwwyyxx/GroupNorm-reproduce).

Names are those of TensorFlow's variables. Convolutions are laid out (height, width, in, out), the
transposed one (height, width, out, in), fully connected layers (in, out) with features flattened
channel by channel as here; the background is the first class, and has a box (examples/FasterRCNN,
convert_d2/convert_d2.py, modeling/model_frcnn.py, tensorpack/models/fc.py).

These networks are not Detectron2's, alike as the names are: with GN, the convolutions of FPN and
heads have biases, too, and those of the heads are followed by ReLU and then by GN. The components
of ``modeling.tensorpack``, which ``configs/tensorpack`` name, compute that. The rest is the same:

- "AlignPadding" is the padding of Caffe and PyTorch. tensorpack pads the left and the top by all,
  the right and the bottom by one less, which no stride of 2 reaches in a map of an even size; the
  images are padded to multiples of 32 (modeling/backbone.py).
- Anchors are centred on the corner of a cell and not rounded, in the order of their ratios
  (modeling/model_rpn.py). Before May 2019, in files such as COCO-R50FPN-MaskRCNN-StandardGN.npz,
  they were in its middle and rounded.
- RoIAlign is that of ``crop_and_resize`` on maps with one more pixel around, with half-pixel offset
  and 2 x 2 samples (modeling/model_box.py): ``POOLER_SAMPLING_RATIO`` 2.
- Deltas are multiplied by ``BBOX_REG_WEIGHTS``, and one box is for all classes of a Cascade R-CNN.

docs/weights.md has the details that no key changes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch

from ..origin import TENSORPACK_GN, Origin
from ..safe_load import WeightsError
from . import detectors
from .weights import Weights

# Of ``detectors.rename``: variables without their last part.
_BACKBONE = {
    r"conv0": "stem.conv1",
    r"group(?P<s>\d)/block(?P<b>\d+)/conv(?P<c>\d)": "res{s2}.{b}.conv{c}",
    r"group(?P<s>\d)/block(?P<b>\d+)/convshortcut": "res{s2}.{b}.shortcut",
}
_HEAD = r"(fastrcnn|cascade_rcnn_stage(?P<stage>\d)/head)"
_OUTPUTS = r"(fastrcnn|cascade_rcnn_stage(?P<stage>\d))/outputs"
_DETECTOR = {
    **{layer: f"backbone.bottom_up.{ours}" for layer, ours in _BACKBONE.items()},
    r"fpn/lateral_1x1_c(?P<k>\d)": "backbone.fpn_lateral{k}",
    r"fpn/gn_c(?P<k>\d)": "backbone.fpn_lateral{k}.norm",
    r"fpn/posthoc_3x3_p(?P<k>\d)": "backbone.fpn_output{k}",
    r"fpn/gn_p(?P<k>\d)": "backbone.fpn_output{k}.norm",
    r"rpn/conv0": "proposal_generator.rpn_head.conv",
    r"rpn/class": "proposal_generator.rpn_head.objectness_logits",
    r"rpn/box": "proposal_generator.rpn_head.anchor_deltas",
    rf"{_HEAD}/conv(?P<k>\d)": "roi_heads.box_head.{stage}conv{k1}",
    rf"{_HEAD}/gn(?P<k>\d)": "roi_heads.box_head.{stage}conv{k1}.norm",
    rf"{_HEAD}/fc6?": "roi_heads.box_head.{stage}fc1",
    rf"{_HEAD}/fc7": "roi_heads.box_head.{stage}fc2",
    rf"{_OUTPUTS}/class": "roi_heads.box_predictor.{stage}cls_score",
    rf"{_OUTPUTS}/box": "roi_heads.box_predictor.{stage}bbox_pred",
    r"maskrcnn/fcn(?P<k>\d)": "roi_heads.mask_head.mask_fcn{k1}",
    r"maskrcnn/gn(?P<k>\d)": "roi_heads.mask_head.mask_fcn{k1}.norm",
    r"maskrcnn/deconv": "roi_heads.mask_head.deconv",
    r"maskrcnn/conv": "roi_heads.mask_head.predictor",
}
_PARAMETERS = {"W": "weight", "b": "bias", "gamma": "weight", "beta": "bias"}
_PARAMETERS |= {"mean/EMA": "running_mean", "variance/EMA": "running_var"}
# A classifier, and what tensorpack/tfutils/varmanip.py (is_training_name) takes for training's.
_LEFT_OUT = r"linear/[Wb]|global_step|learning_rate|(.*/)?EMA/.*|AccumGrad.*|apply_gradients.*"
_LEFT_OUT = rf"({_LEFT_OUT}|.*/(Adam(_1)?|Momentum|AccumGrad))(:0)?"


def recognizes(names: Collection[str]) -> bool:
    return any(name in names for name in ("conv0/W", "conv0/W:0"))


def convert(state: Mapping[str, torch.Tensor]) -> Weights:
    """
    Raises:
        WeightsError: of ``detectors.converted``, or a weight has another number of dimensions.
    """
    detector = any(name.startswith("rpn/") for name in state)
    names = {n: _rename(n, detector) for n in state if not re.fullmatch(_LEFT_OUT, n)}
    transposed = {name: _transposed(name, state[name]) for name, new in names.items() if new}
    group_norm = any(name.startswith("conv0/gn/gamma") for name in state)
    return Weights(
        "tensorpack",
        detectors.converted(transposed, names, "tensorpack", masks_of_background=False),
        partial=not detector,
        # Of those with BN, some were made of Caffe's (BACKBONE.STRIDE_1X1 of config.py).
        origin=TENSORPACK_GN if group_norm else Origin(weight_standardization=""),
        left_out=[name for name in state if name not in names],
    )


def _rename(name: str, detector: bool) -> str | None:
    """Detectron2's name of a variable; None for what Detectron2 does not have."""
    match = re.fullmatch(rf"(.+?)(/[gb]n)?/({'|'.join(_PARAMETERS)})(:0)?", name)
    if not match:
        return None
    layer, norm, parameter = match[1], ".norm" if match[2] else "", _PARAMETERS[match[3]]
    new = detectors.rename(layer, _DETECTOR if detector else _BACKBONE, first_stage=1)
    return new and f"{new}{norm}.{parameter}"


def _transposed(name: str, value: torch.Tensor) -> torch.Tensor:
    """From TensorFlow's layout."""
    if not re.search("/W(:0)?$", name):
        expected, order = "one dimension", (0,)
    elif re.search(r"/(fc\d?|outputs/(class|box))/W(:0)?$", name):
        expected, order = "two dimensions", (1, 0)
    else:
        expected, order = "four dimensions", (3, 2, 0, 1)
    if value.ndim != len(order):
        raise WeightsError(
            f"{name} has the shape {list(value.shape)}; tensorpack's has {expected}: it was "
            "changed, or is of another network. Convert the file that tensorpack wrote"
        )
    return value.permute(order).contiguous()
