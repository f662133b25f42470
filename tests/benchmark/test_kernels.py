"""The layers are those of the detector, and every variant computes the same thing."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gn_detect.benchmark import kernels
from gn_detect.benchmark.detectors import Detector, Settings
from gn_detect.benchmark.kernels import DTYPES, LAYOUTS, VARIANTS, Layer, gn_layers, layer_runs

pytestmark = pytest.mark.usefixtures("one_thread")


def test_resnet_50_fpn():
    """Two images of 800x1344: by hand, from the strides and the widths of the ResNet-50."""
    hand = {}

    def add(count, relu, residual, channels, height, width, images=2):
        layer = Layer((images, channels, height, width), 32, relu, residual)
        hand[layer] = hand.get(layer, 0) + count

    add(1, True, False, 64, 400, 672)  # stem
    height, width = 200, 336
    for blocks, channels in ((3, 64), (4, 128), (6, 256), (3, 512)):
        first = channels > 64  # res3 to res5 halve the map in the 3x3 convolution of their first
        if first:
            add(1, True, False, channels, height, width)
            height, width = height // 2, width // 2
        add(2 * blocks - first, True, False, channels, height, width)
        add(blocks, True, True, 4 * channels, height, width)
        add(1, False, False, 4 * channels, height, width)  # shortcut
        add(2, False, False, 256, height, width)  # lateral and output convolution of the FPN
    add(4, True, False, 256, 7, 7, images=2 * 512)  # box head
    add(4, True, False, 256, 14, 14, images=2 * 128)  # mask head
    assert gn_layers(Settings(images=2, size=(800, 1344), rois=512)) == hand
    assert sum(hand.values()) == 69


def test_shapes_are_those_of_a_training_step_of_ours(settings):
    settings = dataclasses.replace(settings, size=(70, 90))  # which the model pads
    detector, shapes = Detector("ours-fast", settings), []
    for module in detector.model.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    detector.forward()
    layers = gn_layers(settings)
    assert sorted(shapes) == sorted(s.shape for s, count in layers.items() for _ in range(count))


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
def test_variants_agree_with_float64(name, layout, relu, residual, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)  # which takes seconds
    layer = Layer((2, 8, 5, 7), 4, relu, residual)
    of_dtype = "bfloat16" if name == "autocast" else "float32"
    dtype, tolerance = DTYPES[of_dtype], 2e-2 if name == "autocast" else 1e-5
    torch.manual_seed(0)
    runs = layer_runs(name, layer, Settings(dtype=of_dtype, layout=layout))
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

    y = runs["forward"]()
    assert y.dtype == dtype and y.is_contiguous(memory_format=LAYOUTS[layout])
    torch.testing.assert_close(y.double(), reference, rtol=tolerance, atol=tolerance)
    found = runs["forward+backward"]()
    expected = torch.autograd.grad(reference, inputs, dy)
    for gradient, wanted in zip(found, expected, strict=True):
        scale = wanted.abs().max()
        torch.testing.assert_close(
            gradient.double() / scale, wanted / scale, rtol=0, atol=tolerance
        )


def test_the_copy_has_the_least_bytes():
    layer = Layer((1, 8, 4, 4), 4, relu=True, residual=True)
    for kind, run in layer_runs("copy", layer, Settings()).items():
        assert 2 * run().nbytes == layer.minimum_bytes(4, kind == "forward+backward")


def test_on_a_gpu_ours_is_triton(monkeypatch):
    found = []
    monkeypatch.setattr(kernels, "group_norm_act", lambda *_, kernel: found.append(kernel))
    layer, x = Layer((1, 8, 4, 4), 4, relu=True, residual=True), torch.zeros(1, 8, 4, 4)
    for device in ("cpu", "cuda"):
        settings = Settings(device=device)
        kernels._function("ours", layer, nn.GroupNorm(4, 8), settings)(x, x)
    assert found == ["torch", "triton"]


def test_on_a_gpu_graphs_are_replayed(monkeypatch):
    run, recorded = object(), object()
    monkeypatch.setattr(kernels, "layer_runs", lambda *_: dict.fromkeys(kernels.PASSES, run))
    monkeypatch.setattr(kernels, "as_cuda_graph", {run: recorded}.get)
    monkeypatch.setattr(kernels, "kernel_clock", lambda: {recorded: 0.5}.get)
    layer = Layer((1, 8, 4, 4), 4, relu=True, residual=True)
    samples, _ = kernels.time_layer(layer, ["ours"], Settings(device="cuda"), 2, 1)
    assert samples == {kind: {"ours": [0.5, 0.5]} for kind in kernels.PASSES}
