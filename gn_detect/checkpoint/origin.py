"""What weights were trained with, beyond their shapes, and must go on to be used with."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Origin:
    """What the network computed that weights were trained in, where their names do not say it.

    Args:
        input_format: order of the channels, ``"BGR"`` or ``"RGB"``.
        pixel_mean, pixel_std: subtracted from and dividing the pixels (0 to 255), in that order.
        stride_in_1x1: whether a bottleneck block strides in its first 1x1 convolution or in its
            3x3; None for networks without bottleneck blocks.
        weight_standardization: variant of ``layers.standardize_weight``, or "" for none.
        num_groups: of every GN layer; None also where they have ``channels_per_group`` in common.
        channels_per_group: of every GN layer.

    None stands for what is not known.
    """

    input_format: str | None = None
    pixel_mean: tuple[float, ...] | None = None
    pixel_std: tuple[float, ...] | None = None
    stride_in_1x1: bool | None = None
    weight_standardization: str | None = None
    num_groups: int | None = None
    channels_per_group: int | None = None

    @classmethod
    def from_dict(cls, values: dict) -> Origin:
        """Of a checkpoint, also as JSON; what another version may have added is left out.

        Raises:
            ValueError: a value is of another kind.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        known = {}
        for name in fields & values.keys():
            value = tuple(values[name]) if isinstance(values[name], list) else values[name]
            numbers = value if isinstance(value, tuple) else ()
            right = value is None or isinstance(value, _KINDS.get(name, tuple))
            if not right or not all(isinstance(number, (int, float)) for number in numbers):
                raise ValueError(f"{name} is {value!r}")
            known[name] = value
        return cls(**known)

    def completed_by(self, other: Origin | None) -> Origin:
        """With the fields of ``other`` where this one's are not known."""
        known = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return dataclasses.replace(other, **known) if other else self

    @classmethod
    def of_name(cls, weights: str) -> Origin | None:
        """Of public weights, by the end of their name or URL; None for unknown ones."""
        end = r"(\.pkl|\.npz|(\.pth)?(\.tar)?)?([?#].*)?$"
        return next((o for pattern, o in _KNOWN.items() if re.search(pattern + end, weights)), None)


_KINDS = {"input_format": str, "stride_in_1x1": bool, "weight_standardization": str}
_KINDS |= {"num_groups": int, "channels_per_group": int}


def only(values: Iterable) -> Any:
    """The one value that all of ``values`` have; None if there are several, or none."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None


def same(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Whether two means or deviations agree but for rounding."""
    return len(a) == len(b) and all(abs(x - y) <= 0.01 * abs(y) for x, y in zip(a, b, strict=True))


_BGR_MEAN = (103.530, 116.280, 123.675)
_BGR_STD = (57.375, 57.120, 58.395)
_UNIT = (1.0, 1.0, 1.0)
# The input of torchvision's classifiers, and of most others.
IMAGENET = {"input_format": "RGB", "pixel_mean": _BGR_MEAN[::-1], "pixel_std": _BGR_STD[::-1]}
# The input of Detectron's.
DETECTRON = {"input_format": "BGR", "pixel_mean": _BGR_MEAN, "pixel_std": _UNIT}

_DETECTRON_GN = Origin(**DETECTRON, stride_in_1x1=False, weight_standardization="", num_groups=32)
# Images are read by OpenCV (tensorpack's examples/FasterRCNN, config.py and backbone.py).
TENSORPACK_GN = Origin("BGR", _BGR_MEAN, _BGR_STD, False, "", 32)
_IMAGENET_GN = Origin(**IMAGENET, stride_in_1x1=False, weight_standardization="", num_groups=32)
_WS_AUTHORS = dataclasses.replace(_IMAGENET_GN, weight_standardization="authors")

_KNOWN = {
    # Detectron2's checkpoint/catalog.py ("MSRA models have STRIDE_IN_1X1=True. False otherwise.
    # All models here use PIXEL_STD=[1,1,1]"), and its configs for what it has converted itself.
    r"MSRA/R-(50|101)": Origin(**DETECTRON, stride_in_1x1=True),
    r"ImageNetPretrained/(FAIR|\d+)/R-(50|101)-GN": _DETECTRON_GN,
    r"detectron://(R-(50|101)-GN|e2e_mask_rcnn_R-(50|101)-FPN_[23]x_gn)": _DETECTRON_GN,
    r"ImageNetPretrained/torchvision/R-(50|101)": Origin(**IMAGENET, stride_in_1x1=False),
    r"detectron2://ImageNetPretrained/FAIR/X-101-32x8d": Origin("BGR", _BGR_MEAN, _BGR_STD, False),
    r"Misc/(scratch_)?mask_rcnn_R_50_FPN_3x_gn/\d+/\w+": _DETECTRON_GN,
    r"Misc/scratch_mask_rcnn_R_50_FPN_9x_gn/\d+/\w+": dataclasses.replace(
        _DETECTRON_GN, pixel_std=_BGR_STD
    ),
    r"tensorpack(://|\.com/FasterRCNN/)COCO-MaskRCNN-R(50|101)FPN\dxGN\w*": TENSORPACK_GN,
    r"tensorpack(://|\.com/FasterRCNN/)ImageNet-R(50|101)-GroupNorm32-AlignPadding": TENSORPACK_GN,
    # ppwwyyxx/GroupNorm-reproduce, ImageNet-ResNet-PyTorch/main.py and resnet_gn.py
    r"GroupNorm-reproduce/releases/download/v0\.1/ImageNet-ResNet50-GN": _IMAGENET_GN,
    # chengyangfu/pytorch-groupnormalization, main.py; its file tells the groups
    r"cyfu/resnet50_groupnorm(16|32)": dataclasses.replace(_IMAGENET_GN, num_groups=None),
    # timm's models/resnet.py
    r"timm://resnet50_gn\.\w+": _IMAGENET_GN,
    # joe-siyuan-qiao/maskrcnn-benchmark, which keeps Detectron's input for these
    r"syqiao/WeightStandardization/[RX]-(50|101)-GN-WS\.pkl": dataclasses.replace(
        _DETECTRON_GN, weight_standardization="authors"
    ),
    # joe-siyuan-qiao/pytorch-classification, imagenet.py and README.md
    r"syqiao/WeightStandardization/[RX]-(50|101)-GN-WS": _WS_AUTHORS,
    # mmdetection's configs/gn and configs/gn+ws. The files are named in mmcv's
    # model_zoo/open_mmlab.json: "detectron/", "contrib/" and, of the authors, "jhu/".
    r"third_party/resnet(50|101)_gn-\w+": _DETECTRON_GN,
    r"third_party/resnet50_gn_thangvubk-\w+": _IMAGENET_GN,
    r"third_party/resne(t|xt)(50|101)(_32x4d)?_gn_ws-\w+": _WS_AUTHORS,
}
