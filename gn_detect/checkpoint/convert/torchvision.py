"""ResNets in torchvision's layout, which most classifiers have: torchvision's own with
``norm_layer=partial(GroupNorm, 32)``, timm's ``resnet50_gn``, those of the authors of Weight
Standardization (github.com/joe-siyuan-qiao/pytorch-classification), the backbones of mmdetection,
where norms are called ``gn1`` in place of ``bn1``, and those in torchvision's own detectors. Those
of github.com/chengyangfu/pytorch-groupnormalization have one gamma and beta for each group."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch

from ..origin import IMAGENET, Origin, only
from ..safe_load import WeightsError
from .weights import Weights

_PREFIXES = ("", "backbone.", "backbone.body.")  # mmpretrain's, and that of torchvision's detectors
_NOT_RESNET = ("fc.", "head.", "classifier.", "last_linear.")

# In torchvision, and in Detectron2, where conv and norm of a layer share a name. {s}, {b} and {c}
# are the numbers of stage (one more in Detectron2), block and convolution, {p} the parameter.
_NAMES = [
    ("conv1.{p}", "stem.conv1.{p}"),
    ("bn1.{p}", "stem.conv1.norm.{p}"),
    ("layer{s}.{b}.conv{c}.{p}", "res{s}.{b}.conv{c}.{p}"),
    ("layer{s}.{b}.bn{c}.{p}", "res{s}.{b}.conv{c}.norm.{p}"),
    ("layer{s}.{b}.downsample.0.{p}", "res{s}.{b}.shortcut.{p}"),
    ("layer{s}.{b}.downsample.1.{p}", "res{s}.{b}.shortcut.norm.{p}"),
]
_FIELDS = {"s": r"(?P<s>\d)", "b": r"(?P<b>\d+)", "c": r"(?P<c>\d)", "p": r"(?P<p>\w+)"}


def _translate(name: str, old: int, new: int) -> str | None:
    for names in _NAMES:
        if match := re.fullmatch(names[old].replace(".", r"\.").format(**_FIELDS), name):
            fields = match.groupdict()
            if "s" in fields:
                fields["s"] = int(fields["s"]) + new - old
            return names[new].format(**fields)
    return None


def recognizes(names: Collection[str]) -> bool:
    return any(f"{prefix}layer1.0.conv1.weight" in names for prefix in _PREFIXES)


def rename(name: str) -> str | None:
    """The name of a parameter of torchvision's ResNet in Detectron2's; None for the classifier and
    for what Detectron2's ResNet does not have."""
    return _translate(re.sub(r"\bgn(?=\d\.)", "bn", name), 0, 1)


def original_name(name: str) -> str | None:
    """The inverse of :func:`rename`; None for what torchvision's ResNet does not have."""
    return _translate(name, 1, 0)


def convert(state: Mapping[str, torch.Tensor], classifier: bool = False) -> Weights:
    """
    Args:
        classifier: take the last layer, too (``fc``, in Detectron2 ``linear``).

    Raises:
        WeightsError: a variant of the ResNet that Detectron2 does not have.
    """
    prefix = next(p for p in _PREFIXES if f"{p}layer1.0.conv1.weight" in state)
    others = [name for name in state if not name.startswith(prefix)]
    state = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    renamed = {name: rename(name) for name in state}
    if classifier:
        renamed |= {n: n.replace("fc", "linear") for n in ("fc.weight", "fc.bias") if n in state}
    left_out = [name for name, new in renamed.items() if new is None]
    if foreign := [name for name in left_out if not name.startswith(_NOT_RESNET)]:
        raise WeightsError(
            f"{foreign[0]} has no place in Detectron2's ResNet: of the variants of this layout, "
            "only the original one is supported (no deep stem, average pooling or attention)"
        )
    bottleneck = "layer1.0.conv3.weight" in state
    # mmdetection has backbones of several origins, with the names gn1, gn2, gn3.
    known = {} if "gn1.weight" in state else IMAGENET
    converted = {new: state[name] for name, new in renamed.items() if new}
    channels = _channels_per_group(converted)
    for name, value in converted.items() if channels else ():
        if re.search(r"\.norm\.(weight|bias)$", name):
            converted[name] = value.repeat_interleave(channels)
    return Weights(
        "torchvision",
        converted,
        origin=Origin(
            **known, stride_in_1x1=False if bottleneck else None, channels_per_group=channels
        ),
        left_out=[*(prefix + name for name in left_out), *others],
    )


def _channels_per_group(state: Mapping[str, torch.Tensor]) -> int | None:
    """Of norms with a gamma for each group; None where they have one for each channel."""
    gammas = {n: len(value) for n, value in state.items() if n.endswith(".norm.weight")}
    outputs = {n: len(state[n.replace(".norm.", ".")]) for n in gammas}
    channels = only(outputs[n] // count for n, count in gammas.items())
    return channels if channels and channels > 1 else None
