import numpy as np
import pytest
import torch
from torch import nn

from gn_detect.layers import GroupNorm


def paper_group_norm(x, num_groups, gamma, beta, eps):
    """Equations 1, 2, 3 and 7 of the GN paper, in float64, one pixel set S_i after the other."""
    n, c = x.shape[:2]
    out = np.empty(x.shape, dtype=np.float64)
    size = c // num_groups
    for i in range(n):
        for g in range(num_groups):
            group = slice(g * size, (g + 1) * size)
            values = x[i, group].astype(np.float64)
            mu = values.sum() / values.size
            sigma = np.sqrt(((values - mu) ** 2).sum() / values.size + eps)
            out[i, group] = (values - mu) / sigma
    shape = (1, c) + (1,) * (x.ndim - 2)
    return out * gamma.reshape(shape).astype(np.float64) + beta.reshape(shape).astype(np.float64)


def random_layer(num_groups, channels, eps=1e-5):
    layer = GroupNorm(num_groups, channels, eps)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize("shape", [(2, 64, 7, 9), (1, 32, 1, 5), (3, 96, 4), (2, 64, 33, 20)])
@pytest.mark.parametrize("num_groups", [32, 1, 4])
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_equals_the_equations_of_the_paper(shape, num_groups, eps):
    torch.manual_seed(0)
    layer = random_layer(num_groups, shape[1], eps)
    x = torch.randn(shape) * 3 + 5
    expected = paper_group_norm(
        x.numpy(), num_groups, layer.weight.detach().numpy(), layer.bias.detach().numpy(), eps
    )
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-5, atol=2e-5)


def test_an_image_alone_equals_the_same_image_in_a_batch():
    torch.manual_seed(0)
    layer = random_layer(32, 64)
    batch = torch.randn(4, 64, 9, 7) * torch.tensor([1.0, 10.0, 0.1, 3.0]).view(4, 1, 1, 1)
    alone = torch.cat([layer(image[None]) for image in batch])
    torch.testing.assert_close(layer(batch), alone, rtol=1e-6, atol=1e-6)


def test_is_a_group_norm_by_type():
    layer = GroupNorm(32, 64, eps=1e-3)
    assert isinstance(layer, nn.GroupNorm)
    assert (layer.num_groups, layer.num_channels, layer.eps) == (32, 64, 1e-3)
    assert layer.state_dict().keys() == nn.GroupNorm(32, 64).state_dict().keys()


@pytest.mark.parametrize("num_groups", [32, 0])
def test_groups_that_do_not_divide_the_channels(num_groups):
    with pytest.raises(ValueError, match="48 channels cannot be divided") as error:
        GroupNorm(num_groups, 48)
    works = [int(g) for g in str(error.value).split(":")[1].split(",")]
    assert works == [1, 2, 3, 4, 6, 8, 12, 16, 24, 48]
