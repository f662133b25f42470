"""Weights as a file of their own, and a trained backbone in the layout of classifiers."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Mapping

import torch

from gn_detect.layers import standardize_weight

from .convert import torchvision
from .convert.weights import Weights
from .coverage import BACKBONE, component_of
from .origin import IMAGENET, Origin, same
from .safe_load import WeightsError
from .saving import to_safetensors, write_atomically

logger = logging.getLogger(__name__)


def write_weights(
    path: str,
    state: Mapping[str, torch.Tensor],
    origin: Origin | None = None,
    partial: bool = False,
) -> None:
    """Write weights as ``.pth`` or ``.safetensors``, by the end of ``path``.

    Args:
        path: of the file, which is replaced if it exists.
        state: name -> tensor.
        origin: saved with them; None for weights that are to leave Detectron2, which are saved as
            a bare state dict.
        partial: of :class:`Weights`; Detectron2 calls it ``matching_heuristics``.

    Raises:
        WeightsError: ``path`` has another end.
        CheckpointError: the file cannot be written.
    """
    check_extension(path)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    known = {"origin": dataclasses.asdict(origin)} if origin else {}
    if partial:
        known["matching_heuristics"] = True
    if path.endswith(".pth"):
        content = {"model": state, **known} if origin else state
        write_atomically(path, lambda f: torch.save(content, f))
    else:
        metadata = {f"gn_detect.{key}": json.dumps(value) for key, value in known.items()}
        data = to_safetensors(state, {"format": "pt", **metadata})
        write_atomically(path, lambda f: f.write(data))


def check_extension(path: str) -> None:
    """
    Raises:
        WeightsError: :func:`write_weights` does not write files of this name.
    """
    if not path.endswith((".pth", ".safetensors")):
        raise WeightsError(f"{path}: weights are written as .pth or .safetensors; name it so")


def export_backbone(weights: Weights, name: str) -> dict[str, torch.Tensor]:
    """The ResNet of a detector in torchvision's names, which are timm's too.

    The result expects the input of torchvision's and timm's classifiers, RGB with ImageNet's mean
    and deviation, in any case: the order of the channels and the deviations of another input are
    folded into the first convolution. So is Weight Standardization into all of them. Without
    these, all weights are bit-equal to ours.

    Args:
        weights: of a detector or a backbone.
        name: of their file, for messages.

    Raises:
        WeightsError: there is no ResNet in them, or torchvision's cannot compute the same.
    """
    backbone = {
        re.search(r"\b(stem|res\d)\..*", n)[0]: tensor
        for n, tensor in weights.state.items()
        if component_of(n) == BACKBONE and re.search(r"\b(stem|res\d)\.", n)
    }
    exported = {torchvision.original_name(n): tensor for n, tensor in backbone.items()}
    if "conv1.weight" not in exported:
        raise WeightsError(f"{name}: there is no ResNet in it whose stem is stem.conv1")
    if None in exported:
        foreign = next(n for n in backbone if torchvision.original_name(n) is None)
        raise WeightsError(f"{name}: {foreign} has no place in torchvision's ResNet")
    origin = weights.origin
    bottleneck = "layer1.0.conv3.weight" in exported
    if None in (origin.input_format, origin.pixel_mean, origin.pixel_std) or (
        bottleneck and origin.stride_in_1x1 is None
    ):
        raise WeightsError(
            f"{name} does not say what input it was trained with, and where its blocks stride; "
            "name its config with --config-file"
        )
    if bottleneck and origin.stride_in_1x1:
        raise WeightsError(
            f"{name} strides in 1x1 convolutions, torchvision's and timm's ResNets in 3x3"
        )
    variant = origin.weight_standardization
    if variant:
        convs = [n for n, tensor in exported.items() if tensor.ndim == 4]
        exported.update({n: standardize_weight(exported[n], variant) for n in convs})
        logger.info(f"{len(convs)} convolutions are exported standardized ({variant})")
    groups = origin.num_groups
    if groups not in (None, 32):
        logger.warning(f"it has {groups} groups: build norm_layer=partial(GroupNorm, {groups})")
    exported["conv1.weight"] = _for_imagenet_input(exported["conv1.weight"], weights, name)
    return exported


def _for_imagenet_input(conv: torch.Tensor, weights: Weights, name: str) -> torch.Tensor:
    """The first convolution, (out, 3, kh, kw), for (RGB - mean) / deviation of ImageNet."""
    origin, mean, std = weights.origin, IMAGENET["pixel_mean"], IMAGENET["pixel_std"]
    flip = -1 if origin.input_format == "BGR" else 1
    if not same(origin.pixel_mean[::flip], mean):
        raise WeightsError(
            f"{name} was trained with the pixel mean {list(origin.pixel_mean)}; only ImageNet's, "
            "which torchvision and timm subtract, can be exported"
        )
    if flip == -1:
        conv = conv.flip(1)
        logger.info("the channels of the first convolution are exported in the order RGB")
    if not same(origin.pixel_std[::flip], std):
        factors = torch.tensor(std) / torch.tensor(origin.pixel_std[::flip])
        conv = conv * factors.view(1, 3, 1, 1)
        logger.info("the first convolution is scaled for pixels divided by ImageNet's deviation")
    return conv
