import dataclasses

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import nn

from gn_detect.benchmark.detectors import VARIANTS, Settings, variant_config
from gn_detect.benchmark.memory import backbone_bytes, saved_bytes
from gn_detect.layers import GroupNorm
from gn_detect.layers.recompute import rebuild_norms, run_block
from gn_detect.modeling.blocks import GNSequential
from gn_detect.modeling.resnet import build_gn_resnet_backbone

pytestmark = pytest.mark.slow

X = 2 * 3 * 8 * 8 * 4  # bytes of the input of _network
MAP = 2 * 4 * 8 * 8 * 4  # bytes of a map of its first convolution
STATISTICS = 2 * 2 * 2 * 4  # bytes of the mean and rstd of its GN: 2 images, 2 groups


def _input():
    return torch.ones(2, 3, 8, 8)


@pytest.fixture
def network():
    first, last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1)
    return GNSequential(first, GroupNorm(2, 4), nn.ReLU(), last)


def test_hand_count(network):
    # The convolution keeps x, GN its input, ReLU and the second convolution one map together. The
    # result is kept by nobody.
    assert saved_bytes(lambda: network(_input())) == X + 2 * MAP + STATISTICS
    x = _input()
    assert saved_bytes(lambda: network(x)) == 2 * MAP + STATISTICS
    with torch.no_grad():
        assert saved_bytes(lambda: network(_input())) == 0


def test_what_inner_hooks_keep_is_counted(network):
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


def test_resnet_50():
    """MiB at 512x512, float32; CUDA, which need not be there, keeps the same."""
    settings = Settings(images=1, size=(512, 512))
    kept = {name: backbone_bytes(name, settings) / 2**20 for name in VARIANTS}
    expected = [206.6, 428.0, 428.0, 346.5, 206.5, 115.0, 428.0]
    assert list(kept.values()) == pytest.approx(expected, abs=0.1)
    on_cuda = backbone_bytes("ours-lean", dataclasses.replace(settings, device="cuda"))
    assert on_cuda / 2**20 == kept["ours-lean"]


def test_fake_tensors_keep_what_real_ones_keep(settings):
    settings = dataclasses.replace(settings, images=1)
    network = build_gn_resnet_backbone(variant_config("ours-lean", settings), ShapeSpec(channels=3))
    kept = saved_bytes(lambda: network(torch.zeros(1, 3, 64, 96)))
    assert backbone_bytes("ours-lean", settings) == kept


def test_autocast_of_cuda():
    """A map of bfloat16 has half the bytes; Detectron2's GN keeps it in float32 as well."""
    kept = {
        (variant, amp): backbone_bytes(
            variant, Settings(device="cuda", images=1, size=(256, 256), amp=amp)
        )
        for variant in ("detectron2-gn", "ours-fast")
        for amp in ("none", "bfloat16")
    }
    weights = 2 * 23.5e6  # cast to bfloat16, and kept
    ours = kept["ours-fast", "none"] / 2 + weights
    assert kept["ours-fast", "bfloat16"] == pytest.approx(ours, rel=0.02)
    assert kept["detectron2-gn", "bfloat16"] > kept["detectron2-gn", "none"] + weights
