"""The pre-activation ResNet and its weight converter, against timm's."""

import re

import pytest
import timm
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import ResNet, build_backbone, build_model
from detectron2.utils.events import EventStorage
from helpers import TINY, config, randomize, training_image
from torch import nn

from gn_detect.checkpoint.convert import resnetv2
from gn_detect.config import ConfigError
from gn_detect.layers import GroupNorm
from gn_detect.modeling.norm import GroupNormFactory, finish_norms
from gn_detect.modeling.resnetv2 import PreActBottleneckBlock

D = "COCO-InstanceSegmentation/mask_rcnn_R_50d_v2_FPN_gn_3x.yaml"
BIT = "COCO-InstanceSegmentation/mask_rcnn_R_50x1_bit_FPN_gn_ws_3x.yaml"
PLAIN = ["MODEL.BACKBONE.NAME", "build_gn_resnetv2_backbone", "MODEL.BACKBONE.FREEZE_AT", 0]
STAGES = ["res2", "res3", "res4", "res5"]

pytestmark = pytest.mark.slow


def like_timm(name, *opts):
    """The config of timm's model ``name``."""
    if name == "resnetv2_50d_gn":
        return config(D, *PLAIN, *opts)
    depth, width = map(int, re.fullmatch(r"resnetv2_(\d+)x(\d)_bit", name).groups())
    return config(
        BIT,
        *("MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.STEM_OUT_CHANNELS", 64 * width),
        *("MODEL.RESNETS.WIDTH_PER_GROUP", 64 * width),
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", 256 * width, *PLAIN, *opts),
    )


def models_of_timm_and_ours(name):
    """timm's ``features_only``, and ours with the converted weights of its whole model."""
    torch.manual_seed(0)
    whole = randomize(timm.create_model(name, num_classes=5))
    weights = resnetv2.convert(whole.state_dict())
    assert set(weights.left_out) == {"norm.weight", "norm.bias", "head.fc.weight", "head.fc.bias"}
    ours = build_backbone(like_timm(name))
    ours.load_state_dict(weights.state)  # strict: all of ours, and nothing else
    theirs = timm.create_model(name, features_only=True)
    flat = {re.sub(r"^(stem|stages)\.", r"\1_", n): v for n, v in whole.state_dict().items()}
    theirs.load_state_dict({n: flat[n] for n in theirs.state_dict()})
    return theirs, ours


@pytest.mark.parametrize("name", ["resnetv2_50d_gn", "resnetv2_50x1_bit"])
@torch.no_grad()
def test_outputs_are_those_of_timm(name):
    """To 1e-5; but the sums of BiT reach hundreds with random weights, so in single precision to
    1e-4 of the largest value."""
    theirs, ours = models_of_timm_and_ours(name)
    torch.manual_seed(1)
    for dtype, sizes in (
        (torch.float32, [(64, 96), (97, 75)]),
        (torch.float64, [(65, 43)]),
    ):
        theirs, ours = theirs.to(dtype), ours.to(dtype)
        for size in sizes:
            x = torch.rand(1, 3, *size, dtype=dtype) * 2 - 1
            outputs = ours(x)
            assert list(outputs) == STAGES
            for stage, expected in zip(STAGES, theirs(x)[1:], strict=True):
                rounded = dtype == torch.float32 and name.endswith("_bit")
                tolerance = 1e-4 * expected.abs().max().item() if rounded else 1e-5
                torch.testing.assert_close(outputs[stage], expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "name",
    [
        "resnetv2_50d_gn",
        *(f"resnetv2_{size}_bit" for size in ("50x1", "50x3", "101x1", "101x3", "152x2", "152x4")),
    ],
)
def test_parameters_and_origin_are_those_of_timm(name):
    with torch.device("meta"):
        theirs = timm.create_model(name)
        ours = build_backbone(like_timm(name, "MODEL.DEVICE", "meta"))
    assert resnetv2.recognizes(theirs.state_dict().keys())
    weights = resnetv2.convert(theirs.state_dict())
    shapes = {n: p.shape for n, p in ours.state_dict().items()}
    assert {n: p.shape for n, p in weights.state.items()} == shapes

    cfg = like_timm(name)
    origin, released = weights.origin, theirs.default_cfg
    assert origin.input_format == cfg.INPUT.FORMAT == "RGB"
    assert list(origin.pixel_mean) == cfg.MODEL.PIXEL_MEAN == [255 * v for v in released["mean"]]
    assert list(origin.pixel_std) == cfg.MODEL.PIXEL_STD == [255 * v for v in released["std"]]
    assert origin.stride_in_1x1 is cfg.MODEL.RESNETS.STRIDE_IN_1X1 is False
    groups = {m.num_groups for m in theirs.modules() if isinstance(m, nn.GroupNorm)}
    assert groups == {origin.num_groups}
    convs = [m for m in ours.modules() if isinstance(m, nn.Conv2d)]
    variants = {m.weight_standardization for m in convs}
    standardized = any(isinstance(m, timm.layers.StdConv2d) for m in theirs.modules())
    assert variants == {origin.weight_standardization} == {"timm" if standardized else ""}


