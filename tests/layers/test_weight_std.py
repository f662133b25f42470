"""Against the authors' formula in float64, and against timm's StdConv2d."""

import functools

import pytest
import timm.layers
import torch
import torch.nn.functional as F

from gn_detect.layers import standardize_weight
from gn_detect.layers.weight_std import VARIANTS


def authors_conv2d(x, weight, **kwargs):
    """github.com/joe-siyuan-qiao/WeightStandardization, in words: subtract the mean over (in, kh,
    kw), divide by the unbiased deviation plus 1e-5."""
    flat = weight.flatten(1)
    flat = flat - flat.sum(1, keepdim=True) / flat.shape[1]
    deviation = ((flat**2).sum(1, keepdim=True) / (flat.shape[1] - 1)).sqrt()
    weight = (flat / (deviation + 1e-5)).reshape(weight.shape)
    return F.conv2d(x, weight, **kwargs)


def relative_error(actual, expected):
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "cin, cout, kernel, stride, padding, groups",
    [
        (3, 64, 7, 2, 3, 1),
        (64, 64, 1, 1, 0, 1),
        (64, 128, 3, 2, 1, 1),
        (128, 128, 3, 1, 1, 32),
    ],
)
def test_variants(variant, cin, cout, kernel, stride, padding, groups):
    torch.manual_seed(0)
    args = {"stride": stride, "padding": padding, "groups": groups}
    theirs = timm.layers.StdConv2d(cin, cout, kernel, bias=False, **args)
    weight = theirs.weight.detach().clone().requires_grad_()
    reference = theirs.double()
    if variant == "authors":
        reference = functools.partial(authors_conv2d, weight=theirs.weight, **args)
    x = torch.randn(2, cin, 16, 16)
    actual = F.conv2d(x, standardize_weight(weight, variant), **args)
    expected = reference(x.double())
    assert relative_error(actual, expected) <= 2e-6
    (actual * torch.arange(16 // stride)).sum().backward()
    (expected * torch.arange(16 // stride)).sum().backward()
    assert relative_error(weight.grad, theirs.weight.grad) <= 1e-5


def test_the_variants_differ_by_the_bias_of_the_deviation():
    """sqrt(n / (n - 1)) for n weights: why a converter must know the variant."""
    weight = torch.randn(8, 16, 3, 3, dtype=torch.float64)
    ratio = standardize_weight(weight, "timm", 0.0) / standardize_weight(weight, "authors", 0.0)
    torch.testing.assert_close(ratio, torch.full_like(weight, (144 / 143) ** 0.5))


@pytest.mark.parametrize("variant", VARIANTS)
def test_filters_without_deviation(variant):
    weight = torch.zeros(4, 4, 3, 3, requires_grad=True)
    F.conv2d(torch.randn(1, 4, 5, 5), standardize_weight(weight, variant)).sum().backward()
    assert torch.isfinite(weight.grad).all()
