"""The layers are those of the detector, and every variant computes the same thing."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from gn_detect.benchmark import kernels, questions
from gn_detect.benchmark.detectors import Settings
from gn_detect.benchmark.kernels import (
    DTYPES,
    LAYOUTS,
    PASSES,
    VARIANTS,
    Layer,
    gn_layers,
    layer_run,
)

pytestmark = pytest.mark.slow

SMALL = Layer((1, 8, 4, 4), 4, relu=True, residual=True)


def test_resnet_50_fpn():
    """Two images of 70x90, padded to 96x96: by hand, from the strides and widths of ResNet-50."""
    hand = {}

    def add(count, relu, residual, channels, side, images=2):
        layer = Layer((images, channels, side, side), 32, relu, residual)
        hand[layer] = hand.get(layer, 0) + count

    add(1, True, False, 64, 48)  # stem
    side = 24
    for blocks, channels in ((3, 64), (4, 128), (6, 256), (3, 512)):
        first = channels > 64  # res3 to res5 halve the map in the 3x3 convolution of their first
        if first:
            add(1, True, False, channels, side)
            side //= 2
        add(2 * blocks - first, True, False, channels, side)
        add(blocks, True, True, 4 * channels, side)
        add(1, False, False, 4 * channels, side)  # shortcut
        add(2, False, False, 256, side)  # lateral and output convolution of the FPN
    add(4, True, False, 256, 7, images=2 * 16)  # box head
    add(4, True, False, 256, 14, images=2 * 4)  # mask head
    assert gn_layers(Settings(images=2, size=(70, 90), rois=16)) == hand
    assert sum(hand.values()) == 69


def test_minimum_bytes():
    """16 elements, so 64 bytes of float32 a map."""
    layer = Layer((1, 4, 2, 2), 2, relu=True, residual=False)
    assert layer.minimum_bytes(4, backward=False) == 2 * 64  # x, y
    assert layer.minimum_bytes(4, backward=True) == (2 + 3) * 64  # and dy, x, dx
    assert layer.minimum_bytes(2, backward=True) == 5 * 32
    added = dataclasses.replace(layer, residual=True)
    assert added.minimum_bytes(4, backward=False) == 3 * 64  # x, residual, y
    assert added.minimum_bytes(4, backward=True) == (3 + 5) * 64  # dy, x, y, dx, dresidual
    linear = dataclasses.replace(added, relu=False)
    assert linear.minimum_bytes(4, backward=True) == (3 + 3) * 64  # dy, x, dx; dresidual is dy


@pytest.mark.parametrize("relu, residual", [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "copy"])
def test_variants_agree_with_float64(name, layout, relu, residual):
    layer = Layer((2, 8, 5, 7), 4, relu, residual)
    of_dtype = "bfloat16" if name == "autocast" else "float32"
    dtype, tolerance = DTYPES[of_dtype], 2e-2 if name == "autocast" else 1e-5
    runs = []
    for kind in PASSES:
        torch.manual_seed(0)
        runs.append(layer_run(name, kind, layer, Settings(dtype=of_dtype, layout=layout)))
    torch.manual_seed(0)  # the same maps, in the order in which they are drawn
    draw = [torch.randn(layer.shape, dtype=dtype).double() for _ in range(2 + residual)]
    x, dy = draw[:2]
    inputs = [tensor.requires_grad_() for tensor in (x, *draw[2:])]
    if name == "frozenbn":
        reference = x
    else:
        gamma = torch.ones(8, dtype=torch.float64, requires_grad=True)
        beta = torch.zeros(8, dtype=torch.float64, requires_grad=True)
        inputs += [gamma, beta]
        reference = F.group_norm(x, 4, gamma, beta)
    if residual:
        reference = reference + draw[2]
    if relu:
        reference = reference.relu()

    y = runs[0]()
    assert y.dtype == dtype and y.is_contiguous(memory_format=LAYOUTS[layout])
    torch.testing.assert_close(y.double(), reference, rtol=tolerance, atol=tolerance)
    found = runs[1]()
    expected = torch.autograd.grad(reference, inputs, dy)
    for gradient, wanted in zip(found, expected, strict=True):
        scale = wanted.abs().max()
        torch.testing.assert_close(
            gradient.double() / scale, wanted / scale, rtol=0, atol=tolerance
        )


def test_the_copy_has_the_least_bytes():
    for kind in PASSES:
        run = layer_run("copy", kind, SMALL, Settings())
        assert 2 * run().nbytes == SMALL.minimum_bytes(4, kind == "forward+backward")


def test_on_a_gpu_ours_is_triton(monkeypatch):
    found = []
    monkeypatch.setattr(kernels, "group_norm_act", lambda *_, kernel: found.append(kernel))
    with FakeTensorMode():
        for device in ("cpu", "cuda"):
            layer_run("ours", "forward", SMALL, Settings(device=device))()
    assert found == ["torch", "triton"]


def test_on_a_gpu_graphs_are_replayed(monkeypatch):
    run, recorded = object(), object()
    monkeypatch.setattr(questions, "gn_layers", lambda _: {SMALL: 3})
    monkeypatch.setattr(questions, "layer_run", lambda *_: run)
    monkeypatch.setattr(questions, "as_cuda_graph", {run: recorded}.get)
    monkeypatch.setattr(questions, "kernel_clock", lambda: {recorded: 0.5}.get)
    groups = questions.kernels(Settings(device="cuda"), ["ours"], 2)
    times = [measured["ours"]["ms"] for _, measured in groups]
    assert times == [[500.0] * 2, [1500.0] * 2] * 2  # the layer, and all three, of each pass


def test_a_sum_of_a_layer_that_failed_is_its_failure():
    assert questions._milliseconds([2, 1], [[1.0, 2.0], [3.0, 4.0]]) == {"ms": [5000.0, 8000.0]}
    assert questions._milliseconds([2, 1], [[1.0, 2.0], "out of memory"]) == "out of memory"
