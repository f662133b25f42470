import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_resnet_backbone
from helpers import config
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from gn_detect.benchmark.memory import saved_bytes
from gn_detect.layers import GroupNorm
from gn_detect.layers.recompute import rebuild_norms, run_block
from gn_detect.modeling.resnet import build_gn_resnet_backbone

pytestmark = pytest.mark.usefixtures("one_thread")

X = 2 * 3 * 8 * 8 * 4  # bytes of the input of _network
MAP = 2 * 4 * 8 * 8 * 4  # bytes of a map of its first convolution
STATISTICS = 2 * 2 * 2 * 4  # bytes of the mean and rstd of its GN: 2 images, 2 groups
FEATURES = ("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"])


def _network():
    norm = GroupNorm(2, 4, activation="relu")
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), norm, nn.Conv2d(4, 5, 3, padding=1))


def _input():
    return torch.ones(2, 3, 8, 8)


def test_hand_count():
    network = _network()
    # The convolution keeps x, GN its input, ReLU and the second convolution one map together. The
    # result is kept by nobody.
    assert saved_bytes(lambda: network(_input())) == X + 2 * MAP + STATISTICS
    x = _input()
    assert saved_bytes(lambda: network(x)) == 2 * MAP + STATISTICS
    with torch.no_grad():
        assert saved_bytes(lambda: network(_input())) == 0


def test_what_inner_hooks_keep_is_counted():
    network = _network()

    def rebuilt():
        with rebuild_norms():
            return network(_input())

    assert saved_bytes(rebuilt) == X + MAP + STATISTICS
    assert saved_bytes(lambda: run_block("checkpoint", network, _input())) == X


def test_views_and_changes_of_parameters_are_none():
    weight = torch.ones(6, requires_grad=True)
    buffer = torch.zeros(6)

    def forward():
        buffer.add_(1)
        return {"a": [weight.view(2, 3)[1] * torch.ones(3)], "b": (weight * buffer).sum()}

    assert saved_bytes(forward) == 3 * 4


@pytest.mark.parametrize("norm", ["GN", "FrozenBN"])
def test_agrees_with_hooks_around_detectron2s_network(norm):
    cfg = config(
        "quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml", "MODEL.RESNETS.NORM", norm, *FEATURES
    )
    network = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = torch.randn(1, 3, 64, 64)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = network(images)
    assert saved_bytes(lambda: network(images + 0)) == sum(kept.values()) > 0
    del result


# MiB of the ResNet-50 at 512x512: all that Detectron2's GN keeps are 428.0, and FrozenBN's 206.6.
@pytest.mark.parametrize(
    "memory, limit", [("fast", 430), ("balanced", 370), ("lean", 255), ("checkpoint", 165)]
)
def test_resnet_50_keeps_no_more(memory, limit):
    cfg = config(
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x.yaml",
        *("MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.GN.MEMORY", memory, *FEATURES),
    )
    network = build_gn_resnet_backbone(cfg, ShapeSpec(channels=3))
    kept = saved_bytes(lambda: network(torch.zeros(1, 3, 128, 128)))
    assert 0.6 * limit < kept / 2**20 * 16 < limit
