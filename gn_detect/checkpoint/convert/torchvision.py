"""ResNets in torchvision's layout, which most classifiers have: torchvision's own with
``norm_layer=partial(GroupNorm, 32)``, timm's ``resnet50_gn``, those of the authors of Weight
Standardization (github.com/joe-siyuan-qiao/pytorch-classification), and the backbones of
mmdetection, where norms are called ``gn1`` in place of ``bn1``."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch

from ..origin import IMAGENET, Origin
from .weights import Weights

# Conv and norm of a Detectron2 layer have one name: ``conv1.weight``, ``conv1.norm.weight``.
_RULES = [
    (r"conv1\.(\w+)", r"stem.conv1.\1"),
    (r"[bg]n1\.(\w+)", r"stem.conv1.norm.\1"),
    (r"layer(\d)\.(\d+)\.conv(\d)\.(\w+)", r"res{stage}.\2.conv\3.\4"),
    (r"layer(\d)\.(\d+)\.[bg]n(\d)\.(\w+)", r"res{stage}.\2.conv\3.norm.\4"),
    (r"layer(\d)\.(\d+)\.downsample\.0\.(\w+)", r"res{stage}.\2.shortcut.\3"),
    (r"layer(\d)\.(\d+)\.downsample\.1\.(\w+)", r"res{stage}.\2.shortcut.norm.\3"),
]


def recognizes(names: Collection[str]) -> bool:
    return "layer1.0.conv1.weight" in names


def rename(name: str) -> str | None:
    """The name of a parameter of torchvision's ResNet in Detectron2's; None for the classifier and
    for what Detectron2's ResNet does not have."""
    for pattern, new in _RULES:
        if match := re.fullmatch(pattern, name):
            stage = int(match[1]) + 1 if "{stage}" in new else 0
            return match.expand(new).replace("{stage}", str(stage))
    return None


def convert(state: Mapping[str, torch.Tensor]) -> Weights:
    """
    Raises:
        WeightsError: a variant of the ResNet that Detectron2 does not have.
    """
    renamed = {name: rename(name) for name in state}
    bottleneck = "layer1.0.conv3.weight" in state
    return Weights(
        "torchvision",
        {new: state[name] for name, new in renamed.items() if new},
        origin=Origin(**IMAGENET, stride_in_1x1=False if bottleneck else None),
        left_out=[name for name, new in renamed.items() if new is None],
    )
