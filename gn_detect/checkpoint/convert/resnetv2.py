"""timm's pre-activation ResNets (timm/models/resnetv2.py): Big Transfer's
``resnetv2_{50x1,50x3,101x1,101x3,152x2,152x4}_bit``, and ``resnetv2_50d_gn``."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch

from ..origin import Origin
from .weights import Weights

_HALF = (127.5, 127.5, 127.5)  # timm's mean and std of 0.5, in all its ResNetV2
_BATCH_NORM = "running_mean|running_var|num_batches_tracked"
_LAYER = rf"((?:conv|norm)\d|shortcut)\.(weight|bias|{_BATCH_NORM})"


def recognizes(names: Collection[str]) -> bool:
    """No other norm than GN and BN has these names alone: EvoNorm and FRN have parameters more."""
    return "stages.0.blocks.0.conv3.weight" in names and all(
        rename(name) or name.startswith(("head.", "norm.")) for name in names
    )


def rename(name: str) -> str | None:
    """The name of a parameter of timm's ResNetV2 in ours (``modeling/resnetv2.py``); None for the
    classifier, and for what ours does not have."""
    name = name.replace("stem.conv.", "stem.conv1.").replace(".downsample.conv.", ".shortcut.")
    if re.fullmatch(rf"stem\.{_LAYER}", name):
        return name
    if match := re.fullmatch(rf"stages\.(\d)\.blocks\.(\d+\.{_LAYER})", name):
        return f"res{int(match[1]) + 2}.{match[2]}"
    return None


def convert(state: Mapping[str, torch.Tensor]) -> Weights:
    """The norm in front of the classifier is left out with it."""
    renamed = {name: rename(name) for name in state}
    # With GN, timm has the stem of one convolution in Big Transfer's alone.
    big_transfer = "stem.conv.weight" in state
    batch_norm = any(name.endswith(".running_mean") for name in state)
    return Weights(
        "timm",
        {new: state[name] for name, new in renamed.items() if new},
        origin=Origin(
            input_format="RGB",
            pixel_mean=_HALF,
            pixel_std=_HALF,
            stride_in_1x1=False,
            weight_standardization="timm" if big_transfer and not batch_norm else "",
            num_groups=None if batch_norm else 32,
        ),
        left_out=[name for name, new in renamed.items() if new is None],
    )
