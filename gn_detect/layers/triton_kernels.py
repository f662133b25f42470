"""Triton kernels of GroupNorm + residual + ReLU, forward and backward, NCHW and channels_last.

    forward   y = relu((x - mean) * rstd * gamma + beta + residual)
    backward  dz = dy where y > 0;  db = sum dz;  dg = sum dz * xhat;  xhat = (x - mean) * rstd
              dx = rstd * (gamma * dz - E[gamma * dz] - xhat * E[gamma * dz * xhat]), E per group

A tensor takes one of two ways through the GPU (``plan`` decides). Where a group fits into registers
(maps of RoIs) it is *resident*: one program reads it once and does everything. Otherwise the work
is *split*: programs of a first kernel each sum over some pixels of some channels, and programs of a
second kernel add up the partial sums of their group, always in the same order, and write the
result. The second kernel walks backwards, to begin with what the first has left in the L2 cache.
Nothing is added atomically: runs are identical bit for bit.

The variance is that of x minus the first element of its group (of x minus the mean where the group
is resident), so a large mean costs no digits. All arithmetic is float32. The ReLU mask is found
from x by the very expression, rounding included, that made y, or read from y where a residual was
added.

Kernels have a tile of P pixels x CB channels (``lane``), of which ``block`` are used; NCHW has one
channel per program. ``S`` programs share the pixels of a channel, each doing ``iters`` tiles. H * W
is passed as ``HWV * VEC``: only a constant factor tells the compiler that rows of, say, 4200
elements may be read 8 at a time (it looks at divisibility by 16 alone).
"""

import contextlib
import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RESIDENT = 8192  # elements of the largest tile that is kept in registers


@triton.jit
def _locate(C, block, S, REVERSE: tl.constexpr, NHWC: tl.constexpr):
    """The image, the first channel and the part of the pixels of this program, in memory order."""
    pid = tl.program_id(0)
    if REVERSE:
        pid = tl.num_programs(0) - 1 - pid
    blocks = (C + block - 1) // block
    if NHWC:
        return pid // blocks // S, pid % blocks * block, pid // blocks % S
    return pid // S // blocks, pid // S % blocks * block, pid % S


@triton.jit
def _over_group(v, group, GB: tl.constexpr):
    """Sums of the channels (1, CB) over groups, for every channel; (1, 1) if all are of one."""
    if GB == 1:
        return tl.sum(v, axis=1, keep_dims=True)
    return tl.sum(tl.where(tl.trans(group) == group, tl.trans(v), 0.0), axis=0, keep_dims=True)


@triton.jit
def _partial(part, row, valid, R, RP: tl.constexpr):
    """The two sums of the groups ``row`` from their R pairs in ``part`` (N * G, 2, R)."""
    r = tl.arange(0, RP)[:, None]
    mask = (r < R) & valid
    part += row * 2 * R + r
    first = tl.load(part, mask=mask, other=0.0)
    second = tl.load(part + R, mask=mask, other=0.0)
    return tl.sum(first, axis=0, keep_dims=True), tl.sum(second, axis=0, keep_dims=True)


@triton.jit
def _affine(weight, bias, c, valid):
    """gamma and beta of channels ``c``, 1 and 0 where there are none."""
    gamma = 1.0
    beta = 0.0
    if weight is not None:
        gamma = tl.load(weight + c, mask=valid, other=0.0).to(tl.float32)
    if bias is not None:
        beta = tl.load(bias + c, mask=valid, other=0.0).to(tl.float32)
    return gamma, beta


@triton.jit
def _mask_gradient(dy, z):
    """dy where z, the input or the output of the ReLU, is above 0, or NaN, as in PyTorch."""
    return tl.where(z <= 0.0, 0.0, dy)


