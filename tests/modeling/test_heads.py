"""The heads, built from plain arguments as a lazy config or a user's Python does."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from helpers import randomize
from torch import nn

from gn_detect.layers import GroupNorm, standardize_weight
from gn_detect.modeling import (
    GNFastRCNNConvFCHead,
    GNMaskRCNNConvUpsampleHead,
    GroupNormFactory,
    TensorpackFastRCNNConvFCHead,
    TensorpackMaskRCNNConvUpsampleHead,
)

SHAPE = ShapeSpec(channels=64, height=7, width=7)


def test_box_head():
    head = GNFastRCNNConvFCHead(SHAPE, conv_dims=[64, 96], fc_dims=[10])
    norms = [m for m in head.modules() if isinstance(m, GroupNorm)]
    assert [(n.num_groups, n.num_channels) for n in norms] == [(32, 64), (32, 96)]
    assert all(m.bias is None for m in head.modules() if isinstance(m, nn.Conv2d))
    assert head(torch.randn(3, 64, 7, 7)).shape == (3, 10)
    assert head(torch.randn(0, 64, 7, 7)).shape == (0, 10)


def test_mask_head():
    head = GNMaskRCNNConvUpsampleHead(
        SHAPE, num_classes=5, conv_dims=[64, 64, 32], conv_norm=GroupNormFactory(16, 1e-3)
    )
    norms = [m for m in head.modules() if isinstance(m, GroupNorm)]
    assert [(n.num_groups, n.num_channels, n.eps) for n in norms] == [(16, 64, 1e-3)] * 2
    assert head.layers(torch.randn(3, 64, 7, 7)).shape == (3, 5, 14, 14)


@pytest.mark.parametrize(
    "norm, standardized", [("GN", ""), ("GN", "authors"), ("BN", ""), ("", "")]
)
def test_heads_of_tensorpack(norm, standardized):
    """Convolution with bias, ReLU, norm: of any norm, and with standardized weights."""
    torch.manual_seed(0)
    box = TensorpackFastRCNNConvFCHead(
        SHAPE,
        conv_dims=[64, 64],
        fc_dims=[10],
        conv_norm=GroupNormFactory() if norm == "GN" else norm,
        finish={"weight_standardization": standardized},
    )
    mask = TensorpackMaskRCNNConvUpsampleHead(
        SHAPE,
        num_classes=5,
        conv_dims=[64, 64],
        conv_norm=GroupNormFactory() if norm == "GN" else norm,
        finish={"weight_standardization": standardized},
    )
    x = torch.randn(3, 64, 7, 7)
    for head in (box.eval(), mask.eval()):
        for layer in randomize(head).children():
            if layer is not box.fc1 and hasattr(layer, "bias"):
                torch.nn.init.normal_(layer.bias)

    def layer(conv, x):
        weight = standardize_weight(conv.weight, standardized) if standardized else conv.weight
        x = F.conv2d(x, weight, conv.bias, padding=1).relu()
        return x if conv.norm is None else conv.norm(x)

    expected = box.fc1(layer(box.conv2, layer(box.conv1, x)).flatten(1)).relu()
    torch.testing.assert_close(box(x), expected)
    expected = mask.predictor(mask.deconv(layer(mask.mask_fcn1, x)).relu())
    torch.testing.assert_close(mask.layers(x), expected)
    box(x).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in box.parameters())
