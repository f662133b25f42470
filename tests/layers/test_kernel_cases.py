"""What broke other kernels of GroupNorm, put to ours: squares and sums in the dtype of the map,
E[x^2] - E[x]^2, tiles that are a power of 2, images in a dimension of the grid of 65535 at the
most, atomic additions, memory taken for zeros, casts under autocast."""

import contextlib

import pytest
import torch
from torch.nn import functional as F

pytestmark = pytest.mark.slow

pytest.importorskip("triton", minversion="3.4")  # has knobs

from layers.kernel_reference import (  # noqa: E402
    BF16,
    EPS,
    F16,
    F32,
    LAYOUTS,
    affine,
    check,
    make,
    reference,
)  # fmt: skip

from gn_detect.layers import group_norm_act  # noqa: E402
from gn_detect.layers import triton_kernels as kernels  # noqa: E402
from gn_detect.layers.recompute import MODES, rerun, run_block  # noqa: E402

AFFINE = [[0.7, -1.5], [0.3, -0.2]]
EVERY_WAY = pytest.mark.parametrize("way", ["resident", "split", "reduced"])


@pytest.mark.parametrize("way", ["resident", "split"])
@pytest.mark.parametrize(
    "nhwc, channels, num_groups",
    [(False, 48, 16), (True, 48, 16), (True, 33, 33)],  # 33: more than a program has lanes
)
def test_three_channels_of_a_group_and_one(device, take, nhwc, channels, num_groups, way):
    take(way, 1, 16)
    weight, bias = affine(channels, device=device)
    check(make((1, channels, 3, 3), nhwc, device=device), num_groups, weight, bias, relu=True)


@LAYOUTS
@EVERY_WAY
def test_squares_and_sums_beyond_float16(device, take, nhwc, way):
    take(way, 2, 64)
    x = make((1, 2, 15, 20), nhwc, F32, device=device)
    x, dy = (20000 + 2000 * x).to(F16), (300 + x).to(F16)
    assert x.isfinite().all() and x.square().isinf().all()
    assert dy.sum(dtype=F32) > 65504
    weight, bias = torch.tensor(AFFINE, device=device)
    check(x, 1, weight, bias, relu=True, dy=dy)


@LAYOUTS
@EVERY_WAY
def test_deviation_of_a_millionth_of_the_mean(device, take, nhwc, way):
    """float32 has 16 values to a standard deviation. What is left of the mean, half a unit in its
    last place, shifts a group; the rest is exact."""
    take(way, 2, 64)
    x = (1000 + 1e-3 * make((1, 4, 9, 13), device=device).double()).float()
    x = x.contiguous(memory_format=torch.channels_last) if nhwc else x
    dy = make(x.shape, seed=1, device=device)
    weight, bias = affine(4, device=device)
    y, mean, rstd = kernels.forward(x, 2, weight, bias, EPS)
    dx, dweight, dbias, _ = kernels.backward(dy, x, None, mean, rstd, weight, bias)
    z, true_mean, true_rstd, true = reference(x, 2, weight, bias, None, False, y, dy)
    shift = 2.0**-15 * true_rstd.max()
    assert (mean - true_mean).abs().max() <= 2.0**-15
    torch.testing.assert_close(rstd.double(), true_rstd, rtol=5e-5, atol=0)
    assert (y - z).abs().max() <= shift * weight.abs().max() + 1e-5
    assert (dweight - true[1]).abs().max() <= shift * true[2].abs().max() + 1e-3
    torch.testing.assert_close(dbias.double(), true[2], rtol=1e-5, atol=1e-5)
    assert (dx - true[0]).abs().max() <= 2 * shift * true[0].abs().max()


@LAYOUTS
@pytest.mark.parametrize("num_groups", [1, 32], ids="{} groups".format)
def test_no_grid_of_many_rois_has_a_second_dimension(intercept, nhwc, num_groups):
    """Which CUDA ends at 65535; the first at 2^31 - 1. (What the last of 2^20 images gets is in
    ``test_triton_kernels.py``.) 7x7 is resident, 56x56 is split."""
    grids = []
    intercept(lambda kernel, grid, *_, **__: grids.append((kernel.__name__, *grid)))
    layout = torch.channels_last if nhwc else torch.contiguous_format
    for side in (7, 56):
        x = torch.empty(65537, 256, side, side, dtype=BF16, device="meta", memory_format=layout)
        y, mean, rstd = kernels.forward(x, num_groups, None, None, EPS, x, True)
        kernels.backward(x, x, y, mean, rstd, None, None, True, BF16)
    assert {"apply", "gradient"} <= {name for name, *_ in grids}
    for name, programs, *others in grids:
        assert 65537 <= programs < 2**31 and not others, name


@contextlib.contextmanager
def deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@LAYOUTS
@EVERY_WAY
def test_deterministic_algorithms(device, take, nhwc, way):
    """PyTorch then fills new memory with NaN: nothing is read that was not written."""
    take(way, 2, 16)
    x, residual, dy = (make((2, 2, 5, 7), nhwc, seed=seed, device=device) for seed in range(3))
    weight, bias = torch.tensor(AFFINE, device=device)
    valid = torch.tensor([(5, 7), (1, 3)], dtype=torch.int32, device=device)

    def run():
        y, mean, rstd = kernels.forward(x, 1, weight, bias, EPS, residual, True, valid)
        found = kernels.backward(dy, x, y, mean, rstd, weight, bias, True, F32, valid=valid)
        return y, mean, rstd, *found

    usual = run()
    with deterministic():
        found = run()
    for a, b in zip(usual, found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kernel", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_autocast_inside_autocast(device, kernel, dtype):
    """To another dtype, and off: neither changes what is computed, nor what is left behind."""
    maps = (make((2, 8, 3, 5), dtype=dtype, seed=seed, device=device) for seed in range(2))
    x, residual = (t.requires_grad_() for t in maps)
    weight, bias = (t.requires_grad_() for t in affine(8, device=device))
    trained = x, weight, bias, residual

    def run():
        y = group_norm_act(x, 4, weight, bias, EPS, residual, "relu", kernel=kernel)
        return y, *torch.autograd.grad(y, trained, torch.ones_like(y))

    expected = run()
    with torch.autocast(device, BF16):
        for inner in ({"dtype": F16}, {"enabled": False}):
            with torch.autocast(device, **inner):
                found = run()
            for a, b in zip(found, expected, strict=True):
                assert a.dtype == b.dtype and torch.equal(a, b)
            ones = torch.ones(1, 120, device=device)
            assert F.linear(x.detach().flatten(1), ones).dtype == BF16


@pytest.mark.parametrize("memory", MODES[1:])
def test_blocks_under_autocast_inside_autocast(interpreted, memory):
    """What the backward pass, outside of both, computes again, is under that which it was under."""
    x, scale = make((2, 4, 3, 5)).requires_grad_(), torch.randn(4, 1, 1, requires_grad=True)
    weight = torch.randn(4, 4, 1, 1, requires_grad=True)
    trained = x, weight, scale

    def block(x):
        with torch.autocast("cpu", F16):
            with torch.autocast("cpu", BF16):
                y = rerun(F.conv2d, x, weight)
            return group_norm_act(y, 2, activation="relu", kernel="triton") * scale

    results = []
    for mode in ("fast", memory):
        y = run_block(mode, block, x)
        results.append((y, *torch.autograd.grad(y, trained, torch.ones_like(y))))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
