"""The layers are those of the detector, and every variant computes the same thing."""

import dataclasses
import shutil

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from helpers import config
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import gn_detect
from gn_detect.benchmark.detectors import DETECTRON2_GN, Detector, Settings
from gn_detect.benchmark.kernels import LAYOUTS, PASSES, Layer, gn_layers, layer_runs, time_layer

pytestmark = pytest.mark.usefixtures("one_thread")

R50 = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x.yaml"
SMALL = Settings(
    gn_detect.get_config_file("quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml"),
    images=2,
    size=(64, 96),
    rois=16,
)
CPU = torch.device("cpu")


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

    settings = Settings(gn_detect.get_config_file(R50), images=2, size=(800, 1344), rois=512)
    layers = gn_layers(settings)
    assert {layer: len(names) for layer, names in layers.items()} == hand
    # The norms that Detectron2 builds from the same config.
    names = [
        *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
        *("MODEL.RPN.HEAD_NAME", "StandardRPNHead"),
        *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"),
        *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
    ]
    detectron2 = build_model(config(R50, *names, "MODEL.DEVICE", "meta"))
    norms = {n for n, m in detectron2.named_modules() if isinstance(m, nn.GroupNorm)}
    found = [name for names in layers.values() for name in names]
    assert len(norms) == len(found) == 69 and norms == set(found)


@pytest.mark.parametrize("size", [(64, 96), (70, 90)])
def test_shapes_are_those_of_a_training_step(size):
    settings = dataclasses.replace(SMALL, size=size)
    detector = Detector(DETECTRON2_GN, settings)
    shapes = {}
    for name, module in detector.model.named_modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: shapes.__setitem__(name, tuple(inputs[0].shape))
            )
    detector.forward()
    layers = gn_layers(settings)
    assert {name: layer.shape for layer, names in layers.items() for name in names} == shapes


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


CASES = [
    (name, layout, relu, residual)
    for name in ("eager", "autocast", "ours", "frozenbn")
    for layout in LAYOUTS
    for relu, residual in ((True, False), (True, True), (False, False))
]
# Compiling takes seconds; one case shows that it is the eager function.
NO_COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++")
CASES.append(pytest.param("compiled", "nchw", True, True, marks=NO_COMPILER))


@pytest.mark.parametrize("name, layout, relu, residual", CASES)
def test_variants_agree_with_float64(name, layout, relu, residual):
    layer = Layer((2, 8, 5, 7), 4, relu, residual)
    dtype = torch.bfloat16 if name == "autocast" else torch.float32
    tolerance = 2e-2 if name == "autocast" else 1e-5
    torch.manual_seed(0)
    runs = layer_runs(name, layer, CPU, dtype, LAYOUTS[layout])
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
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), reference, rtol=tolerance, atol=tolerance)
    found = runs["forward+backward"]()
    expected = torch.autograd.grad(reference, inputs, dy)
    for gradient, wanted in zip(found, expected, strict=True):
        scale = wanted.abs().max()
        torch.testing.assert_close(
            gradient.double() / scale, wanted / scale, rtol=0, atol=tolerance
        )


def test_every_variant_is_timed_in_both_passes():
    layer = Layer((1, 8, 4, 4), 4, relu=True, residual=True)
    variants = ["eager", "copy", "ours"]
    samples = time_layer(
        layer,
        variants,
        device=CPU,
        dtype=torch.float32,
        layout="nchw",
        rounds=2,
        warmup=1,
        graph=True,
        failures={},
    )
    assert list(samples) == list(PASSES)
    for of_pass in samples.values():
        assert list(of_pass) == variants
        assert all(len(times) == 2 and min(times) > 0 for times in of_pass.values())


def test_on_cuda_ours_has_to_be_triton(monkeypatch):
    found = []
    monkeypatch.setattr(
        "gn_detect.benchmark.kernels.group_norm_act", lambda *args, kernel: found.append(kernel)
    )
    for device in ("cpu", "cuda"):
        with FakeTensorMode():  # the device need not be there
            runs = layer_runs(
                "ours",
                Layer((1, 8, 4, 4), 4, relu=True, residual=True),
                torch.device(device),
                torch.float32,
                LAYOUTS["nchw"],
            )
            runs["forward"]()
    assert found == ["torch", "triton"]
