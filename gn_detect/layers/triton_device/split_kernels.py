"""Two kernels for each pass, of groups that many programs share."""

import triton
import triton.language as tl
from triton.language import constexpr

from .common import _affine, _extent, _image, _in_image, _normalize, _read

# By default Triton compiles a kernel anew the first time that one of these is 1 or divisible by 16,
# and training at many image sizes meets all combinations. Nothing is faster for it.
SIZES = ("HWV", "W", "D", "S", "R", "iters")


@triton.jit
def _tile(
    C, D, HW, block, S, iters,
    REVERSE: constexpr, NHWC: constexpr, GB: constexpr, CB: constexpr, P: constexpr,
):  # fmt: skip
    """What a program of the split kernels works on.

    Returns:
        The image; the number of this program among those of its group; channels (1, CB), which of
        them are valid, and their groups (1, GB); the offset of the first tile, offsets in it
        (P, CB), its pixels (P, 1), and how many pixels there are from its first one on.
    """
    pid = tl.num_programs(0) - 1 - tl.program_id(0) if REVERSE else tl.program_id(0)
    blocks = (C + block - 1) // block
    if NHWC:
        n, c0, s = pid // blocks // S, pid % blocks * block, pid // blocks % S
        pixel_stride, channel_stride = C, 1
    else:
        n, c0, s = pid // S // blocks, pid // S % blocks * block, pid % S
        pixel_stride, channel_stride = 1, HW
    lane = tl.arange(0, CB)[None, :]
    c, g = c0 + lane, c0 // D + tl.arange(0, GB)[None, :]
    start = s * iters * P
    p = tl.arange(0, P)[:, None]
    n = n.to(tl.int64)
    first = n * C * HW + c0 * channel_stride + start * pixel_stride
    valid = (lane < block) & (c < C)
    nth = c0 % D // block * S + s
    return n, nth, c, valid, g, first, p * pixel_stride + lane, p, HW - start


@triton.jit
def _regroup(v, of, to, GB: constexpr):
    """For each of the groups ``to`` (1, B) the sum of the v (1, A) that are ``of`` it (1, A)."""
    if GB == 1:
        return tl.sum(v, axis=1, keep_dims=True)
    else:  # for the compiler, which would look at what follows the `if` too
        return tl.sum(tl.where(tl.trans(of) == to, tl.trans(v), 0.0), axis=0, keep_dims=True)


@triton.jit
def _add_pairs(part, row, valid, R, RP: constexpr):
    """The two sums of the groups ``row`` (1, GB) from their R pairs in ``part``."""
    r = tl.arange(0, RP)[:, None]
    mask = (r < R) & valid
    part += row * 3 * R + r
    first = tl.load(part, mask=mask, other=0.0)
    second = tl.load(part + R, mask=mask, other=0.0)
    return tl.sum(first, axis=0, keep_dims=True), tl.sum(second, axis=0, keep_dims=True)


