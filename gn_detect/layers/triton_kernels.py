"""GroupNorm + residual + ReLU on CUDA devices by Triton kernels, forward and backward.

    forward   y = relu((x - mean) * rstd * gamma + beta + residual)
    backward  dz = dy where y > 0;  dbeta = sum dz;  dgamma = sum dz * xhat
              dx = rstd * (gamma * dz - E[gamma * dz] - xhat * E[gamma * dz * xhat])
              with xhat = (x - mean) * rstd and E over the elements of a group

NCHW and channels_last tensors take one of two ways (``plan`` decides). Where a group fits into the
registers of a program (maps of RoIs) it is *resident*: read once, everything done. Otherwise the
work is *split*: programs of a first kernel each sum over some of the pixels, and those of a second
kernel add up the partial sums of their groups and write the result. (Of the many partial sums that
the few groups of a LayerNorm have, each would read more than of the map: these PyTorch adds up in
between.) The second kernel walks backwards through memory, to begin with what the first has left in
the L2 cache. Nothing is added atomically, all sums have a fixed order: runs are identical bit for
bit.

The variance is that of x minus a value near the mean of its group (resident: of x minus the mean),
so a large mean costs no digits. All arithmetic is float32. The ReLU mask is found from x by the
expression, rounding included, that made y, or read from y where a residual was added.

Of images that were padded to one size, ``valid`` (N, 2), int32, on the device of x, has the rows
and columns of each map that are image (``padding.Extents.tensor``), from 1 to H or W. The rest is
in no sum; y is 0 there, whatever x and the residual are, and so are dx and, with ReLU, the gradient
of the residual. Little of the rest is read.
"""

import contextlib
import functools
import math

import torch
import triton
from torch import Tensor

from . import triton_device as device
from .triton_launch import launch
from .triton_plan import Plan, plan

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by dimensions


def forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = False,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """GroupNorm, then plus ``residual``, then ReLU.

    Args:
        x: (N, C, *), contiguous or channels_last, float32, bfloat16 or float16.
        num_groups: G, divides C.
        weight, bias: gamma and beta (C,), float32 or x's dtype, or None.
        eps: added to the variance.
        residual: shape of x, any of the three dtypes, any layout, or None.
        relu: apply ReLU at the end.
        valid: of maps (N, C, H, W), what of each is image; None: all.

    Returns:
        y in shape, dtype and layout of x; mean and 1 / sqrt(variance + eps), float32 (N, G).
    """
    mean, rstd = (_floats(x, x.shape[0], num_groups) for _ in range(2))
    return _forward(x, mean, rstd, weight, bias, eps, residual, relu, valid, False), mean, rstd


