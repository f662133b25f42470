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
