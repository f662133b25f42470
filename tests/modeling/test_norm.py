import pytest
from helpers import config
from torch import nn

from gn_detect.config import ConfigError
from gn_detect.layers import GroupNorm
from gn_detect.modeling import GroupNormFactory


def test_reads_the_config():
    cfg = config(
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x.yaml",
        *("MODEL.GN.NUM_GROUPS", 16, "MODEL.GN.EPS", 1e-3),
    )
    layer = GroupNormFactory.from_config(cfg, "MODEL.FPN.NORM")(48)
    assert isinstance(layer, GroupNorm)
    assert (layer.num_groups, layer.num_channels, layer.eps) == (16, 48, 1e-3)


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", ""])
def test_another_norm_is_refused_by_key(norm):
    cfg = config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x.yaml", "MODEL.FPN.NORM", norm)
    with pytest.raises(ConfigError, match=f"MODEL.FPN.NORM is '{norm}'"):
        GroupNormFactory.from_config(cfg, "MODEL.FPN.NORM")


def test_check_names_every_layer_that_could_not_be_built():
    factory = GroupNormFactory(num_groups=32)
    module = nn.ModuleDict({"a": factory(64), "b": factory(48), "c": nn.Sequential(factory(80))})
    with pytest.raises(ConfigError) as error:
        GroupNormFactory.check(module, "backbone")
    message = str(error.value)
    assert "backbone.b: 48 channels cannot be divided into 32 groups" in message
    assert "backbone.c.0: 80 channels" in message
    assert "backbone.a" not in message