def apply(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, relu: bool,
    valid: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The y of ``forward`` without residual, bit for bit, from the statistics that it returned."""
    return _forward(x, mean, rstd, weight, bias, 0.0, None, relu, valid, True)


def backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool = False,
    residual_dtype: torch.dtype | None = None,
    needs: tuple[bool, bool, bool, bool] = (True, True, True, True),
    valid: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``forward``.

    Args:
        dy: gradient of y, any layout, expanded too.
        x, mean, rstd, weight, bias, relu: as given to and by ``forward``.
        y: the output of ``forward``; used (and required) only with a residual and ReLU.
        residual_dtype: dtype of the residual; None if there was none.
        needs: which of the gradients of x, weight, bias and residual to compute.
        valid: as given to ``forward``. The gradient of y may be anything in the padding.

    Returns:
        Gradients of x, weight, bias and residual, each of the dtype of what it is for, or None.
        dx has the layout of x, the residual's gradient that of x, or without ReLU that of dy.

    Raises:
        ValueError: ``y`` is missing where it is needed.
    """
    needs_weight, needs_bias = needs[1] and weight is not None, needs[2] and bias is not None
    needs_residual = needs[3] and residual_dtype is not None
    if not relu or residual_dtype is None:
        y = None  # the mask is found from x
    elif y is None:
        raise ValueError("after a residual, the gradient of ReLU needs y, the output of forward")
    dz = torch.empty_like(x, dtype=residual_dtype) if needs_residual and relu else None
    dresidual = dy.to(residual_dtype) if needs_residual and not relu else dz
    dx = torch.empty_like(x) if needs[0] else None
    sums = None
    if x.numel() == 0:
        sums = torch.zeros((1, 2, x.shape[1]), dtype=torch.float32, device=x.device)
    elif dx is not None or needs_weight or needs_bias or dz is not None:
        dy = dy.contiguous(memory_format=_layout(x))
        wants_sums = needs_weight or needs_bias
        with _current(x):
            sums = _backward(dy, x, y, mean, rstd, weight, bias, relu, dz, dx, wants_sums, valid)
    # In an order that depends on nothing but the shape
    total = sums.sum(0) if needs_weight or needs_bias else None
    dbias = total[0].to(bias.dtype) if needs_bias else None
    dweight = total[1].to(weight.dtype) if needs_weight else None
    return dx, dweight, dbias, dresidual


def _forward(x, mean, rstd, weight, bias, eps, residual, relu, valid, known):
    y = torch.empty_like(x)
    if x.numel() == 0:
        if not known:
            mean.zero_()
            rstd.zero_()
        return y
    if residual is not None:
        residual = residual.contiguous(memory_format=_layout(x))
    how, n, c, g, size, tile = _described(x, mean, valid)
    with _current(x):
        if how.resident:
            launch(
                device.resident, n * triton.cdiv(g, how.groups), how.warps,
                x, residual, weight, bias, y, mean, rstd, valid, eps, *size, g, known, relu,
                c // g, *tile,
            )  # fmt: skip
            return y
        rows, sizes, part = n * triton.cdiv(c, how.block), (*size, c, c // g, how.block), None
        if not known:
            part = _floats(x, n * g, 3, how.pairs)
            launch(
                device.statistics, rows * how.splits, how.warps,
                x, part, valid, *sizes, how.splits, how.pairs, how.split_iters, *tile,
            )  # fmt: skip
        part, pairs, lanes = _reduced(part, how)
        launch(
            device.apply, rows * how.chunks, how.warps,
            x, residual, weight, bias, y, part, mean, rstd, valid, eps, *sizes, how.chunks,
            pairs, how.chunk_iters, relu, *tile, lanes,
        )  # fmt: skip
    return y


def _backward(dy, x, y, mean, rstd, weight, bias, relu, dz, dx, wants_sums, valid):
    """Fills dz and dx; returns the sums of dz and dz * xhat (anything, 2, C), if wanted."""
    how, n, c, g, size, tile = _described(x, mean, valid)
    sums = _floats(x, n * how.splits, 2, c) if wants_sums else None
    if how.resident:
        launch(
            device.resident_gradient, n * triton.cdiv(g, how.groups), how.warps,
            dy, x, y, weight, bias, mean, rstd, dz, sums, dx, valid, *size, g, relu,
            c // g, *tile,
        )  # fmt: skip
        return sums
    rows, sizes = n * triton.cdiv(c, how.block), (*size, c, c // g, how.block)
    part = None if dx is None else _floats(x, n * g, 3, how.pairs)
    # Two accumulators and up to three tensors: half a tile leaves registers to more programs. One
    # of less than an access of padded maps does not compile (Triton 3.6).
    shrink = 2 if how.pixels > how.vec else 1
    launch(
        device.gradient_sums, rows * how.splits, how.warps,
        dy, x, y, weight, bias, mean, rstd, dz, part, sums, valid, *sizes, how.splits,
        how.pairs, how.split_iters * shrink, relu, *tile[:-1], how.pixels // shrink,
    )  # fmt: skip
    if dx is not None:
        if dz is not None and dz.dtype == dy.dtype:
            dy, y, relu = dz, None, False  # one tensor to read instead of two
        part, pairs, lanes = _reduced(part, how)
        launch(
            device.gradient, rows * how.chunks, how.warps,
            dy, x, y, weight, bias, mean, rstd, part, dx, valid, *sizes, how.chunks,
            pairs, how.chunk_iters, relu, *tile, lanes,
        )  # fmt: skip
    return sums


def _reduced(part: Tensor | None, how: Plan) -> tuple[Tensor | None, int, int]:
    """Partial sums as the second kernel gets them, how many of a group, and lanes for these."""
    if not how.reduced:
        return part, how.pairs, how.pair_lanes
    return part if part is None else part.sum(2), 1, 32


def _described(x: Tensor, mean: Tensor, valid: Tensor | None) -> tuple:
    """The plan, N, C, G, the size of maps (HWV, W), and what describes tiles to all kernels."""
    (n, c, *sizes), g, nhwc = x.shape, mean.shape[1], not x.is_contiguous()
    hw = math.prod(sizes)
    how = plan(nhwc, n, c, g, hw, _processors(x.device))
    size = hw // how.vec, None if valid is None else sizes[1]
    return how, n, c, g, size, (nhwc, how.vec, how.groups, how.lanes, how.pixels)


def _floats(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def dense(x: Tensor) -> Tensor:
    """x in one of the two layouts that the kernels take, a copy if it has none."""
    if x.is_contiguous():
        return x
    last = CHANNELS_LAST.get(x.dim(), torch.contiguous_format)
    return x.contiguous(memory_format=last if x.stride(1) == 1 else torch.contiguous_format)


def _layout(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else CHANNELS_LAST[x.dim()]


def _current(x: Tensor):
    """Triton launches on the current device: makes it that of x."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


@functools.lru_cache
def _processors(device: torch.device) -> int:
    """Multiprocessors; those of an H100 or H200 where the kernels are interpreted."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count
