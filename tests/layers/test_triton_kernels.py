"""The Triton kernels against float64, run by Triton's interpreter and, where there is one, a GPU.

The interpreter runs a second copy of the device code.
"""

import itertools
import mmap

import pytest
import torch
from torch.nn import functional as F

pytestmark = pytest.mark.slow

triton = pytest.importorskip("triton", minversion="3.4")  # has knobs

from layers.kernel_reference import (  # noqa: E402
    BF16,
    EPS,
    F16,
    F32,
    LAYOUTS,
    ULP,
    affine,
    assert_close,
    check,
    make,
    reference,
)  # fmt: skip
from triton.runtime import interpreter  # noqa: E402

from gn_detect.layers import kernel_check  # noqa: E402
from gn_detect.layers import triton_kernels as kernels  # noqa: E402

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
NAN, INF = float("nan"), float("inf")

WAYS = pytest.mark.parametrize("way", ["resident", "split"])
EVERY_WAY = pytest.mark.parametrize("way", ["resident", "split", "reduced"])

# Way; channels_last; dtypes of x and residual; ReLU; gamma and beta: in float32, in the dtype of
# x, one of them, none; gradient of y: in the layout of x, in the other one, a part of a larger
# tensor, expanded. Each two values of two of these meet. Then shape and groups; splits and pixels
# per tile.
CASES = [
    ("resident", False, BF16, BF16, False, "beta", "other", (3, 12, 9, 13), 4),
    ("resident", False, BF16, F32, False, "none", "expanded", (1, 16, 25, 21), 2),
    ("resident", False, F16, BF16, True, "none", "same", (2, 5, 1, 1), 1),
    ("resident", False, F16, F16, True, "x", "expanded", (1, 6, 14, 14), 2),
    ("resident", True, BF16, F16, True, "x", "part", (2, 8, 12, 10), 8),
    ("resident", True, BF16, F32, False, "float32", "part", (3, 12, 9, 13), 4),
    ("resident", True, F16, None, False, "x", "same", (2, 6, 1, 3), 6),
    ("resident", True, F32, BF16, True, "gamma", "expanded", (2, 8, 7, 7), 2),
    ("resident", True, F32, F16, False, "none", "other", (1, 4, 5, 8), 1),
    ("resident", True, F32, None, False, "gamma", "other", (1, 16, 25, 21), 2),
    ("resident", True, F32, None, True, "beta", "part", (2, 5, 1, 1), 1),
    ("split", False, BF16, F16, True, "gamma", "same", (2, 4, 7, 7), 2, 3, 16),
    ("split", False, BF16, None, True, "float32", "expanded", (1, 4, 9, 13), 2, 1, 32),
    ("split", False, F16, None, True, "none", "part", (1, 4, 25, 21), 2, 3, 128),
    ("split", False, F32, F16, False, "float32", "same", (1, 6, 12, 10), 6, 2, 32),
    ("split", False, F32, F32, True, "x", "other", (1, 6, 14, 14), 2, 2, 64),
    ("split", True, BF16, BF16, True, "x", "part", (3, 6, 9, 13), 2, 1, 32),
    ("split", True, BF16, F32, True, "beta", "same", (2, 5, 1, 1), 1, 1, 2),
    ("split", True, F16, BF16, False, "float32", "other", (1, 16, 5, 4), 2, 2, 16),
    ("split", True, F16, F16, False, "beta", "expanded", (1, 4, 5, 8), 1, 2, 8),
    ("split", True, F16, F32, False, "gamma", "part", (1, 8, 12, 10), 8, 2, 32),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(device, take, case):
    way, nhwc, dtype, residual_dtype, relu, parameters, gradient, shape, num_groups, *splits = case
    take(way, *splits or (0, 0))
    n, c, h, w = shape
    how = kernels.plan(nhwc, n, c, num_groups, h * w, 132)
    assert how.resident == (way == "resident")
    weight, bias = affine(c, dtype if parameters == "x" else F32, device)
    weight = None if parameters in ("none", "beta") else weight
    bias = None if parameters in ("none", "gamma") else bias
    x = make(shape, nhwc, dtype, device=device)
    residual = None
    if residual_dtype:
        residual = make(shape, nhwc == (gradient == "same"), residual_dtype, seed=2, device=device)
    if gradient == "expanded":
        dy = torch.linspace(-1, 1, c, dtype=dtype, device=device)[:, None, None].expand(shape)
    elif gradient == "part":
        dy = make((n, 2 * c, 2 * h, w), dtype=dtype, seed=1, device=device)[:, ::2, h // 2 :][
            :, :, :h
        ]
    else:
        dy = make(shape, nhwc == (gradient == "same"), dtype, seed=1, device=device)
    check(x, num_groups, weight, bias, residual, relu, dy=dy)


def test_each_two_values_of_two_columns_meet():
    columns = range(7)
    for i, j in itertools.combinations(columns, 2):
        met = {(case[i], case[j]) for case in CASES}
        assert len(met) == len({case[i] for case in CASES}) * len({case[j] for case in CASES})


@pytest.mark.parametrize(
    "shape, num_groups, splits",
    [
        ((1, 96, 5, 4), 32, 2),  # 3 channels per group: 48 of the 64 lanes of a program are used
        ((1, 80, 3, 3), 1, 2),  # 5 programs of 16 channels
        ((1, 33, 3, 2), 1, 1),  # 33 programs
        ((1, 72, 3, 3), 9, 1),  # 9 groups, 8 per program: the last has a single one
        ((2, 40, 3, 5), 8, 2),
    ],
    ids=str,
)
def test_channels_that_do_not_fill_a_program(device, take, shape, num_groups, splits):
    weight, bias = affine(shape[1], device=device)
    x = make(shape, nhwc=True, device=device)
    check(x, num_groups, weight, bias, relu=True)
    take("split", splits, 8)
    check(x, num_groups, weight, bias, relu=True)


@LAYOUTS
@EVERY_WAY
def test_large_mean(device, take, nhwc, way):
    take(way, 2, 64)
    weight, bias = affine(4, device=device)
    x = make((2, 4, 9, 13), nhwc, offset=1000, device=device)
    # What float32 leaves of the mean: half a unit in its last place.
    check(x, 2, weight, bias, relu=True, atol=1000 * 2.0**-23)


@LAYOUTS
def test_partial_sums_added_up_before(device, take, nhwc):
    take("reduced", 2, 32)
    x, residual = (make((1, 6, 9, 7), nhwc, device=device, seed=seed) for seed in range(2))
    assert kernels.plan(nhwc, 1, 6, 2, 63, 132).pairs == (2 if nhwc else 6)
    check(x, 2, *affine(6, device=device), residual, relu=True)


@LAYOUTS
def test_large_group_of_large_mean(device, nhwc, monkeypatch):
    """Half the elements of a group of the stem, mean 1000 times the standard deviation."""
    monkeypatch.setattr(kernels, "_processors", lambda _: 1)
    x = make((1, 4, 256, 256), nhwc, offset=1000, device=device)
    assert not kernels.plan(nhwc, 1, 4, 2, 256 * 256, 1).resident
    _, mean, rstd = kernels.forward(x, 2, None, None, EPS)
    groups = x.double().reshape(1, 2, -1)
    assert groups.shape[2] == 131072
    expected = (groups.var(2, unbiased=False) + EPS).rsqrt()
    torch.testing.assert_close(rstd.double(), expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(mean.double(), groups.mean(2), rtol=1e-7, atol=0)
    naive = (x.square().mean((2, 3)) - x.mean((2, 3)).square()).view(1, 2, 2).mean(2)
    naive_error = ((naive + EPS).rsqrt() / expected - 1).abs().max()
    assert not naive_error < 1e-3  # what the shift is for


@LAYOUTS
@WAYS
def test_outlier_in_the_corner(device, take, nhwc, way):
    """The first element of a group tells nothing of its mean."""
    take(way, 2, 128)
    x = make((1, 4, 20, 26), nhwc, device=device)
    x[:, ::2, 0, 0] += 2000
    _, _, rstd = kernels.forward(x, 2, None, None, EPS)
    expected = (x.double().reshape(1, 2, -1).var(2, unbiased=False) + EPS).rsqrt()
    torch.testing.assert_close(rstd.double(), expected, rtol=1e-6, atol=0)


@LAYOUTS
@EVERY_WAY
def test_constant_input_gives_beta(device, take, nhwc, way):
    take(way, 2, 16)
    weight, bias = affine(4, device=device)
    x = make((2, 4, 5, 7), nhwc, device=device).fill_(3.7)
    y, mean, rstd = kernels.forward(x, 2, weight, bias, EPS)
    assert torch.equal(y, bias[:, None, None].expand_as(y))
    assert (mean == x[0, 0, 0, 0]).all()
    torch.testing.assert_close(rstd, torch.full_like(rstd, EPS**-0.5))


@pytest.mark.parametrize(
    "way, nhwc, bad, with_residual",
    [
        ("resident", False, NAN, True),
        ("resident", True, INF, False),
        ("resident", True, -INF, True),
        ("split", False, INF, True),
        ("split", True, NAN, False),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's
def test_what_is_not_finite_stays_in_its_group(device, take, way, nhwc, bad, with_residual):
    take(way, 1, 8)
    weight, bias = affine(4, device=device)
    x = make((2, 4, 3, 5), nhwc, device=device)
    residual = make(x.shape, nhwc, seed=2, device=device) if with_residual else None
    dtype = torch.float32 if with_residual else None
    dy = make(x.shape, seed=1, device=device)

    def both(x):
        y, mean, rstd = kernels.forward(x, 2, weight, bias, EPS, residual, True)
        return y, kernels.backward(dy, x, y, mean, rstd, weight, bias, True, dtype)

    y, gradients = both(x)
    group = (1, slice(2, 4))
    for element in ((3, 2, 3), (2, 0, 0)):  # any, and the one that is subtracted from all
        spoilt = x.clone()
        spoilt[(1, *element)] = bad
        bad_y, bad_gradients = both(spoilt)
        # As PyTorch: NaN goes through ReLU, and so does its gradient.
        expected = F.group_norm(spoilt.double(), 2, weight.double(), bias.double()).relu()
        assert expected[group].isnan().all()
        assert bad_y[group].isnan().all()
        assert bad_gradients[0][group].isnan().all()
        if with_residual:
            assert torch.equal(bad_gradients[3][group], dy[group])
        for clean, with_bad in ((y, bad_y), (gradients[0], bad_gradients[0])):
            with_bad[group] = clean[group]
            assert torch.equal(with_bad, clean)
        assert bad_gradients[1][2:4].isnan().all()
        others = [0, 1]
        assert torch.equal(bad_gradients[1][others], gradients[1][others])


@LAYOUTS
@WAYS
def test_only_the_gradients_that_are_needed(device, take, nhwc, way):
    take(way, 2, 32)
    weight, bias = affine(2, device=device)
    x = make((1, 2, 5, 8), nhwc, device=device)
    residual = make(x.shape, nhwc, seed=2, device=device)
    y, mean, rstd, gradients = check(x, 1, weight, bias, residual, relu=True)
    dy = make(x.shape, seed=1, device=device)
    for bits in (0, 1, 2, 4, 8, 7, 11, 13, 14):
        needs = tuple(bool(bits >> i & 1) for i in range(4))
        some = kernels.backward(dy, x, y, mean, rstd, weight, bias, True, residual.dtype, needs)
        for needed, a, b in zip(needs, some, gradients, strict=True):
            assert a is None if not needed else torch.equal(a, b)


@LAYOUTS
@pytest.mark.parametrize("relu", [False, True])
def test_no_images(monkeypatch, nhwc, relu):
    """Zero RoIs: nothing is launched (CUDA refuses), gradients of gamma and beta are 0."""
    monkeypatch.setattr(kernels, "device", None)
    weight, bias = affine(8)
    x = make((0, 8, 7, 7), nhwc, BF16)
    residual = x.float()
    y, mean, rstd = kernels.forward(x, 4, weight, bias, EPS, residual, relu)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert mean.shape == rstd.shape == (0, 4)
    assert kernels.apply(x, mean, rstd, weight, bias, relu).shape == x.shape
    dx, dweight, dbias, dresidual = kernels.backward(
        x, x, y, mean, rstd, weight, bias, relu, torch.float32
    )
    assert dx.shape == dresidual.shape == x.shape
    assert dx.dtype == BF16 and dresidual.dtype == torch.float32
    assert torch.equal(dweight, torch.zeros(8)) and torch.equal(dbias, torch.zeros(8))


@WAYS
def test_mask_agrees_with_what_is_stored(device, take, way):
    """float16 rounds tiny outputs to 0: there the gradient is 0, as PyTorch's from y."""
    take(way, 2, 32)
    x = make((1, 4, 6, 8), dtype=F16, device=device)
    weight, bias = torch.full((2, 4), 2.0**-25, device=device)
    y, mean, rstd, _ = check(x, 2, weight, bias * 0, relu=True)
    dy = torch.ones_like(x)
    dbias = kernels.backward(dy, x, None, mean, rstd, weight, bias * 0, True)[2]
    assert torch.equal(dbias, (y > 0).sum((0, 2, 3)).float())
    z = F.group_norm(x.float(), 2, weight)
    assert ((z > 0) & (y == 0)).any() and (y > 0).any()


def test_gradient_of_relu_after_a_residual_needs_y():
    x, mean = make((1, 8, 2, 2)), torch.zeros(1, 4)
    with pytest.raises(ValueError, match="needs y"):
        kernels.backward(x, x, None, mean, mean, None, None, True, x.dtype)


# Way, channels_last, dtype, residual, ReLU, height and width, splits and pixels per tile. VEC, the
# pixels that NCHW reads at a time, is 4, 1, 16 or 1.
PADDED = [
    ("resident", False, F32, True, True, 6, 10),
    ("resident", False, BF16, False, True, 7, 5),
    ("resident", True, BF16, True, True, 6, 10),
    ("resident", True, F32, False, False, 9, 1),
    ("split", False, F32, False, True, 6, 10, 2, 16),
    ("split", False, BF16, True, True, 6, 8, 2, 16),
    ("split", False, F32, True, False, 9, 1, 1, 4),
    ("split", True, F32, True, True, 6, 10, 2, 8),
    ("split", True, BF16, False, True, 7, 5, 2, 8),
    ("reduced", False, BF16, True, True, 7, 5, 1, 16),
    ("reduced", True, F32, False, True, 6, 10, 2, 8),
]


@pytest.mark.parametrize("case", PADDED, ids=str)
@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")  # numpy's
def test_padding_does_not_matter(device, take, case):
    """Each image of a batch against what it is alone, in float64, whatever is around it."""
    way, nhwc, dtype, with_residual, relu, height, width, *splits = case
    take(way, *splits or (0, 0))
    sizes = [(height, width), (height - 2, (width + 2) // 2), (1, (width + 1) // 2), (1, 1)]
    shape = len(sizes), 2, height, width
    x, residual, dy = (make(shape, nhwc, dtype, seed=seed, device=device) for seed in range(3))
    residual = residual if with_residual else None
    padding = torch.ones(shape, dtype=torch.bool, device=device)
    for i, (h, w) in enumerate(sizes):
        padding[i, :, :h, :w] = False
        for t in (x, dy):
            t[i, :, h:] = NAN
            t[i, :, :, w:] = 3e38 if i % 2 else INF
    weight, bias = torch.tensor([[0.7, -1.5], [0.3, -0.2]], device=device)
    valid = torch.tensor(sizes, dtype=torch.int32, device=device)
    residual_dtype = dtype if with_residual else None

    y, mean, rstd = kernels.forward(x, 1, weight, bias, EPS, residual, relu, valid)
    if residual is None:
        assert torch.equal(kernels.apply(x, mean, rstd, weight, bias, relu, valid), y)
    dx, dweight, dbias, dresidual = kernels.backward(
        dy, x, y, mean, rstd, weight, bias, relu, residual_dtype, valid=valid
    )

    maps, sums = [torch.zeros_like(x, dtype=torch.float64) for _ in range(3)], [0, 0]
    for i, (h, w) in enumerate(sizes):
        crop = slice(i, i + 1), slice(None), slice(h), slice(w)
        of_crop = None if residual is None else residual[crop]
        z, true_mean, true_rstd, gradients = reference(
            x[crop], 1, weight, bias, of_crop, relu, y[crop], dy[crop]
        )
        for found, true in zip(maps, (z, gradients[0], gradients[3]), strict=True):
            if true is not None:
                found[crop] = true.detach()
        sums = [a + b for a, b in zip(sums, gradients[1:3], strict=True)]
        assert_close(mean[i : i + 1], true_mean, "mean", 1e-7 / true_rstd.min())
        torch.testing.assert_close(rstd[i : i + 1].double(), true_rstd, rtol=2e-6, atol=0)
    assert_close(y, maps[0], "y")
    assert_close(dx, maps[1], "dx")
    assert_close(dweight, sums[0], "dweight")
    assert_close(dbias, sums[1], "dbias")
    assert not y[padding].any() and not dx[padding].any()
    if with_residual and relu:
        assert_close(dresidual, maps[2], "dresidual")
        assert not dresidual[padding].any()
    elif with_residual:
        assert dresidual is dy


@LAYOUTS
def test_little_of_the_padding_is_read(interpreted, monkeypatch, take, nhwc):
    """Of a landscape and a portrait of 3:2 in a square, of which 2 thirds are image. Beside the
    portrait NCHW reads the rest of 16 pixels; of a row of 24, that is much."""
    take("split", 2, 64)
    read, load = [], interpreter.InterpreterBuilder.create_masked_load

    def count(self, pointers, mask, *args):
        if pointers.dtype.element_ty.is_fp16():  # else gamma, beta, sums
            read.append(int(mask.data.sum()))
        return load(self, pointers, mask, *args)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", count)
    x = make((2, 2, 24, 24), nhwc, F16)

    def run(valid):
        read.clear()
        y, mean, rstd = kernels.forward(x, 1, None, None, EPS, x, True, valid)
        kernels.backward(x, x, y, mean, rstd, None, None, True, F16, valid=valid)
        return sum(read)

    part = run(torch.tensor([(16, 24), (24, 16)], dtype=torch.int32)) / run(None)
    assert part == pytest.approx(2 / 3 if nhwc else 5 / 6, abs=0.01)


# Of each layout the partial sums of N images, channels, groups, height and width: more than 5 %
FEW_GROUPS = [(False, 2, 2048, 1), (False, 1, 256, 1), (False, 2, 2048, 4), (True, 1, 2048, 1)]


@pytest.mark.parametrize("nhwc, n, c, num_groups", FEW_GROUPS, ids=str)
@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")  # few programs run
def test_partial_sums_are_a_small_part_of_what_is_read(
    interpreted, intercept, monkeypatch, nhwc, n, c, num_groups
):
    """Of maps of 25 x 42, by the first programs of each kernel, and by what adds up in between."""
    how = kernels.plan(nhwc, n, c, num_groups, 25 * 42, 132)
    assert how.reduced and how.pairs > 128
    read, load, grids = [], interpreter.InterpreterBuilder.create_masked_load, []

    def count(self, pointers, mask, *args):
        if pointers.dtype.element_ty.is_fp32():  # as all but the maps
            read.append(4 * int(mask.data.sum()))
        return load(self, pointers, mask, *args)

    def launch(kernel, grid, *args, **kwargs):
        before, set_dim = sum(read), interpreter.interpreter_builder.set_grid_dim
        with monkeypatch.context() as patch:
            patch.setattr(interpreter.interpreter_builder, "set_grid_dim", lambda *_: set_dim(*all))
            all = *grid, 1, 1
            kernel[(4,)](*args, **kwargs)
        grids.append((kernel.__name__, (sum(read) - before) * grid[0] / 4))

    intercept(launch)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", count)
    x = make((n, c, 25, 42), nhwc, F16)
    y, mean, rstd = kernels.forward(x, num_groups, None, None, EPS)
    kernels.backward(x, x, y, mean, rstd, None, None)
    added_up = 4 * 3 * n * num_groups * how.pairs
    for name, size in grids:
        assert size + added_up <= 0.05 * x.nbytes, name
    assert [name for name, _ in grids] == ["statistics", "apply", "gradient_sums", "gradient"]


@LAYOUTS
@WAYS
def test_more_than_2_to_the_31_elements(interpreted, intercept, monkeypatch, take, nhwc, way):
    """The last image of a tensor that exists but for that image only in address space.

    As much space is reserved below each tensor: a wrapped offset would go there.
    """
    take(way, 1, 128)
    c, h, w = 4, 16, 32
    n = 2**31 // (c * h * w) + 2
    regions = []

    def reserve():
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        regions.append(mmap.mmap(-1, 2 * (2**32 + 2**20), flags=flags))
        flat = torch.frombuffer(regions[-1], dtype=F16)
        flat = flat[-n * c * h * w :]
        if nhwc:
            return flat.view(n, h, w, c).permute(0, 3, 1, 2)
        return flat.view(n, c, h, w)

    x, dy = reserve(), reserve()
    assert x.numel() > 2**31
    image, gradient = make((1, c, h, w), nhwc), make((1, c, h, w), nhwc, seed=1)
    weight, bias = affine(c)
    # What the last image gives on its own
    x[-1:], dy[-1:] = image, gradient
    last = x[-1:].clone(memory_format=torch.preserve_format)
    y, mean, rstd = kernels.forward(last, 2, weight, bias, EPS, None, True)
    dx = kernels.backward(dy[-1:], last, None, mean, rstd, weight, bias, True)[0]

    how = kernels.plan(nhwc, n, c, 2, h * w, 132)
    programs = triton.cdiv(2, how.groups) if how.resident else triton.cdiv(c, how.block) * 2

    def launch_last_image(kernel, grid, *args, **kwargs):
        """The programs of the last image alone: the first or the last ones."""
        builder = interpreter.interpreter_builder
        set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx
        first = 0 if kernel.__name__ in ("apply", "gradient") else grid[0] - programs
        with monkeypatch.context() as patch:
            patch.setattr(builder, "set_grid_dim", lambda *_: set_dim(grid[0], 1, 1))
            patch.setattr(builder, "set_grid_idx", lambda i, *_: set_idx(first + i, 0, 0))
            kernel[(programs,)](*args, **kwargs)

    intercept(launch_last_image)
    monkeypatch.setattr(torch, "empty_like", lambda *_, **__: reserve())
    # It copies all tensors back, here onto themselves.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    big_y, big_mean, big_rstd = kernels.forward(x, 2, weight, bias, EPS, None, True)
    needs = (True, False, False, False)
    big_dx, *_ = kernels.backward(dy, x, None, big_mean, big_rstd, weight, bias, True, None, needs)
    assert torch.equal(big_mean[-1:], mean) and torch.equal(big_rstd[-1:], rstd)
    assert torch.equal(big_y[-1:], y) and torch.equal(big_dx[-1:], dx)


def test_unsupported_says_why(interpreted):
    weight, bias = affine(8)
    x = make((2, 8, 5, 7))
    assert kernel_check.unsupported(x, weight, bias, x) == ""
    assert kernel_check.unsupported(make((2, 8, 5, 7), True, F16), weight, None) == ""
    assert kernel_check.unsupported(make((0, 8, 5, 7)), None, None) == ""
    half = weight.bfloat16()
    for reason, arguments in (
        ("input is torch.float64", (x.double(), None, None)),
        ("residual is torch.float64", (x, weight, bias, x.double())),
        ("weight is torch.bfloat16", (x, half, None)),
        ("bias is torch.bfloat16", (x, weight, half)),
        ("8 channels", (x, weight[:4], None)),
        ("strides", (x[:, :, ::2], None, None)),
        ("strides", (x.transpose(2, 3), None, None)),
        ("weight is on meta", (x, weight.to("meta"), None)),
        ("2^15", (torch.empty(1, 2, 1, 2**15 + 1), None, None, None, True)),
        ("2^30", (torch.empty(1, 8, 2**14, 2**13, device="meta"), None, None)),
    ):
        assert reason in kernel_check.unsupported(*arguments)
    largest = torch.empty(3, 8, 2**13, 2**14 - 1, device="meta")
    assert kernel_check.unsupported(largest, None, None) == ""  # of an image, not of the batch


@LAYOUTS
@pytest.mark.parametrize("processors", [16, 40, 132, 148])
def test_plans_cover_the_tensor_and_fill_the_gpu(nhwc, processors):
    sizes = [(c, hw) for c in (6, 64, 96, 256, 2048) for hw in (1, 49, 196, 1050, 4200, 268800)]
    for n in (1, 2, 64):
        for c, hw in sizes:
            for g in (1, 2, 32, c):
                if c % g:
                    continue
                how = kernels.plan(nhwc, n, c, g, hw, processors)
                where = (n, c, g, hw, how)
                assert hw % how.vec == 0 and 1 <= how.warps <= 16, where
                if how.resident:
                    assert how.lanes >= c // g and how.pixels >= hw, where
                    continue
                assert not (how.reduced and g == 32), where
                d = c // g
                assert how.block == how.groups * d or how.groups == 1 and d % how.block == 0, where
                assert how.lanes >= how.block and how.lanes * how.pixels <= 4096, where
                for parts, tiles in (
                    (how.splits, how.split_iters),
                    (how.chunks, how.chunk_iters),
                ):
                    size = tiles * how.pixels
                    assert (parts - 1) * size < hw <= parts * size, where
                if n * c * hw >= 2 * 64 * 200 * 336:  # from 17 MB in bfloat16
                    assert n * triton.cdiv(c, how.block) * how.splits >= processors, where


# Full-size shapes of R50-FPN at 800 x 1344, 2 images.
FULL_SIZE = [
    ((2, 64, 400, 672), False, True),
    ((2, 256, 200, 336), True, True),
    ((2, 256, 200, 336), False, False),
    ((2, 512, 100, 168), True, True),
    ((2, 256, 50, 84), False, True),
    ((2, 2048, 25, 42), True, True),
    ((1024, 256, 7, 7), False, True),
    ((256, 256, 14, 14), False, True),
]


@cuda
@LAYOUTS
@pytest.mark.parametrize("dtype", list(ULP), ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_check_before_the_first_use_on_a_gpu(nhwc, dtype, padded):
    assert kernel_check.failure(torch.device("cuda"), dtype, nhwc, padded) == ""


@cuda
@LAYOUTS
@pytest.mark.parametrize("dtype", list(ULP), ids=str)
@pytest.mark.parametrize("case", FULL_SIZE, ids=str)
def test_full_size_on_a_gpu(nhwc, dtype, case):
    shape, with_residual, relu = case
    weight, bias = affine(shape[1], device="cuda")
    x = make(shape, nhwc, dtype, device="cuda")
    residual = make(shape, nhwc, dtype, seed=2, device="cuda") if with_residual else None
    first = check(x, 32, weight, bias, residual, relu)
    second = check(x, 32, weight, bias, residual, relu)
    for a, b in zip((*first[:3], *first[3]), (*second[:3], *second[3]), strict=True):
        assert a is b is None or torch.equal(a, b)  # bit for bit


@cuda
@LAYOUTS
def test_more_than_2_to_the_31_elements_on_a_gpu(nhwc):
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("the GPU has less than 40 GB")
    shape = (33, 256, 512, 512)
    weight, bias = affine(256, device="cuda")
    layout = torch.channels_last if nhwc else torch.contiguous_format
    x = torch.empty(shape, dtype=BF16, device="cuda", memory_format=layout).normal_()
    assert x.numel() > 2**31
    y, mean, rstd = kernels.forward(x, 32, weight, bias, EPS)
    dx = kernels.backward(x, x, None, mean, rstd, weight, bias)[0]
    # One image is planned otherwise, so sums differ in their last digits.
    last, _, _, gradients = check(x[-1:], 32, weight, bias, dy=x[-1:])
    torch.testing.assert_close(y[-1:], last, rtol=2**-7, atol=1e-5)
    torch.testing.assert_close(dx[-1:], gradients[0], rtol=2**-7, atol=1e-4)
