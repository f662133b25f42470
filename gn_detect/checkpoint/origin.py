"""What weights were trained with, beyond their shapes, and must go on to be used with."""

from __future__ import annotations

import dataclasses
import re

from detectron2.config import CfgNode

from gn_detect.config import ConfigError

_BGR_MEAN = (103.530, 116.280, 123.675)
_BGR_STD = (57.375, 57.120, 58.395)
_UNIT = (1.0, 1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Origin:
    """Input and strides of the network that weights were trained in.

    Args:
        input_format: order of the channels, ``"BGR"`` or ``"RGB"``.
        pixel_mean, pixel_std: subtracted from and dividing the pixels (0 to 255), in that order.
        stride_in_1x1: whether a bottleneck block strides in its first 1x1 convolution or in its
            3x3; None for networks without bottleneck blocks.
    """

    input_format: str
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    stride_in_1x1: bool | None

    @classmethod
    def of_config(cls, cfg: CfgNode) -> Origin:
        """What a model of ``cfg`` is trained with."""
        bottleneck = cfg.MODEL.RESNETS.DEPTH >= 50
        return cls(
            cfg.INPUT.FORMAT,
            tuple(cfg.MODEL.PIXEL_MEAN),
            tuple(cfg.MODEL.PIXEL_STD),
            cfg.MODEL.RESNETS.STRIDE_IN_1X1 if bottleneck else None,
        )

    @classmethod
    def of_name(cls, weights: str) -> Origin | None:
        """Of public weights, by the end of their name or URL; None for unknown ones."""
        name = re.sub(r"(\.pkl)?(\?.*)?$", "", weights)
        return next((o for pattern, o in _KNOWN.items() if re.search(f"{pattern}$", name)), None)


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


def check_origin(origin: Origin, cfg: CfgNode, weights: str) -> None:
    """Refuse weights that were trained with another input or other strides than ``cfg``'s.

    Args:
        origin: of the weights.
        weights: their name, for the message.

    Raises:
        ConfigError: names each key, its value, the weights' value, and the switch.
    """
    ours = Origin.of_config(cfg)
    if cfg.GUARDS.WEIGHTS_INPUT:
        wrong = [
            f"{key} is {_plain(value)}, the weights' is {_plain(theirs)}"
            for key, value, theirs in (
                ("INPUT.FORMAT", ours.input_format, origin.input_format),
                ("MODEL.PIXEL_MEAN", ours.pixel_mean, origin.pixel_mean),
                ("MODEL.PIXEL_STD", ours.pixel_std, origin.pixel_std),
            )
            if not _equal(value, theirs)
        ]
        if wrong:
            raise ConfigError(
                f"{weights} was trained with another input: {'; '.join(wrong)}. Give the keys the "
                "weights' values; to go on with another input all the same, set "
                "GUARDS.WEIGHTS_INPUT False"
            )
    strides = (ours.stride_in_1x1, origin.stride_in_1x1)
    if cfg.GUARDS.WEIGHTS_STRIDE and None not in strides and strides[0] != strides[1]:
        raise ConfigError(
            f"MODEL.RESNETS.STRIDE_IN_1X1 is {strides[0]}, but {weights} was trained with "
            f"{strides[1]}: the shapes are the same, the features are not. Set it to {strides[1]}; "
            "to go on all the same, set GUARDS.WEIGHTS_STRIDE False"
        )


def _equal(a, b) -> bool:
    if isinstance(a, str) or len(a) != len(b):
        return a == b
    return all(abs(x - y) <= 0.01 * abs(y) for x, y in zip(a, b, strict=True))


def _plain(value) -> str:
    return value if isinstance(value, str) else str(list(value))
