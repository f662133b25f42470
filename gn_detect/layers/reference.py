"""Group Normalization by PyTorch's operations."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import recompute


def reference(x, weight, bias, residual, num_groups, eps, activation, extents=None) -> Tensor:
    """Any device and dtype, differentiable twice, exported as it is."""
    # Each image of a padded batch alone is less work than sums over all with a mask.
    maps = [x] if extents is None else extents.crops(x)
    normalize = functools.partial(_normalize, num_groups, eps, extents)
    # In place, as Detectron2's blocks do: GN does not keep its output.
    act = F.relu_ if activation else (lambda y: y)
    y = normalize(weight, bias, *maps)
    if residual is not None:
        return act(y.add_(residual))
    # Before the ReLU, which keeps its output
    again, inputs = lambda *inputs: act(normalize(*inputs)), (weight, bias, *maps)
    recompute.offer(y, again, inputs, in_place_operations=activation is not None)
    return act(y)


def _normalize(num_groups, eps, extents, weight, bias, *maps) -> Tensor:
    with _without_autocast(maps[0].device.type):
        found = [_group_norm(x, num_groups, weight, bias, eps) for x in maps]
    return found[0] if extents is None else extents.join(found)


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def _group_norm(x, num_groups, weight, bias, eps) -> Tensor:
    """``F.group_norm`` for all dtypes."""
    # Its check for groups of one value would warn in a trace.
    normalize = torch.group_norm if torch.jit.is_tracing() else F.group_norm
    dtypes = {p.dtype for p in (x, weight, bias) if p is not None}
    affine = weight is not None and bias is not None
    # PyTorch's kernel of the CPU mixes these, and else none.
    mixes = affine and x.device.type == "cpu" and x.dtype.itemsize == 2
    if len(dtypes) == 1 or (mixes and weight.dtype == bias.dtype == torch.float32):
        return normalize(x, num_groups, weight, bias, eps)
    dtype = functools.reduce(torch.promote_types, dtypes)
    weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
    return normalize(x.to(dtype), num_groups, weight, bias, eps).to(x.dtype)


def deviation(
    names: Iterable[str], found: Iterable[Tensor], expected: Iterable[Tensor], dtype: torch.dtype
) -> str:
    """Which result of others, on maps of ``dtype``, is wrong, as it is off by more than 1e-4 + 2
    units in the last place, of the largest value in float64; "" if none is."""
    tolerance = 1e-4 + 2 * torch.finfo(dtype).eps
    for name, a, b in zip(names, found, expected, strict=True):
        off, largest = (t.abs().max().item() for t in (a.double() - b, b))
        if not off <= tolerance * largest:  # NaN, too
            return f"the {name} is off by {off:.2g}, where its largest value is {largest:.2g}"
    return ""
