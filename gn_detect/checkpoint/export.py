"""Weights as a file of their own, and a trained backbone in the layout of classifiers."""

from __future__ import annotations

import dataclasses
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
from .outputs import KINDS
from .safe_load import WeightsError
from .saving import to_safetensors, write_atomically

logger = logging.getLogger(__name__)


def write_weights(path: str, weights: Weights) -> None:
    """Write weights as ``.pth`` or ``.safetensors``, by the end of ``path``, and what is known of
    them. A file that exists is replaced.

    Raises:
        WeightsError, CheckpointError: the file cannot be written.
    """
    known = {"origin": dataclasses.asdict(weights.origin), **weights.progress}
    if weights.partial:
        known["matching_heuristics"] = True
    known |= {kind: names for kind in KINDS if (names := weights.names(kind))}
    if weights.batch_norms:  # which folded BN does not show, nor convolutions alone
        known["batch_norms"] = sorted(weights.batch_norms)
    config = weights.rest.get("config")
    texts = {"config": config} if isinstance(config, str) else {}
    _write(path, {"model": weights.state, **known, **texts}, weights.state, known, **texts)


def write_state_dict(path: str, state: Mapping[str, torch.Tensor]) -> None:
    """Write a state dict alone, for other libraries; otherwise as :func:`write_weights`."""
    _write(path, state, state, {})


def _write(path: str, content: Mapping, state: Mapping, known: Mapping, **texts: str) -> None:
    check_output(path)
    if path.endswith(".pth"):
        write_atomically(path, lambda f: torch.save(content, f))
    else:
        write_atomically(path, lambda f: f.write(to_safetensors(state, known, **texts)))


def check_output(path: str) -> None:
    """Make the folder of ``path``, if there is none.

    Raises:
        WeightsError: no weights can be written there.
    """
    folder = os.path.dirname(path) or "."
    if not path.endswith((".pth", ".safetensors")):
        raise WeightsError(f"{path}: weights are written as .pth or .safetensors; name it so")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise WeightsError(f"{path}: there is no folder {folder} ({error.strerror})") from None
    if os.path.isdir(path) or not os.access(folder, os.W_OK):
        raise WeightsError(f"{path} cannot be written: it is a folder, or in one that is read-only")


def export_backbone(weights: Weights, name: str) -> dict[str, torch.Tensor]:
    """The ResNet of a detector, or a classifier, in torchvision's names, which are timm's too.

    The result expects the input of torchvision's and timm's classifiers, RGB with ImageNet's mean
    and deviation, in any case: the order of the channels and the deviations of another input are
    folded into the first convolution. So is Weight Standardization into all of them. Without
    these, all weights are bit-equal to ours.

    Args:
        weights: of a detector, a backbone or a classifier, from the file ``name``.

    Raises:
        WeightsError: there is no ResNet in them, or torchvision's cannot compute the same.
    """
    backbone = {
        re.search(r"\b(stem|res\d)\..*", n)[0]: tensor
        for n, tensor in weights.state.items()
        if component_of(n) == BACKBONE and re.search(r"\b(stem|res\d)\.", n)
    }
    exported = {torchvision.original_name(n): tensor for n, tensor in backbone.items()}
    classifier = {n: t for n, t in weights.state.items() if n in ("linear.weight", "linear.bias")}
    exported |= {n.replace("linear", "fc"): tensor for n, tensor in classifier.items()}
    needed = ["conv1.weight", *(f"layer{stage}.0.conv1.weight" for stage in range(1, 5))]
    if lacking := [n for n in needed if n not in exported]:
        raise WeightsError(
            f"{name}: there is no whole ResNet in it (stem.conv1, res2 to res5), as "
            f"{', '.join(lacking)} would be lacking"
        )
    if None in exported:
        foreign = next(n for n in backbone if torchvision.original_name(n) is None)
        raise WeightsError(f"{name}: {foreign} has no place in torchvision's ResNet")
    origin = weights.origin
    known = (origin.input_format, origin.pixel_mean, origin.pixel_std)
    strides = "layer1.0.conv3.weight" in exported and origin.stride_in_1x1  # of bottleneck blocks
    if None in (*known, strides):
        raise WeightsError(
            f"{name} does not say what input it was trained with, and where its blocks stride; "
            "name its config with --config-file"
        )
    if strides:
        raise WeightsError(
            f"{name} strides in 1x1 convolutions, torchvision's and timm's ResNets in 3x3"
        )
    if variant := origin.weight_standardization:
        convs = [n for n, tensor in exported.items() if tensor.ndim == 4]
        exported.update({n: standardize_weight(exported[n], variant) for n in convs})
        logger.info(f"{len(convs)} convolutions are exported standardized ({variant})")
    if not any(n.endswith("running_mean") for n in exported):
        _say_groups(origin)
    exported["conv1.weight"] = _for_imagenet_input(exported["conv1.weight"], weights, name)
    return exported


def _say_groups(origin: Origin) -> None:
    """Warn where the groups are not the 32 that are usual."""
    count, channels = origin.num_groups, origin.channels_per_group
    if channels:
        norm = f"lambda channels: GroupNorm(channels // {channels}, channels)"
        logger.warning(f"it has {channels} channels per group: build norm_layer={norm}")
    elif count is None:
        logger.warning("it does not say its groups: build norm_layer with those of its config")
    elif count != 32:
        logger.warning(f"it has {count} groups: build norm_layer=partial(GroupNorm, {count})")


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