@pytest.mark.parametrize(
    "name", ["resnetv2_50d_evos", "resnetv2_50d_frn", "resnetv2_18", "nf_resnet50", "resnet50_gn"]
)
def test_other_networks_of_timm_are_not_taken_for_one(name):
    with torch.device("meta"):
        assert not resnetv2.recognizes(timm.create_model(name).state_dict().keys())


def test_weights_of_bn_keep_its_names():
    """By which they are refused for a model with GN (``weight_guards``)."""
    with torch.device("meta"):
        state = timm.create_model("resnetv2_50").state_dict()
    weights = resnetv2.convert(state)
    assert "res2.0.norm1.running_mean" in weights.state
    assert (weights.origin.weight_standardization, weights.origin.num_groups) == ("", None)


def test_output_shape_and_outputs():
    backbone = build_backbone(config(D, *PLAIN, "MODEL.RESNETS.OUT_FEATURES", ["res2", "res4"]))
    assert isinstance(backbone, ResNet) and not hasattr(backbone, "res5")
    assert backbone.output_shape() == {
        "res2": ShapeSpec(channels=256, stride=4),
        "res4": ShapeSpec(channels=1024, stride=16),
    }
    outputs = backbone(torch.rand(1, 3, 64, 96))
    assert {k: v.shape[1:] for k, v in outputs.items()} == {
        "res2": (256, 16, 24),
        "res4": (1024, 4, 6),
    }


@pytest.mark.parametrize("freeze_at", [0, 1, 3])
def test_freeze(freeze_at):
    with torch.device("meta"):
        backbone = build_backbone(config(D, *PLAIN, "MODEL.BACKBONE.FREEZE_AT", freeze_at))
    frozen = {n.split(".")[0] for n, p in backbone.named_parameters() if not p.requires_grad}
    trained = {n.split(".")[0] for n, p in backbone.named_parameters() if p.requires_grad}
    stages = ["stem", *STAGES]
    assert (frozen, trained) == (set(stages[:freeze_at]), set(stages[freeze_at:]))


@pytest.mark.parametrize("name", [D, BIT])
def test_a_step_of_mask_rcnn(name):
    torch.manual_seed(0)
    model = build_model(config(name, *TINY, "INPUT.MASK_FORMAT", "bitmask"))
    with EventStorage():
        losses = model([training_image()] * 2)
    sum(losses.values()).backward()
    for n, p in model.named_parameters():
        if n.startswith(("backbone.bottom_up.stem.", "backbone.bottom_up.res2.")):
            assert not p.requires_grad, n
        else:
            assert p.grad is not None and p.grad.isfinite().all(), n
    assert model.backbone.bottom_up.res3[0].conv1.weight.grad.abs().max() > 0
    assert model.backbone.fpn_lateral2.weight_standardization == ("timm" if name == BIT else "")


@pytest.mark.parametrize(
    "key, value",
    [
        ("MODEL.RESNETS.DEPTH", 34),
        ("MODEL.RESNETS.NUM_GROUPS", 32),
        ("MODEL.RESNETS.STRIDE_IN_1X1", True),
        ("MODEL.RESNETS.RES5_DILATION", 2),
        ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, False, True, True]),
        ("MODEL.RESNETV2.VARIANT", "C"),
        ("MODEL.GN.ZERO_INIT_RESIDUAL", True),
    ],
)
def test_what_it_does_not_support_is_named(key, value):
    with pytest.raises(ConfigError, match=f"{key} is .*; the pre-activation ResNet supports"):
        build_backbone(config(D, key, value))


def test_groups_that_do_not_fit_name_the_layers():
    with pytest.raises(ConfigError, match=r"backbone.bottom_up.stem.norm1: 32 channels"):
        build_backbone(config(D, "MODEL.GN.NUM_GROUPS", 64))


@pytest.mark.parametrize(
    "norm, kind", [("LN", GroupNorm), ("", type(None)), ("BN", nn.BatchNorm2d)]
)
def test_other_norms(norm, kind):
    backbone = build_backbone(config(D, *PLAIN, "MODEL.RESNETS.NORM", norm))
    assert isinstance(backbone.res3[0].norm1, kind)
    x = torch.rand(1, 256, 8, 8) - 0.5
    before = x.clone()
    backbone.res3[0](x)
    assert torch.equal(x, before)  # the ReLU is not done in place


def test_weights_are_standardized_before_and_behind_norms_in_any_model():
    """As a lazy config builds them, and with the eps of BiT in timm."""
    block = PreActBottleneckBlock(16, 32, bottleneck_channels=8, norm=GroupNormFactory(4))
    finish_norms(block, "block", "timm")
    convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 4
    assert {(c.weight_standardization, c.weight_eps) for c in convs} == {("timm", 1e-8)}
