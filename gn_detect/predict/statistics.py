"""Group Normalization by the statistics of another image than the one that is seen: a tile by those
of the whole.

GN takes mean and variance of what it is given, so that the output on a tile depends on where the
image was cut. Fixed ones make of each layer an affine map of each channel, as a frozen BN is one.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gn_detect.layers.padding import extents_of, mask_padding

# Layer -> mean and variance of each of its calls in a forward pass, in order: heads are shared by
# the levels of a pyramid. Each is a pair of (groups,) float32.
Statistics = dict[nn.GroupNorm, list[tuple[Tensor, Tensor]]]


def image_norms(model: nn.Module) -> list[nn.GroupNorm]:
    """The GN layers that see an image as a whole: all but those of the RoI heads, whose statistics
    are of one RoI, however the image was cut."""
    layers = model.named_modules()
    return [m for n, m in layers if isinstance(m, nn.GroupNorm) and not n.startswith("roi_heads.")]


@contextlib.contextmanager
def recorded_statistics(model: nn.Module) -> Iterator[Statistics]:
    """What :func:`image_norms` normalize by in the forward pass within it, which is of one image.

    Raises:
        ValueError: there are several images in a batch.
    """
    found: Statistics = {layer: [] for layer in image_norms(model)}

    def record(layer: nn.GroupNorm, inputs: tuple[Tensor, ...]) -> None:
        (x,) = inputs[:1]
        if len(x) != 1:
            raise ValueError(f"statistics are recorded of one image, not of {len(x)}")
        extents = extents_of(x) if getattr(layer, "mask_padding", False) else None
        (image,) = extents.crops(x) if extents else (x,)
        groups = image.detach().float().reshape(layer.num_groups, -1)
        var, mean = torch.var_mean(groups, dim=1, correction=0)
        found[layer].append((mean, var))

    handles = [layer.register_forward_pre_hook(record) for layer in found]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def fixed_statistics(statistics: Statistics) -> Iterator[None]:
    """Within it, the layers normalize each image by ``statistics``, in any number of whole forward
    passes, of any number of images. There are no gradients."""
    for layer, calls in statistics.items():
        # In the place of its forward, so that what follows it runs by itself (blocks.norm_act).
        layer.forward = functools.partial(_normalize, layer, itertools.cycle(calls))
    try:
        yield
    finally:
        for layer in statistics:
            del layer.forward


@torch.no_grad()
def _normalize(layer: nn.GroupNorm, calls: Iterator[tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    channels = layer.num_channels // layer.num_groups
    mean, var = (value.repeat_interleave(channels) for value in next(calls))
    y = F.batch_norm(x, mean, var, layer.weight, layer.bias, eps=layer.eps)
    return mask_padding(y) if getattr(layer, "mask_padding", False) else y
