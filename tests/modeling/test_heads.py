"""The heads, built from plain arguments as a lazy config or a user's Python does."""

import torch
from detectron2.layers import ShapeSpec
from torch import nn

from gn_detect.layers import GroupNorm
from gn_detect.modeling import (
    GNFastRCNNConvFCHead,
    GNMaskRCNNConvUpsampleHead,
    GroupNormFactory,
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