@triton.jit
def _statistics(
    x, part, HWV, C, D, block, S, iters,
    NHWC: tl.constexpr, VEC: tl.constexpr, GB: tl.constexpr, CB: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Sums of x - k and of its square over this program's pixels, into ``part`` (N * G, 2, R)."""
    n, c0, s = _locate(C, block, S, False, NHWC)
    HW = HWV * VEC
    pixel_stride = C if NHWC else 1
    channel_stride = 1 if NHWC else HW
    lane = tl.arange(0, CB)[None, :]
    first = tl.arange(0, CB if GB > 1 else 1)[None, :]  # as lane, or one lane if all are one group
    group = (c0 + first) // D
    valid = (lane < block) & (c0 + lane < C)
    image = n.to(tl.int64) * C * HW
    k = tl.load(
        x + image + group.to(tl.int64) * D * channel_stride,
        mask=(first < block) & (c0 + first < C),
        other=0.0,
    ).to(tl.float32)
    start = s * iters * P
    pixel = tl.arange(0, P)[:, None]
    x += image + c0.to(tl.int64) * channel_stride + start.to(tl.int64) * pixel_stride
    tile = pixel * pixel_stride + lane
    sum1 = tl.full([P, CB], 0.0, tl.float32)
    sum2 = tl.full([P, CB], 0.0, tl.float32)
    for i in range(iters):
        mask = (pixel < HW - (start + i * P)) & valid
        v = tl.load(x + tile, mask=mask, other=0.0).to(tl.float32)
        v = tl.where(mask, v - k, 0.0)
        sum1 += v
        sum2 += v * v
        x += P * pixel_stride
    sum1 = _over_group(tl.sum(sum1, axis=0, keep_dims=True), group, GB)
    sum2 = _over_group(tl.sum(sum2, axis=0, keep_dims=True), group, GB)
    R = S if NHWC else D * S
    part += (n.to(tl.int64) * (C // D) + group) * 2 * R + c0 % D * S + s
    lead = (first % D == 0) & (first < block) & (c0 + first < C)
    tl.store(part, sum1, mask=lead)
    tl.store(part + R, sum2, mask=lead)


@triton.jit
def _apply(
    x, residual, weight, bias, y, part, mean, rstd, eps, HWV, C, D, block, S, splits, iters,
    RELU: tl.constexpr, NHWC: tl.constexpr, VEC: tl.constexpr,
    GB: tl.constexpr, CB: tl.constexpr, P: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """y from x. The statistics come from ``part`` and go to mean, rstd; without ``part`` they are
    read there. ``splits`` is the S of ``_statistics``."""
    n, c0, s = _locate(C, block, S, True, NHWC)
    HW = HWV * VEC
    pixel_stride = C if NHWC else 1
    channel_stride = 1 if NHWC else HW
    lane = tl.arange(0, CB)[None, :]
    first = tl.arange(0, CB if GB > 1 else 1)[None, :]
    group = (c0 + first) // D
    valid = (lane < block) & (c0 + lane < C)
    known = (first < block) & (c0 + first < C)
    image = n.to(tl.int64) * C * HW
    row = n.to(tl.int64) * (C // D) + group
    gamma, beta = _affine(weight, bias, c0 + lane, valid)
    if part is not None:
        k = tl.load(x + image + group.to(tl.int64) * D * channel_stride, mask=known, other=0.0).to(
            tl.float32
        )
        sum1, sum2 = _partial(part, row, known, splits if NHWC else D * splits, RP)
        scale = 1.0 / (HW * D)
        shift = sum1 * scale
        m = k + shift
        var = sum2 * scale - shift * shift
        r = tl.rsqrt(tl.where(var < 0.0, 0.0, var) + eps)  # a maximum would drop NaN
        if s == 0:
            lead = known & ((c0 + first) % D == 0)
            tl.store(mean + row, m, mask=lead)
            tl.store(rstd + row, r, mask=lead)
    else:
        m = tl.load(mean + row, mask=known, other=0.0)
        r = tl.load(rstd + row, mask=known, other=0.0)
    a = r * gamma
    start = s * iters * P
    pixel = tl.arange(0, P)[:, None]
    tile = pixel * pixel_stride + lane
    base = image + c0.to(tl.int64) * channel_stride + start.to(tl.int64) * pixel_stride
    for i in range(iters):
        mask = (pixel < HW - (start + i * P)) & valid
        z = tl.fma(tl.load(x + base + tile, mask=mask, other=0.0).to(tl.float32) - m, a, beta)
        if residual is not None:
            z += tl.load(residual + base + tile, mask=mask, other=0.0).to(tl.float32)
        if RELU:
            z = tl.where(z < 0.0, 0.0, z)
        tl.store(y + base + tile, z, mask=mask)
        base += P * pixel_stride


@triton.jit
def _gradient_sums(
    dy, x, y, weight, bias, mean, rstd, dz, part, sums, HWV, C, D, block, S, iters,
    RELU: tl.constexpr, NHWC: tl.constexpr, VEC: tl.constexpr,
    GB: tl.constexpr, CB: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Sums of dz and dz * xhat over this program's pixels: per channel into ``sums`` (N, S, 2, C),
    times gamma and per group into ``part`` (N * G, 2, R). Either may be None. Writes dz if given.
    """
    n, c0, s = _locate(C, block, S, False, NHWC)
    HW = HWV * VEC
    pixel_stride = C if NHWC else 1
    channel_stride = 1 if NHWC else HW
    lane = tl.arange(0, CB)[None, :]
    first = tl.arange(0, CB if GB > 1 else 1)[None, :]
    group = (c0 + first) // D
    valid = (lane < block) & (c0 + lane < C)
    known = (first < block) & (c0 + first < C)
    row = n.to(tl.int64) * (C // D) + group
    gamma, beta = _affine(weight, bias, c0 + lane, valid)
    m = tl.load(mean + row, mask=known, other=0.0)
    r = tl.load(rstd + row, mask=known, other=0.0)
    a = r * gamma
    start = s * iters * P
    pixel = tl.arange(0, P)[:, None]
    tile = pixel * pixel_stride + lane
    base = n.to(tl.int64) * C * HW + c0.to(tl.int64) * channel_stride
    base += start.to(tl.int64) * pixel_stride
    sum1 = tl.full([P, CB], 0.0, tl.float32)
    sum2 = tl.full([P, CB], 0.0, tl.float32)
    for i in range(iters):
        mask = (pixel < HW - (start + i * P)) & valid
        v = tl.load(x + base + tile, mask=mask, other=0.0)
        g = tl.load(dy + base + tile, mask=mask, other=0.0).to(tl.float32)
        d = v.to(tl.float32) - m
        if RELU:
            if y is not None:
                g = _mask_gradient(g, tl.load(y + base + tile, mask=mask, other=0.0))
            else:
                g = _mask_gradient(g, tl.fma(d, a, beta).to(v.dtype))
        if dz is not None:
            tl.store(dz + base + tile, g, mask=mask)
        sum1 += g
        sum2 += g * d
        base += P * pixel_stride
    sum1 = tl.sum(sum1, axis=0, keep_dims=True)
    sum2 = tl.sum(sum2, axis=0, keep_dims=True) * r
    if sums is not None:
        sums += (n.to(tl.int64) * S + s) * 2 * C + c0 + lane
        tl.store(sums, sum1, mask=valid)
        tl.store(sums + C, sum2, mask=valid)
    if part is not None:
        R = S if NHWC else D * S
        part += row * 2 * R + c0 % D * S + s
        lead = known & (first % D == 0)
        tl.store(part, _over_group(sum1 * gamma, group, GB), mask=lead)
        tl.store(part + R, _over_group(sum2 * gamma, group, GB), mask=lead)


@triton.jit
def _gradient(
    dy, x, y, weight, bias, mean, rstd, part, dx, HWV, C, D, block, S, splits, iters,
    RELU: tl.constexpr, NHWC: tl.constexpr, VEC: tl.constexpr,
    GB: tl.constexpr, CB: tl.constexpr, P: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """dx from ``part``, the sums of ``_gradient_sums``, whose S is ``splits``."""
    n, c0, s = _locate(C, block, S, True, NHWC)
    HW = HWV * VEC
    pixel_stride = C if NHWC else 1
    channel_stride = 1 if NHWC else HW
    lane = tl.arange(0, CB)[None, :]
    first = tl.arange(0, CB if GB > 1 else 1)[None, :]
    group = (c0 + first) // D
    valid = (lane < block) & (c0 + lane < C)
    known = (first < block) & (c0 + first < C)
    row = n.to(tl.int64) * (C // D) + group
    gamma, beta = _affine(weight, bias, c0 + lane, valid)
    m = tl.load(mean + row, mask=known, other=0.0)
    r = tl.load(rstd + row, mask=known, other=0.0)
    sum1, sum2 = _partial(part, row, known, splits if NHWC else D * splits, RP)
    a = r * gamma
    shift = -r * sum1 / (HW * D)
    slope = -r * r * sum2 / (HW * D)
    start = s * iters * P
    pixel = tl.arange(0, P)[:, None]
    tile = pixel * pixel_stride + lane
    base = n.to(tl.int64) * C * HW + c0.to(tl.int64) * channel_stride
    base += start.to(tl.int64) * pixel_stride
    for i in range(iters):
        mask = (pixel < HW - (start + i * P)) & valid
        v = tl.load(x + base + tile, mask=mask, other=0.0)
        g = tl.load(dy + base + tile, mask=mask, other=0.0).to(tl.float32)
        d = v.to(tl.float32) - m
        if RELU:
            if y is not None:
                g = _mask_gradient(g, tl.load(y + base + tile, mask=mask, other=0.0))
            else:
                g = _mask_gradient(g, tl.fma(d, a, beta).to(v.dtype))
        tl.store(dx + base + tile, tl.fma(g, a, tl.fma(d, slope, shift)), mask=mask)
        base += P * pixel_stride


@triton.jit
def _resident_tile(
    G, HW, D: tl.constexpr, NHWC: tl.constexpr, GB: tl.constexpr, DP: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """Image and groups of this program, and channels, offsets and mask of its tile: GB x DP x P, or
    P x GB x DP for NHWC."""
    blocks = (G + GB - 1) // GB
    n = tl.program_id(0) // blocks
    g = tl.program_id(0) % blocks * GB + tl.arange(0, GB)
    if NHWC:
        g = g[None, :, None]
        d = tl.arange(0, DP)[None, None, :]
        p = tl.arange(0, P)[:, None, None]
        offset = p * (G * D) + g * D + d
    else:
        g = g[:, None, None]
        d = tl.arange(0, DP)[None, :, None]
        p = tl.arange(0, P)[None, None, :]
        offset = (g * D + d) * HW + p
    valid = (g < G) & (d < D)
    return n.to(tl.int64), g, g * D + d, valid, offset, valid & (p < HW)


@triton.jit
def _resident(
    x, residual, weight, bias, y, mean, rstd, eps, HWV, G, KNOWN: tl.constexpr,
    RELU: tl.constexpr, D: tl.constexpr, NHWC: tl.constexpr, VEC: tl.constexpr,
    GB: tl.constexpr, DP: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """y, mean and rstd of GB whole groups. If KNOWN, mean and rstd are read instead."""
    HW = HWV * VEC
    n, g, c, valid, offset, mask = _resident_tile(G, HW, D, NHWC, GB, DP, P)
    pixels: tl.constexpr = 0 if NHWC else 2
    channels: tl.constexpr = 2 if NHWC else 1
    gamma, beta = _affine(weight, bias, c, valid)
    offset += n * G * D * HW
    v = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    if KNOWN:
        m = tl.load(mean + n * G + g, mask=g < G, other=0.0)
        r = tl.load(rstd + n * G + g, mask=g < G, other=0.0)
        d = v - m
    else:
        scale = 1.0 / (HW * D)
        m = tl.sum(tl.sum(v, axis=pixels, keep_dims=True), axis=channels, keep_dims=True) * scale
        d = v - m
        square = tl.where(mask, d * d, 0.0)
        var = tl.sum(tl.sum(square, axis=pixels, keep_dims=True), axis=channels, keep_dims=True)
        r = tl.rsqrt(var * scale + eps)
        tl.store(mean + n * G + g, m, mask=g < G)
        tl.store(rstd + n * G + g, r, mask=g < G)
    z = tl.fma(d, r * gamma, beta)
    if residual is not None:
        z += tl.load(residual + offset, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        z = tl.where(z < 0.0, 0.0, z)
    tl.store(y + offset, z, mask=mask)


@triton.jit
def _resident_gradient(
    dy, x, y, weight, bias, mean, rstd, dz, sums, dx, HWV, G,
    RELU: tl.constexpr, D: tl.constexpr, NHWC: tl.constexpr, VEC: tl.constexpr,
    GB: tl.constexpr, DP: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """dx, dz and ``sums`` (N, 2, C), as in ``_gradient_sums``, of GB whole groups; each may be None."""
    HW = HWV * VEC
    n, g, c, valid, offset, mask = _resident_tile(G, HW, D, NHWC, GB, DP, P)
    pixels: tl.constexpr = 0 if NHWC else 2
    channels: tl.constexpr = 2 if NHWC else 1
    gamma, beta = _affine(weight, bias, c, valid)
    m = tl.load(mean + n * G + g, mask=g < G, other=0.0)
    r = tl.load(rstd + n * G + g, mask=g < G, other=0.0)
    offset += n * G * D * HW
    v = tl.load(x + offset, mask=mask, other=0.0)
    t = tl.load(dy + offset, mask=mask, other=0.0).to(tl.float32)
    d = v.to(tl.float32) - m
    if RELU:
        if y is not None:
            t = _mask_gradient(t, tl.load(y + offset, mask=mask, other=0.0))
        else:
            t = _mask_gradient(t, tl.fma(d, r * gamma, beta).to(v.dtype))
    if dz is not None:
        tl.store(dz + offset, t, mask=mask)
    # t is 0 outside of the mask only if dy is: a masked ReLU keeps that
    sum1 = tl.sum(t, axis=pixels, keep_dims=True)
    sum2 = tl.sum(t * d, axis=pixels, keep_dims=True) * r
    if sums is not None:
        sums += n * 2 * G * D + c
        tl.store(sums, sum1, mask=valid)
        tl.store(sums + G * D, sum2, mask=valid)
    if dx is not None:
        shift = -r * tl.sum(sum1 * gamma, axis=channels, keep_dims=True) / (HW * D)
        slope = -r * r * tl.sum(sum2 * gamma, axis=channels, keep_dims=True) / (HW * D)
        tl.store(dx + offset, tl.fma(t, r * gamma, tl.fma(d, slope, shift)), mask=mask)


class Plan(NamedTuple):
    """How one shape is computed.

    Attributes:
        resident: a whole group stays in registers; the fields from ``splits`` on do not matter.
        vec: power of 2 that divides H * W (NCHW only).
        block: channels per program.
        groups: groups per program; 1 also if a program has a part of a group.
        lanes: power of 2 >= ``block``; of a resident group, power of 2 >= C / G.
        pixels: power of 2, pixels of a tile.
        warps: warps per program.
        splits, split_iters: programs per channel of the kernels that sum, and their tiles.
        chunks, chunk_iters: the same of the kernels that write y or dx.
    """

    resident: bool
    vec: int
    block: int
    groups: int
    lanes: int
    pixels: int
    warps: int
    splits: int = 1
    split_iters: int = 1
    chunks: int = 1
    chunk_iters: int = 1


@functools.lru_cache(maxsize=4096)
def plan(nhwc: bool, n: int, c: int, g: int, hw: int, processors: int) -> Plan:
    """The plan of a tensor (n, c, H, W) with g groups, H * W = hw, on so many multiprocessors."""
    vec = 1 if nhwc else math.gcd(hw, 16)
    d, pixels = c // g, triton.next_power_of_2(hw)
    dp, gp = triton.next_power_of_2(d), triton.next_power_of_2(g)
    if dp * pixels <= RESIDENT:
        if nhwc:  # runs of 64 channels, or of as many as fit
            groups = min(gp, max(1, 64 // dp), RESIDENT // (dp * pixels))
        else:
            groups = min(gp, max(1, 2048 // (dp * pixels)))
        warps = _warps(groups * dp * pixels)
        return Plan(True, vec, groups * d, groups, dp, pixels, warps)
    if nhwc:
        # Runs of 64 channels; of 32 where there are few, to have enough programs.
        width = 64 if c > 64 else 32
        groups = min(gp, 1 << max(0, (width // d).bit_length() - 1))
        block = groups * d
        pixels = min(pixels, max(1, 4096 // triton.next_power_of_2(block)))
        # Each program of the second kernel reads a block's sums of all splits.
        most = 128 if groups > 1 else 512
    else:
        groups, block, most = 1, 1, 512
        pixels = min(pixels, 2048)
    lanes = triton.next_power_of_2(block)
    rows, tiles = n * triton.cdiv(c, block), triton.cdiv(hw, pixels)
    # 4 programs per multiprocessor. NCHW reads few sums per group: more programs, but each of
    # at least 2 tiles.
    if nhwc:
        splits = chunks = min(tiles, most, triton.cdiv(4 * processors, rows))
    else:
        splits = min(triton.cdiv(tiles, 2), most, triton.cdiv(8 * processors, rows))
        chunks = triton.cdiv(tiles, 2)
    split_iters, chunk_iters = triton.cdiv(tiles, splits), triton.cdiv(tiles, chunks)
    return Plan(
        False, vec, block, groups, lanes, pixels, _warps(lanes * pixels),
        triton.cdiv(tiles, split_iters), split_iters, triton.cdiv(tiles, chunk_iters), chunk_iters,
    )  # fmt: skip


def _warps(elements: int) -> int:
    """Warps for a tile: 16 elements per thread."""
    return min(16, max(1, elements // 512))


def unsupported(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> str:
    """Why the kernels cannot take this input; "" if they can."""
    if not x.is_cuda and isinstance(_apply, triton.JITFunction):
        return f"the input is on {x.device}, not on a CUDA device"
    if x.ndim != 4:
        return f"the input has {x.ndim} dimensions, not the 4 of (N, C, H, W)"
    if num_groups < 1 or x.shape[1] % num_groups:
        return f"{x.shape[1]} channels cannot be divided into {num_groups} groups"
    for name, t in (("input", x), ("residual", residual), ("weight", weight), ("bias", bias)):
        if t is None:
            continue
        dtypes = (torch.float32, x.dtype) if name in ("weight", "bias") else DTYPES
        if t.dtype not in dtypes:
            return f"the {name} is {t.dtype}, not {' or '.join(map(str, dict.fromkeys(dtypes)))}"
        if t.device != x.device:
            return f"the {name} is on {t.device}, the input on {x.device}"
    if residual is not None and residual.shape != x.shape:
        return f"the residual has shape {tuple(residual.shape)}, the input {tuple(x.shape)}"
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and (t.shape != x.shape[1:2] or not t.is_contiguous()):
            return f"the {name} is not a contiguous vector of {x.shape[1]} channels"
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        return f"the strides {x.stride()} of the input are neither NCHW nor channels_last"
    if x[:1].numel() >= 2**31:
        return "one image has 2^31 or more elements"
    return ""


def forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """GroupNorm, then plus ``residual``, then ReLU.

    Args:
        x: (N, C, H, W), contiguous or channels_last, float32, bfloat16 or float16.
        num_groups: G, divides C.
        weight, bias: gamma and beta (C,), float32 or x's dtype, or None.
        eps: added to the variance.
        residual: shape of x, any of the three dtypes, any layout, or None.
        relu: apply ReLU at the end.

    Returns:
        y in shape, dtype and layout of x; mean and 1 / sqrt(variance + eps), float32 (N, G).
    """
    mean, rstd = torch.empty((2, x.shape[0], num_groups), dtype=torch.float32, device=x.device)
    return _forward(x, mean, rstd, weight, bias, eps, residual, relu, False), mean, rstd


def apply(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """The y of ``forward``, bit for bit, from the statistics that it returned."""
    return _forward(x, mean, rstd, weight, bias, 0.0, residual, relu, True)


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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``forward``.

    Args:
        dy: gradient of y, any layout, expanded too.
        x, mean, rstd, weight, bias, relu: as given to and by ``forward``.
        y: the output of ``forward``; used (and required) only with a residual and ReLU.
        residual_dtype: dtype of the residual; None if there was none.
        needs: which of the gradients of x, weight, bias and residual to compute.

    Returns:
        Gradients of x, weight, bias and residual, each of the dtype of what it is for, or None.
        dx has the layout of x, the residual's gradient that of x, or without ReLU that of dy.
    """
    needs_weight, needs_bias = needs[1] and weight is not None, needs[2] and bias is not None
    needs_residual = needs[3] and residual_dtype is not None
    layout = _layout(x)
    dresidual = dz = None
    if needs_residual and not relu:
        dresidual = dy.to(residual_dtype)
    elif needs_residual:
        dresidual = dz = torch.empty_like(x, dtype=residual_dtype, memory_format=layout)
    elif residual_dtype is None:
        y = None
    dx = torch.empty_like(x, memory_format=layout) if needs[0] else None
    sums = None
    if x.numel() == 0:
        sums = torch.zeros((1, 2, x.shape[1]), dtype=torch.float32, device=x.device)
    elif dx is not None or needs_weight or needs_bias or dz is not None:
        dy = dy.contiguous(memory_format=layout)
        wants_sums = needs_weight or needs_bias
        with _device(x):
            sums = _backward(dy, x, y, mean, rstd, weight, bias, relu, dz, dx, wants_sums)
    dweight = dbias = None
    if needs_weight or needs_bias:
        total = sums.sum(0)  # in an order that depends on nothing but the shape
        dbias = total[0].to(bias.dtype) if needs_bias else None
        dweight = total[1].to(weight.dtype) if needs_weight else None
    return dx, dweight, dbias, dresidual


def _forward(x, mean, rstd, weight, bias, eps, residual, relu, known):
    n, c, h, w = x.shape
    layout = _layout(x)
    y = torch.empty_like(x, memory_format=layout)
    if x.numel() == 0:
        if not known:
            mean.zero_(), rstd.zero_()
        return y
    if residual is not None:
        residual = residual.contiguous(memory_format=layout)
    g, nhwc = mean.shape[1], layout is torch.channels_last
    how = plan(nhwc, n, c, g, h * w, _processors(x.device))
    hwv = h * w // how.vec
    with _device(x):
        if how.resident:
            _resident[(n * triton.cdiv(g, how.groups),)](
                x, residual, weight, bias, y, mean, rstd, eps, hwv, g,
                known, relu, c // g, nhwc, how.vec, how.groups, how.lanes, how.pixels,
                num_warps=how.warps,
            )  # fmt: skip
            return y
        rows, part, pairs = n * triton.cdiv(c, how.block), None, 1
        if not known:
            part, pairs = _workspace(x, n * g, how, c // g, nhwc)
            _statistics[(rows * how.splits,)](
                x, part, hwv, c, c // g, how.block, how.splits, how.split_iters,
                nhwc, how.vec, how.groups, how.lanes, how.pixels, num_warps=how.warps,
            )  # fmt: skip
        _apply[(rows * how.chunks,)](
            x, residual, weight, bias, y, part, mean, rstd, eps, hwv, c, c // g, how.block,
            how.chunks, how.splits, how.chunk_iters,
            relu, nhwc, how.vec, how.groups, how.lanes, how.pixels, pairs, num_warps=how.warps,
        )  # fmt: skip
    return y


def _backward(dy, x, y, mean, rstd, weight, bias, relu, dz, dx, wants_sums):
    """Fills dz and dx; returns the sums of dz and dz * xhat (anything, 2, C), if wanted."""
    n, c, h, w = x.shape
    g, nhwc = mean.shape[1], _layout(x) is torch.channels_last
    how = plan(nhwc, n, c, g, h * w, _processors(x.device))
    hwv, sums = h * w // how.vec, None
    if wants_sums:
        rows = n if how.resident else n * how.splits
        sums = torch.empty((rows, 2, c), dtype=torch.float32, device=x.device)
    if how.resident:
        _resident_gradient[(n * triton.cdiv(g, how.groups),)](
            dy, x, y, weight, bias, mean, rstd, dz, sums, dx, hwv, g,
            relu, c // g, nhwc, how.vec, how.groups, how.lanes, how.pixels, num_warps=how.warps,
        )  # fmt: skip
        return sums
    rows, part, pairs = n * triton.cdiv(c, how.block), None, 1
    if dx is not None:
        part, pairs = _workspace(x, n * g, how, c // g, nhwc)
    _gradient_sums[(rows * how.splits,)](
        dy, x, y, weight, bias, mean, rstd, dz, part, sums, hwv, c, c // g, how.block,
        how.splits, how.split_iters,
        relu, nhwc, how.vec, how.groups, how.lanes, how.pixels, num_warps=how.warps,
    )  # fmt: skip
    if dx is not None:
        if dz is not None and dz.dtype == dy.dtype:
            dy, y, relu = dz, None, False  # one tensor to read instead of two
        _gradient[(rows * how.chunks,)](
            dy, x, y, weight, bias, mean, rstd, part, dx, hwv, c, c // g, how.block,
            how.chunks, how.splits, how.chunk_iters,
            relu, nhwc, how.vec, how.groups, how.lanes, how.pixels, pairs, num_warps=how.warps,
        )  # fmt: skip
    return sums


def _workspace(x: Tensor, rows: int, how: Plan, d: int, nhwc: bool) -> tuple[Tensor, int]:
    """Space for pairs of partial sums of all groups, and a power of 2 >= the pairs of a group."""
    pairs = how.splits if nhwc else how.splits * d
    part = torch.empty((rows, 2, pairs), dtype=torch.float32, device=x.device)
    return part, triton.next_power_of_2(pairs)


def _layout(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def _device(x: Tensor):
    """Triton launches on the current device: makes it that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@functools.lru_cache
def _processors(device: torch.device) -> int:
    """Multiprocessors; those of an H100 or H200 where the kernels are interpreted."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count
