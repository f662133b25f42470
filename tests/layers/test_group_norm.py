import pytest
import torch
from torch import nn

from gn_detect.layers import GroupNorm


def test_an_image_alone_equals_the_same_image_in_a_batch():
    torch.manual_seed(0)
    layer = GroupNorm(32, 64)
    nn.init.normal_(layer.weight)
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


def test_a_group_of_one_value_is_refused_as_by_pytorch():
    for layer in (nn.GroupNorm(4, 4), GroupNorm(4, 4)):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            layer(torch.randn(1, 4, 1, 1))
