"""What the kernels have in common."""

import triton
import triton.language as tl
from triton.language import constexpr


@triton.jit
def _affine(weight, bias, c, valid):
    """gamma and beta of channels ``c``, 1 and 0 where there are none."""
    gamma = 1.0 if weight is None else tl.load(weight + c, mask=valid, other=0.0).to(tl.float32)
    beta = 0.0 if bias is None else tl.load(bias + c, mask=valid, other=0.0).to(tl.float32)
    return gamma, beta


@triton.jit
def _normalize(v, mean, a, beta):
    """y before residual and ReLU. The one place: its bits must not depend on the kernel."""
    return tl.fma(v.to(tl.float32) - mean, a, beta)


@triton.jit
def _read(dy, x, y, mean, a, beta, base, tile, mask, RELU: constexpr):
    """x, and dz: dy where y, or what rounds to it, is above 0 or NaN, as in PyTorch."""
    v = tl.load(x + base + tile, mask=mask, other=0.0)
    t = tl.load(dy + base + tile, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        if y is not None:
            z = tl.load(y + base + tile, mask=mask, other=0.0)
        else:
            z = _normalize(v, mean, a, beta).to(v.dtype)
        t = tl.where(z <= 0.0, 0.0, t)
    return v, t


@triton.jit
def _extent(extents, n, HW):
    """Rows and columns of image ``n``; without extents, one row that is the whole map."""
    if extents is None:
        return 1, HW
    else:
        extents += 2 * n
        return tl.load(extents), tl.load(extents + 1)


@triton.jit
def _column(x, W):
    """``x % W`` for 1 < W and 0 <= x < 2^32 / W, where a product with 1 / W in fixed point, rounded
    up, gives the quotient exactly, by fewer instructions than a division."""
    x, W = x.to(tl.uint32), W.to(tl.uint32)
    return (x - tl.umulhi(x, 0xFFFFFFFF // W + 1) * W).to(tl.int32)


@triton.jit
def _image(mask, p, left, HW, W, h, w, VEC: constexpr):
    """Of the ``mask`` of a tile with the pixels ``p``, the first of which is the ``left``-last of a
    map of HW: what is to be read, in whole accesses of VEC pixels, and what of that is image."""
    if W is None:
        return mask, mask
    else:
        # An image ends with a row, so that columns alone take a division.
        start, rows, full = HW - left, h * W - HW + left, w == W
        image = mask & (p < rows) & (full | (_column(start % W + p, W) < w))
        if VEC == 1:
            return image, image
        else:
            first = p // VEC * VEC
            column = _column(start % W + first, W)
            read = (first < rows) & (full | (column < w) | (column + VEC > W))
            # The compiler does not see through the division.
            if len(p.shape) == 2:
                read = tl.max_constancy(read, [VEC, 1])
            else:
                read = tl.max_constancy(read, [1, 1, VEC])
            return mask & read, image


@triton.jit
def _in_image(v, image, W):
    """v, and 0 in the padding: v may be anything there, as some of it is read."""
    return v if W is None else tl.where(image, v, 0.0)
