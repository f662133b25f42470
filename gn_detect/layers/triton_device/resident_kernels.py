"""One kernel for each pass, whose programs hold whole groups in registers."""

import triton
import triton.language as tl
from triton.language import constexpr

from .common import _affine, _extent, _image, _in_image, _normalize, _read


@triton.jit
def _resident_tile(
    G, HW, D: constexpr, NHWC: constexpr, GB: constexpr, DP: constexpr, P: constexpr,
):  # fmt: skip
    """What a program of the resident kernels works on: a tile GB x DP x P, P x GB x DP for NHWC.

    Returns:
        The image and its offset; groups, their numbers over all images, channels, which of those
        are valid; offsets in the tile, its pixels and mask. From the groups on, all broadcast to
        the tile.
    """
    blocks = (G + GB - 1) // GB
    n = (tl.program_id(0) // blocks).to(tl.int64)
    g = tl.program_id(0) % blocks * GB + tl.arange(0, GB)
    if NHWC:
        g = g[None, :, None]
        d = tl.arange(0, DP)[None, None, :]
        p = tl.arange(0, P)[:, None, None]
        tile = p * (G * D) + g * D + d
    else:
        g = g[:, None, None]
        d = tl.arange(0, DP)[None, :, None]
        p = tl.arange(0, P)[None, None, :]
        tile = (g * D + d) * HW + p
    valid = (g < G) & (d < D)
    return n, n * G * D * HW, g, n * G + g, g * D + d, valid, tile, p, valid & (p < HW)


@triton.jit(do_not_specialize=["HWV", "W"])
def resident(
    x, residual, weight, bias, y, mean, rstd, extents, eps, HWV, W, G,
    KNOWN: constexpr, RELU: constexpr,
    D: constexpr, NHWC: constexpr, VEC: constexpr, GB: constexpr, DP: constexpr, P: constexpr,
):  # fmt: skip
    """y, mean and rstd of GB whole groups. If KNOWN, mean and rstd are read instead."""
    HW = HWV * VEC
    n, base, g, row, c, valid, tile, p, mask = _resident_tile(G, HW, D, NHWC, GB, DP, P)
    h, w = _extent(extents, n, HW)
    read, image = _image(mask, p, HW, HW, W, h, w, VEC)
    pixels: constexpr = 0 if NHWC else 2
    channels: constexpr = 2 if NHWC else 1
    gamma, beta = _affine(weight, bias, c, valid)
    v = tl.load(x + base + tile, mask=read, other=0.0).to(tl.float32)
    if KNOWN:
        m = tl.load(mean + row, mask=g < G, other=0.0)
        r = tl.load(rstd + row, mask=g < G, other=0.0)
    else:
        scale = 1.0 / (h * w * D)
        # Minus the first element: exact for constant groups, where rstd is large.
        k = tl.load(x + base + g * D * (1 if NHWC else HW), mask=g < G, other=0.0).to(tl.float32)
        m = tl.where(image, v - k, 0.0)
        m = tl.sum(tl.sum(m, axis=pixels, keep_dims=True), axis=channels, keep_dims=True)
        m = k + m * scale
        square = tl.where(image, (v - m) * (v - m), 0.0)
        var = tl.sum(tl.sum(square, axis=pixels, keep_dims=True), axis=channels, keep_dims=True)
        r = tl.rsqrt(var * scale + eps)
        tl.store(mean + row, m, mask=g < G)
        tl.store(rstd + row, r, mask=g < G)
    z = _normalize(v, m, r * gamma, beta)
    if residual is not None:
        z += tl.load(residual + base + tile, mask=read, other=0.0).to(tl.float32)
    if RELU:
        z = tl.where(z < 0.0, 0.0, z)  # keeps NaN
    tl.store(y + base + tile, _in_image(z, image, W), mask=mask)


@triton.jit(do_not_specialize=["HWV", "W"])
def resident_gradient(
    dy, x, y, weight, bias, mean, rstd, dz, sums, dx, extents, HWV, W, G,
    RELU: constexpr,
    D: constexpr, NHWC: constexpr, VEC: constexpr, GB: constexpr, DP: constexpr, P: constexpr,
):  # fmt: skip
    """dx, dz and ``sums`` (N, 2, C), as in ``gradient_sums``, of GB groups; any may be None."""
    HW = HWV * VEC
    n, base, g, row, c, valid, tile, p, mask = _resident_tile(G, HW, D, NHWC, GB, DP, P)
    h, w = _extent(extents, n, HW)
    read, image = _image(mask, p, HW, HW, W, h, w, VEC)
    pixels: constexpr = 0 if NHWC else 2
    channels: constexpr = 2 if NHWC else 1
    gamma, beta = _affine(weight, bias, c, valid)
    m, r = tl.load(mean + row, mask=g < G, other=0.0), tl.load(rstd + row, mask=g < G, other=0.0)
    v, t = _read(dy, x, y, m, r * gamma, beta, base, tile, read, RELU)
    t = _in_image(t, image, W)
    if dz is not None:
        tl.store(dz + base + tile, t, mask=mask)
    d = _in_image(v.to(tl.float32) - m, image, W)
    sum1 = tl.sum(t, axis=pixels, keep_dims=True)
    sum2 = tl.sum(t * d, axis=pixels, keep_dims=True) * r
    if sums is not None:
        sums += n * 2 * G * D + c
        tl.store(sums, sum1, mask=valid)
        tl.store(sums + G * D, sum2, mask=valid)
    if dx is not None:
        shift = -r * tl.sum(sum1 * gamma, axis=channels, keep_dims=True) / (h * w * D)
        slope = -r * r * tl.sum(sum2 * gamma, axis=channels, keep_dims=True) / (h * w * D)
        tl.store(
            dx + base + tile,
            _in_image(tl.fma(t, r * gamma, tl.fma(d, slope, shift)), image, W),
            mask=mask,
        )
