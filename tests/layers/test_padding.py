"""What is image of a batch, taken out and put together again."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

from gn_detect.layers import group_norm_act, padding
from gn_detect.layers.padding import (
    Extents,
    extend_images,
    extents_of,
    images_in_batch,
    per_image,
)

LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
# Of several sizes, one of them that of the batch, or of one.
SIZES = pytest.mark.parametrize("sizes", [[(3, 5), (4, 3), (4, 5)], [(3, 4)] * 3], ids=str)


def make(layout=torch.contiguous_format, shape=(3, 4, 4, 5)):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=layout)
    return x.requires_grad_()


def alone(function, x, sizes):
    """``function`` of each image, as autograd knows it."""
    found = [function(x[i : i + 1, :, :h, :w]) for i, (h, w) in enumerate(sizes)]
    height, width = x.shape[-2:]
    return torch.cat([F.pad(y, (0, width - y.shape[3], 0, height - y.shape[2])) for y in found])


@SIZES
@LAYOUTS
@pytest.mark.parametrize("captured", [False, True])
def test_crops_and_their_join(sizes, layout, captured, monkeypatch):
    monkeypatch.setattr(padding, "_is_captured", lambda: captured)
    extents, x = Extents(sizes, 4, 5), make(layout)

    def cubes(x):
        crops = extents.crops(x)
        assert [c.shape[-2:] for c in crops] == (sizes[:1] if sizes[0] == sizes[1] else sizes)
        assert all(c.is_contiguous(memory_format=layout) for c in crops)
        return extents.join([c**3 for c in crops])

    found, expected = cubes(x), alone(lambda c: c**3, x, sizes)
    assert torch.equal(found, expected)
    assert found.is_contiguous(memory_format=layout)
    dy = torch.randn(found.shape, dtype=found.dtype)
    (of_found,), (of_expected,) = (torch.autograd.grad(y, x, dy) for y in (found, expected))
    torch.testing.assert_close(of_found, of_expected)
    assert gradcheck(cubes, x, fast_mode=True) and gradgradcheck(cubes, x, fast_mode=True)


@SIZES
@pytest.mark.parametrize("captured", [False, True])
def test_extended_images(sizes, captured, monkeypatch):
    monkeypatch.setattr(padding, "_is_captured", lambda: captured)
    x = make()

    def extended(x):
        with images_in_batch(Extents(sizes, 4, 5)):
            return extend_images(x)

    for found, image, (h, w) in zip(extended(x), x, sizes, strict=True):
        rows, columns = torch.arange(4).clamp(max=h - 1), torch.arange(5).clamp(max=w - 1)
        assert torch.equal(found, image[:, rows][..., columns])

    def cube(x):
        return extended(x) ** 3

    assert gradcheck(cube, x, fast_mode=True) and gradgradcheck(cube, x, fast_mode=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert extended(x.detach().bfloat16()).dtype == torch.bfloat16


@SIZES
@LAYOUTS
def test_group_norm(sizes, layout):
    x, gamma, beta, residual = make(layout), *make(shape=(2, 4)).unbind(), make(layout)

    def found(*inputs):
        x, gamma, beta, residual = inputs
        extents = Extents(sizes, 4, 5)
        return group_norm_act(x, 2, gamma, beta, residual=residual, extents=extents)

    expected = alone(lambda c: F.group_norm(c, 2, gamma, beta), x, sizes) + residual
    inputs = x, gamma, beta, residual
    torch.testing.assert_close(found(*inputs), expected)
    assert gradcheck(found, inputs, fast_mode=True)
    assert gradgradcheck(found, inputs, fast_mode=True)
    torch._dynamo.reset()
    compiled = torch.compile(found, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), expected)
    gradients = (torch.autograd.grad(f(*inputs).square().sum(), x) for f in (compiled, found))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", ["cuda", "meta"])
def test_masks_are_on_the_device(kind):
    """Of a step whose memory is estimated, on a machine that may have no such device."""
    with FakeTensorMode():
        device, extents = torch.device(kind), Extents([(3, 5), (4, 3)], 4, 5)
        for mask in (extents.tensor(device), extents.mask(device, torch.float16)):
            assert mask.device.type == kind


def test_graphs_have_no_pinned_memory():
    graphs = []

    @functools.partial(torch.compile, backend=lambda *args: graphs.append(args) or (lambda x: (x,)))
    def masked(x):  # on a GPU, which the graph does not need, as it does not run
        return x * Extents([(3, 5), (4, 3)], 4, 5).mask(torch.device("cuda"), x.dtype).cpu()

    masked(torch.ones(2, 4, 4, 5))
    ((graph, _),) = graphs
    assert "cuda" in graph.code and "pin" not in graph.code


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_GPU)])
def test_compiled_masks(device):
    x, sizes = make(shape=(2, 4, 4, 5)).to(device), [(3, 5), (4, 3)]

    @functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    def masked(x):
        return x * Extents(sizes, 4, 5).mask(x.device, x.dtype)

    assert torch.equal(masked(x), alone(lambda c: c, x, sizes))


def test_small_maps_may_have_no_padding():
    extents = Extents([(30, 40), (32, 40)], 32, 64)
    with images_in_batch(extents):
        assert extents_of(torch.empty(2, 3, 32, 64)).sizes == extents.sizes
        assert extents_of(torch.empty(2, 3, 8, 16)).sizes == ((8, 10), (8, 10))
        assert extents_of(torch.empty(2, 3, 1, 1)) is None
        assert extents_of(torch.empty(2, 3, 1, 2)) is None


def test_maps_of_images_may_get_padding():
    """Of 4 rows, 3 are image; of 2, both are."""
    with images_in_batch(Extents([(3, 4)], 4, 4)):
        y = per_image(lambda x: F.interpolate(x, scale_factor=2.0), torch.ones(1, 1, 2, 2), _twice)
    assert y[0, 0].tolist() == [[1] * 4] * 3 + [[0] * 4]


@pytest.mark.parametrize("sizes", [[(3, 4), (4, 4)], [(4, 4), (3, 4)]], ids=str)
@pytest.mark.parametrize("captured", [False, True])
def test_maps_of_images_that_differ_by_less_than_the_stride(sizes, captured, monkeypatch):
    """All have 2 rows and columns, and one column is padding."""
    monkeypatch.setattr(padding, "_is_captured", lambda: captured)
    x = make(shape=(2, 4, 2, 3))
    upsample = functools.partial(F.interpolate, scale_factor=2.0, mode="bilinear")
    with images_in_batch(Extents(sizes, 4, 6)):
        found = per_image(upsample, x, _twice)
    expected = torch.zeros(2, 4, 4, 6, dtype=x.dtype)
    for y, image, (h, w) in zip(expected, x.detach(), sizes, strict=True):
        y[:, :h, :w] = upsample(image[None, :, :2, :2])[0, :, :h, :w]
    torch.testing.assert_close(found.detach(), expected)


def _twice(size):
    return 2 * size
