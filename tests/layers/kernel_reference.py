"""What the Triton kernels compute, in float64, and maps to compute it of.

The interpreter truncates where a GPU rounds to bfloat16, so bfloat16 results are compared within
one unit in the last place.
"""

import pytest
import torch
from torch.nn import functional as F

from gn_detect.layers import triton_kernels as kernels

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ULP = {F32: 1e-6, BF16: 2**-7, F16: 2**-10}
EPS = 1e-5
LAYOUTS = pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "channels_last"])


def make(shape, nhwc=False, dtype=torch.float32, offset=0.0, seed=0, device="cpu"):
    """A tensor of random numbers whose channels differ in scale and mean."""
    torch.manual_seed(seed)
    c = shape[1]
    x = torch.randn(shape) * torch.linspace(0.5, 2, c)[:, None, None]
    x = x + torch.randn(c, 1, 1) + offset
    layout = torch.channels_last if nhwc else torch.contiguous_format
    return x.to(device, dtype, memory_format=layout)


def affine(c, dtype=torch.float32, device="cpu"):
    torch.manual_seed(7)
    weight, bias = torch.randn(c), torch.randn(c)
    weight[::5] = 0
    return weight.to(dtype).to(device), bias.to(dtype).to(device)


def reference(x, num_groups, weight, bias, residual, relu, y, dy):
    """Output, statistics and gradients in float64. The ReLU's gradient is masked by ``y`` of the
    kernels, because of elements that are 0 but for rounding."""
    inputs = x, weight, bias, residual
    leaves = [None if t is None else t.double().requires_grad_() for t in inputs]
    x, weight, bias, residual = leaves
    var, mean = torch.var_mean(x.reshape(len(x), num_groups, -1), 2, correction=0)
    z = F.group_norm(x, num_groups, eps=EPS)
    for t, operation in ((weight, torch.mul), (bias, torch.add)):  # F takes no bias alone on CUDA
        z = z if t is None else operation(z, t[:, None, None])
    z = z if residual is None else z + residual
    masked = z * (y > 0) if relu else z
    trained = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad(masked, trained, dy.double()))
    gradients = [None if t is None else next(found) for t in leaves]
    return (z.relu() if relu else z), mean, (var + EPS).rsqrt(), gradients


def assert_close(actual, expected, what, atol=0.0):
    """Within rounding to the dtype of ``actual`` and float32 errors relative to the largest."""
    assert actual is not None, what
    difference = (actual.double() - expected).abs()
    scale = expected.abs().max().clamp(min=1e-3)
    bound = ULP[actual.dtype] * expected.abs() + 1e-5 * scale + atol
    if actual.dtype == F16:
        bound = bound + 1e-7  # its denormals
    worst = (difference / bound).max().item()
    assert worst <= 1, f"{what}: {worst:.2f} times the tolerance, {difference.max().item():.2e} off"


def check(x, num_groups, weight, bias, residual=None, relu=False, dy=None, atol=0.0):
    """Forward, rebuilt forward and backward against the reference; returns all results."""
    y, mean, rstd = kernels.forward(x, num_groups, weight, bias, EPS, residual, relu)
    assert y.dtype == x.dtype and y.stride() == x.stride()
    if residual is None:
        assert torch.equal(kernels.apply(x, mean, rstd, weight, bias, relu), y)
    if dy is None:
        dy = make(x.shape, dtype=x.dtype, seed=1, device=x.device)
    saved_y = y if residual is not None else None
    dtype = None if residual is None else residual.dtype
    gradients = kernels.backward(dy, x, saved_y, mean, rstd, weight, bias, relu, dtype)
    z, true_mean, true_rstd, true = reference(x, num_groups, weight, bias, residual, relu, y, dy)
    assert_close(y, z, "y", atol)
    assert_close(mean, true_mean, "mean", 1e-7 / true_rstd.min())
    torch.testing.assert_close(rstd.double(), true_rstd, rtol=2e-6 + atol, atol=0)
    assert gradients[0].stride() == x.stride()
    names, inputs = ("dx", "dweight", "dbias", "dresidual"), (x, weight, bias, residual)
    for name, actual, expected, t in zip(names, gradients, true, inputs, strict=True):
        if expected is None:
            assert actual is None
        else:
            assert actual.dtype == t.dtype and actual.shape == t.shape
            assert_close(actual, expected, name, atol * expected.abs().max())
    if relu and residual is not None and residual.dtype == dy.dtype:
        assert torch.equal(gradients[3], torch.where(y > 0, dy, 0))
    return y, mean, rstd, gradients