@triton.jit
def _iterations(iters, P: constexpr, left, HW, W, h):
    """How many tiles of a program begin before the last of h rows ends."""
    return tl.minimum(iters, (h * W - HW + left + P - 1) // P)


@triton.jit(do_not_specialize=SIZES)
def statistics(
    x, part, extents, HWV, W, C, D, block, S, R, iters,
    NHWC: constexpr, VEC: constexpr, GB: constexpr, CB: constexpr, P: constexpr,
):  # fmt: skip
    """Sums of x - k and of its square over this program's pixels, and k, into ``part``.

    Of each group, ``part`` (N * G, 3, R) has R first sums, R second ones, and R numbers that add up
    to k: the mean of 32 elements of the first channel, and zeros. (Added up, ``part`` is one of
    R = 1.) One element would do for k but for outliers, say in a corner."""
    HW = HWV * VEC
    n, nth, c, valid, g, base, tile, p, left = _tile(C, D, HW, block, S, iters, 0, NHWC, GB, CB, P)
    h, w = _extent(extents, n, HW)
    sample = tl.arange(0, 32)[:, None]
    if W is None:
        sample *= HW // 32
    else:
        sample *= h * w // 32
        sample = sample // w * W + sample % w
        iters = _iterations(iters, P, left, HW, W, h)
    sample *= C if NHWC else 1
    sample += g * D * (1 if NHWC else HW)
    sample = tl.load(x + n * C * HW + sample, mask=g < C // D, other=0.0).to(tl.float32)
    k = tl.sum(sample, axis=0, keep_dims=True) / 32
    shift = _regroup(k, g, c // D, GB)
    sum1, sum2 = tl.full([P, CB], 0.0, tl.float32), tl.full([P, CB], 0.0, tl.float32)
    for i in range(iters):
        mask = (p < left - i * P) & valid
        read, image = _image(mask, p, left - i * P, HW, W, h, w, VEC)
        v = tl.load(x + base + tile, mask=read, other=0.0).to(tl.float32)
        v = tl.where(image, v - shift, 0.0)
        sum1 += v
        sum2 += v * v
        base += P * (C if NHWC else 1)
    sum1 = _regroup(tl.sum(sum1, axis=0, keep_dims=True), c // D, g, GB)
    sum2 = _regroup(tl.sum(sum2, axis=0, keep_dims=True), c // D, g, GB)
    part += (n * (C // D) + g) * 3 * R + nth
    tl.store(part, sum1, mask=g < C // D)
    tl.store(part + R, sum2, mask=g < C // D)
    tl.store(part + 2 * R, tl.where(nth == 0, k, 0.0), mask=g < C // D)


@triton.jit(do_not_specialize=SIZES)
def apply(
    x, residual, weight, bias, y, part, mean, rstd, extents, eps,
    HWV, W, C, D, block, S, R, iters, RELU: constexpr,
    NHWC: constexpr, VEC: constexpr, GB: constexpr, CB: constexpr, P: constexpr, RP: constexpr,
):  # fmt: skip
    """y from x. The statistics come from ``part`` and go to mean, rstd; without ``part`` they are
    read there."""
    HW = HWV * VEC
    n, nth, c, valid, g, base, tile, p, left = _tile(C, D, HW, block, S, iters, 1, NHWC, GB, CB, P)
    h, w = _extent(extents, n, HW)
    if part is not None:
        row, known = n * (C // D) + g, g < C // D
        sum1, sum2 = _add_pairs(part, row, known, R, RP)
        k = tl.load(part + (row * 3 + 2) * R, mask=known, other=0.0)
        scale = 1.0 / (h * w * D)
        shift = sum1 * scale
        m, var = k + shift, sum2 * scale - shift * shift
        r = tl.rsqrt(tl.where(var < 0.0, 0.0, var) + eps)  # a maximum would drop NaN
        told = known & (nth == 0)  # by one program of each group
        tl.store(mean + row, m, mask=told)
        tl.store(rstd + row, r, mask=told)
        m = _regroup(m, g, c // D, GB)
        r = _regroup(r, g, c // D, GB)
    else:
        row = n * (C // D) + c // D
        m = tl.load(mean + row, mask=valid, other=0.0)
        r = tl.load(rstd + row, mask=valid, other=0.0)
    gamma, beta = _affine(weight, bias, c, valid)
    a = r * gamma
    for i in range(iters):
        mask = (p < left - i * P) & valid
        read, image = _image(mask, p, left - i * P, HW, W, h, w, VEC)
        z = _normalize(tl.load(x + base + tile, mask=read, other=0.0), m, a, beta)
        if residual is not None:
            z += tl.load(residual + base + tile, mask=read, other=0.0).to(tl.float32)
        if RELU:
            z = tl.where(z < 0.0, 0.0, z)  # keeps NaN
        tl.store(y + base + tile, _in_image(z, image, W), mask=mask)
        base += P * (C if NHWC else 1)


@triton.jit(do_not_specialize=SIZES)
def gradient_sums(
    dy, x, y, weight, bias, mean, rstd, dz, part, sums, extents,
    HWV, W, C, D, block, S, R, iters, RELU: constexpr,
    NHWC: constexpr, VEC: constexpr, GB: constexpr, CB: constexpr, P: constexpr,
):  # fmt: skip
    """Sums of dz and dz * xhat over this program's pixels: per channel into ``sums`` (N, S, 2, C),
    times gamma and per group into ``part``, as in ``statistics`` but without k. Writes dz. Each of
    the three may be None."""
    HW = HWV * VEC
    n, nth, c, valid, g, base, tile, p, left = _tile(C, D, HW, block, S, iters, 0, NHWC, GB, CB, P)
    gamma, beta = _affine(weight, bias, c, valid)
    row = n * (C // D) + c // D
    m, r = tl.load(mean + row, mask=valid, other=0.0), tl.load(rstd + row, mask=valid, other=0.0)
    sum1, sum2 = tl.full([P, CB], 0.0, tl.float32), tl.full([P, CB], 0.0, tl.float32)
    h, w = _extent(extents, n, HW)
    if W is not None and dz is None:
        iters = _iterations(iters, P, left, HW, W, h)
    for i in range(iters):
        mask = (p < left - i * P) & valid
        read, image = _image(mask, p, left - i * P, HW, W, h, w, VEC)
        v, t = _read(dy, x, y, m, r * gamma, beta, base, tile, read, RELU)
        t = _in_image(t, image, W)
        if dz is not None:
            tl.store(dz + base + tile, t, mask=mask)
        sum1 += t
        sum2 += _in_image(t * (v.to(tl.float32) - m), image, W)
        base += P * (C if NHWC else 1)
    sum1 = tl.sum(sum1, axis=0, keep_dims=True)
    sum2 = tl.sum(sum2, axis=0, keep_dims=True) * r
    if sums is not None:
        sums += (n * S + nth % S) * 2 * C + c
        tl.store(sums, sum1, mask=valid)
        tl.store(sums + C, sum2, mask=valid)
    if part is not None:
        part += (n * (C // D) + g) * 3 * R + nth
        tl.store(part, _regroup(sum1 * gamma, c // D, g, GB), mask=g < C // D)
        tl.store(part + R, _regroup(sum2 * gamma, c // D, g, GB), mask=g < C // D)


@triton.jit(do_not_specialize=SIZES)
def gradient(
    dy, x, y, weight, bias, mean, rstd, part, dx, extents,
    HWV, W, C, D, block, S, R, iters, RELU: constexpr,
    NHWC: constexpr, VEC: constexpr, GB: constexpr, CB: constexpr, P: constexpr, RP: constexpr,
):  # fmt: skip
    """dx from ``part``, the sums of ``gradient_sums``."""
    HW = HWV * VEC
    n, nth, c, valid, g, base, tile, p, left = _tile(C, D, HW, block, S, iters, 1, NHWC, GB, CB, P)
    gamma, beta = _affine(weight, bias, c, valid)
    row = n * (C // D) + c // D
    m, r = tl.load(mean + row, mask=valid, other=0.0), tl.load(rstd + row, mask=valid, other=0.0)
    sum1, sum2 = _add_pairs(part, n * (C // D) + g, g < C // D, R, RP)
    h, w = _extent(extents, n, HW)
    shift = -r * _regroup(sum1, g, c // D, GB) / (h * w * D)
    slope = -r * r * _regroup(sum2, g, c // D, GB) / (h * w * D)
    for i in range(iters):
        mask = (p < left - i * P) & valid
        read, image = _image(mask, p, left - i * P, HW, W, h, w, VEC)
        v, t = _read(dy, x, y, m, r * gamma, beta, base, tile, read, RELU)
        d = tl.fma(t, r * gamma, tl.fma(v.to(tl.float32) - m, slope, shift))
        tl.store(dx + base + tile, _in_image(d, image, W), mask=mask)
        base += P * (C if NHWC else 1)
