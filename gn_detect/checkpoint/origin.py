"""What weights were trained with, beyond their shapes, and must go on to be used with."""

from __future__ import annotations

import dataclasses
import re

_BGR_MEAN = (103.530, 116.280, 123.675)
_BGR_STD = (57.375, 57.120, 58.395)
_UNIT = (1.0, 1.0, 1.0)


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
        """Of a checkpoint; what another version may have added is left out."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    @classmethod
    def of_name(cls, weights: str) -> Origin | None:
        """Of public weights, by the end of their name or URL; None for unknown ones."""
        name = re.sub(r"(\.pkl)?(\?.*)?$", "", weights)
        return next((o for pattern, o in _KNOWN.items() if re.search(f"{pattern}$", name)), None)


# The input of torchvision's classifiers, and of most others.
IMAGENET = {"input_format": "RGB", "pixel_mean": _BGR_MEAN[::-1], "pixel_std": _BGR_STD[::-1]}
# The input of Detectron's.
DETECTRON = {"input_format": "BGR", "pixel_mean": _BGR_MEAN, "pixel_std": _UNIT}

# Detectron2's checkpoint/catalog.py ("MSRA models have STRIDE_IN_1X1=True. False otherwise. All
# models here use PIXEL_STD=[1,1,1]"), and its configs for what it has converted itself.
_KNOWN = {
    r"MSRA/R-(50|101)": Origin("BGR", _BGR_MEAN, _UNIT, True),
    r"ImageNetPretrained/(FAIR|\d+)/R-(50|101)-GN": Origin("BGR", _BGR_MEAN, _UNIT, False),
    r"ImageNetPretrained/torchvision/R-(50|101)": Origin(
        "RGB", _BGR_MEAN[::-1], _BGR_STD[::-1], False
    ),
    r"detectron2://ImageNetPretrained/FAIR/X-101-32x8d": Origin("BGR", _BGR_MEAN, _BGR_STD, False),
    r"Misc/mask_rcnn_R_50_FPN_3x_gn/\d+/\w+": Origin("BGR", _BGR_MEAN, _UNIT, False),
    r"Misc/scratch_mask_rcnn_R_50_FPN_3x_gn/\d+/\w+": Origin("BGR", _BGR_MEAN, _UNIT, False),
    r"Misc/scratch_mask_rcnn_R_50_FPN_9x_gn/\d+/\w+": Origin("BGR", _BGR_MEAN, _BGR_STD, False),
}
