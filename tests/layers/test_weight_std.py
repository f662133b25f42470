"""Against the authors' formula in float64, and against timm's StdConv2d."""

import copy

import pytest
import torch
from torch import nn

from gn_detect.layers import GroupNorm, WSConv2d, standardize_weight
from gn_detect.layers.weight_std import VARIANTS


def authors_conv2d(x, weight, **kwargs):
    """github.com/joe-siyuan-qiao/WeightStandardization, in words: subtract the mean over (in, kh,
    kw), divide by the unbiased deviation plus 1e-5."""
    flat = weight.flatten(1)
    flat = flat - flat.sum(1, keepdim=True) / flat.shape[1]
    deviation = ((flat**2).sum(1, keepdim=True) / (flat.shape[1] - 1)).sqrt()
    weight = (flat / (deviation + 1e-5)).reshape(weight.shape)
    return nn.functional.conv2d(x, weight, **kwargs)


def relative_error(actual, expected):
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


SHAPES = [  # in, out, kernel, stride, padding, groups
    (3, 64, 7, 2, 3, 1),
    (64, 64, 1, 1, 0, 1),
    (64, 128, 3, 2, 1, 1),
    (128, 128, 3, 1, 1, 32),
]


@pytest.mark.parametrize("cin, cout, kernel, stride, padding, groups", SHAPES)
def test_authors_variant(cin, cout, kernel, stride, padding, groups):
    torch.manual_seed(0)
    conv = WSConv2d(cin, cout, kernel, stride, padding, groups=groups, bias=False)
    x = torch.randn(2, cin, 16, 16)
    weight = conv.weight.detach().double().requires_grad_()
    expected = authors_conv2d(x.double(), weight, stride=stride, padding=padding, groups=groups)
    actual = conv(x)
    assert relative_error(actual, expected) <= 1e-6
    (actual * torch.arange(16 // stride)).sum().backward()
    (expected * torch.arange(16 // stride)).sum().backward()
    assert relative_error(conv.weight.grad, weight.grad) <= 1e-5


@pytest.mark.parametrize("cin, cout, kernel, stride, padding, groups", SHAPES)
def test_timm_variant(cin, cout, kernel, stride, padding, groups):
    timm = pytest.importorskip("timm.layers", reason="timm is not installed")
    torch.manual_seed(0)
    args = dict(stride=stride, padding=padding, groups=groups, bias=False)
    conv = WSConv2d(cin, cout, kernel, variant="timm", **args)
    theirs = timm.StdConv2d(cin, cout, kernel, **args).double()
    theirs.load_state_dict(conv.state_dict())
    x = torch.randn(2, cin, 16, 16)
    actual, expected = conv(x), theirs(x.double())
    assert relative_error(actual, expected) <= 1e-6
    (actual * torch.arange(16 // stride)).sum().backward()
    (expected * torch.arange(16 // stride)).sum().backward()
    assert relative_error(conv.weight.grad, theirs.weight.grad) <= 1e-5


def test_the_variants_differ_by_the_bias_of_the_deviation():
    """sqrt(n / (n - 1)) for n weights: why a converter must know the variant."""
    weight = torch.randn(8, 16, 3, 3, dtype=torch.float64)
    ratio = standardize_weight(weight, "timm", 0.0) / standardize_weight(weight, "authors", 0.0)
    torch.testing.assert_close(ratio, torch.full_like(weight, (144 / 143) ** 0.5))


@pytest.mark.parametrize("variant", VARIANTS)
def test_filters_without_deviation(variant):
    conv = WSConv2d(4, 4, 3, variant=variant)
    nn.init.zeros_(conv.weight)
    conv(torch.randn(1, 4, 5, 5)).sum().backward()
    assert torch.isfinite(conv.weight.grad).all()


def test_norm_and_activation():
    conv = WSConv2d(4, 8, 3, norm=GroupNorm(2, 8), activation=nn.ReLU())
    x = torch.randn(1, 4, 6, 6)
    plain = nn.functional.conv2d(x, standardize_weight(conv.weight), conv.bias)
    torch.testing.assert_close(conv(x), conv.norm(plain).relu())


@pytest.mark.parametrize("variant", VARIANTS)
def test_convert_in_place(variant):
    conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, padding_mode="reflect")
    fresh = WSConv2d(4, 8, 3, stride=2, padding=1, padding_mode="reflect", variant=variant)
    fresh.load_state_dict(conv.state_dict())
    weight = conv.weight
    WSConv2d.convert_(conv, variant)
    assert conv.weight is weight and conv.state_dict().keys() == fresh.state_dict().keys()
    x = torch.randn(1, 4, 6, 6)
    torch.testing.assert_close(conv(x), fresh(x), rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(conv)(x), fresh(x), rtol=0, atol=0)


def test_refused():
    with pytest.raises(ValueError, match="'mmcv' is unknown; one of: authors, timm"):
        WSConv2d(4, 4, 3, variant="mmcv")
    with pytest.raises(ValueError, match="a single weight"):
        WSConv2d(4, 4, 1, groups=4)
    conv = nn.Conv2d(4, 4, 1, groups=4)
    with pytest.raises(ValueError, match="a single weight"):
        WSConv2d.convert_(conv, "timm")
    assert type(conv) is nn.Conv2d
