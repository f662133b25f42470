import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d, ShapeSpec, get_norm
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from helpers import config
from torch import nn

from gn_detect.config import ConfigError
from gn_detect.layers import GroupNorm
from gn_detect.modeling import GroupNormFactory, finish_norms
from gn_detect.modeling.norm import (
    finish_from_config,
    norm_from_config,
    weight_standardization_from_config,
)
from gn_detect.modeling.resnet import build_gn_resnet_backbone

R50 = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x.yaml"
R18 = "quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_gn_3x.yaml"
NARROW = [
    *("MODEL.GN.NUM_GROUPS", 8, "MODEL.RESNETS.STEM_OUT_CHANNELS", 32),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
]
KEY = "MODEL.FPN.NORM"


@pytest.mark.parametrize("norm, num_groups", [("GN", 16), ("LN", 1), ("IN", 48)])
def test_all_kinds_of_gn_follow_the_config(norm, num_groups):
    gn = ("MODEL.GN.NUM_GROUPS", 16, "MODEL.GN.EPS", 1e-3, "MODEL.GN.KERNEL", "torch")
    layer = norm_from_config(config(R50, KEY, norm, *gn), KEY)(48)
    assert isinstance(layer, GroupNorm)
    assert (layer.num_groups, layer.num_channels) == (num_groups, 48)
    assert (layer.eps, layer.kernel) == (1e-3, "torch")


@pytest.mark.parametrize("norm", ["LN", "IN"])
def test_ln_and_in_are_group_norms(norm):
    """Against the definitions: mean and variance over (C, H, W), and over (H, W)."""
    layer = norm_from_config(config(R50, KEY, norm), KEY)(48)
    x = torch.randn(2, 48, 5, 7, dtype=torch.float64)
    dims = (1, 2, 3) if norm == "LN" else (2, 3)
    var, mean = torch.var_mean(x, dims, keepdim=True, correction=0)
    torch.testing.assert_close(layer.double()(x), (x - mean) / (var + 1e-5).sqrt())


def test_ln2d_is_what_detectron2_calls_ln():
    theirs = get_norm("LN", 48).double()
    nn.init.uniform_(theirs.weight, 0.5, 1.5)
    nn.init.normal_(theirs.bias)
    layer = get_norm(norm_from_config(config(R50, KEY, "LN2d"), KEY), 48).double()
    layer.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 48, 5, 7, dtype=torch.float64) * 1e-3  # so that eps matters
    x, same = (v.clone().requires_grad_() for v in (x, x))
    torch.testing.assert_close(layer(x), theirs(same))
    for out in (layer(x), theirs(same)):
        (out**3).sum().backward()
    torch.testing.assert_close(x.grad, same.grad)


@pytest.mark.parametrize(
    "name, keys",
    [
        (R18, ("RESNETS", "FPN", "RPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")),
        (RETINANET, ("RESNETS", "FPN", "RETINANET")),
    ],
)
def test_ln2d_everywhere(name, keys):
    """Where GN was; and as there, weight decay spares gamma and beta."""
    norms = [word for key in keys for word in (f"MODEL.{key}.NORM", "LN2d")]
    build = ("MODEL.DEVICE", "meta", "MODEL.BACKBONE.FREEZE_AT", 0, "SOLVER.WEIGHT_DECAY_NORM", 0.5)
    cfg = config(name, *build, *norms)
    gn, model = build_model(config(name, *build, "MODEL.RPN.NORM", "GN")), build_model(cfg)
    assert model.state_dict().keys() == gn.state_dict().keys()
    layers = [layer for layer in model.modules() if isinstance(layer, nn.LayerNorm)]
    assert len(layers) == sum(isinstance(layer, nn.GroupNorm) for layer in gn.modules())
    groups = build_optimizer(cfg, model).param_groups
    (spared,) = [set(group["params"]) for group in groups if group["weight_decay"] == 0.5]
    assert spared == {p for layer in layers for p in layer.parameters()}


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "FrozenBN", ""])
def test_norms_of_detectron2_pass_through(norm):
    assert norm_from_config(config(R50, KEY, norm), KEY) == norm


@pytest.mark.parametrize(
    "opts, message",
    [
        ([KEY, "gn"], "MODEL.FPN.NORM is 'gn'; known: 'GN', 'LN', 'IN', 'LN2d', ''"),
        (["MODEL.GN.KERNEL", "cuda"], "MODEL.GN.KERNEL.*'cuda'; known: auto, triton, torch"),
        (["MODEL.GN.KERNEL", "triton"], "MODEL.GN.KERNEL.*MODEL.DEVICE is 'cpu'; set .*auto"),
        (["MODEL.GN.MEMORY", "small"], "MODEL.GN.MEMORY.*'small'; known: fast, balanced, lean"),
        (
            ["MODEL.GN.WEIGHT_STANDARDIZATION", "yes"],
            "WEIGHT_STANDARDIZATION is 'yes'; known: 'auto', ''",
        ),
        (["MODEL.GN.NUM_GROUPS", 0], "NUM_GROUPS .* is 0 and .*PER_GROUP .* is 0: exactly one"),
        (["MODEL.GN.CHANNELS_PER_GROUP", 16], "NUM_GROUPS .* is 32 and .*PER_GROUP .* is 16"),
        (["MODEL.GN.NUM_GROUPS", -1], "NUM_GROUPS .* is -1 and .*PER_GROUP .* is 0"),
    ],
)
def test_what_a_config_cannot_ask_for(opts, message):
    cfg = config(R18, "MODEL.GN.NUM_GROUPS", 32, *opts)
    with pytest.raises(ConfigError, match=message):
        finish_norms(norm_from_config(cfg, KEY)(64), "m", **finish_from_config(cfg))


def test_channels_per_group():
    cfg = config(R50, "MODEL.GN.NUM_GROUPS", 0, "MODEL.GN.CHANNELS_PER_GROUP", 16)
    factory = norm_from_config(cfg, KEY)
    assert [factory(c).num_groups for c in (16, 64, 256)] == [1, 4, 16]


def test_layers_that_could_not_be_built_are_all_named():
    factory = GroupNormFactory(num_groups=32)
    module = nn.ModuleDict({"a": factory(64), "b": factory(48), "c": nn.Sequential(factory(80))})
    with pytest.raises(ConfigError) as error:
        finish_norms(module, "backbone")
    message = str(error.value)
    assert "backbone.b: 48 channels cannot be divided into 32 groups" in message
    assert "backbone.c.0: 80 channels" in message
    assert "backbone.a" not in message


def test_nearest_divisor_is_logged_per_layer(caplog):
    factory = GroupNormFactory(32, nearest_divisor=True)
    module = nn.ModuleDict({"a": factory(64), "b": factory(48), "c": factory(80)})
    with caplog.at_level("INFO"):
        finish_norms(module, "backbone")
    assert [m.num_groups for m in module.values()] == [32, 24, 40]  # 80: 40 is nearer than 20
    assert caplog.messages == [
        "backbone.b: 24 groups instead of 32, for 48 channels",
        "backbone.c: 40 groups instead of 32, for 80 channels",
    ]
    per_group = GroupNormFactory(0, channels_per_group=32, nearest_divisor=True)
    assert per_group(48).num_groups == 2  # 24 channels each
    # Of two that are as near, the smaller: 4 or 6 groups, 2 or 4 channels.
    assert GroupNormFactory(5, nearest_divisor=True)(24).num_groups == 4
    tie = GroupNormFactory(0, channels_per_group=3, nearest_divisor=True)(8)
    assert tie.num_channels // tie.num_groups == 2


def test_every_component_honours_its_key():
    cfg = config(
        R18,
        *("MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "LN", "MODEL.RPN.NORM", "IN"),
        *("MODEL.ROI_BOX_HEAD.NORM", "", "MODEL.ROI_BOX_HEAD.FC_NORM", "LN"),
        *("MODEL.ROI_MASK_HEAD.NORM", "FrozenBN", "MODEL.ROI_MASK_HEAD.DECONV_NORM", "GN"),
        *("MODEL.ROI_HEADS.NUM_CLASSES", 3),
    )
    model = build_model(cfg)
    assert isinstance(model.backbone.bottom_up.res3[0].conv1.norm, nn.BatchNorm2d)
    assert model.backbone.fpn_lateral2.norm.num_groups == 1
    assert model.proposal_generator.rpn_head.conv.norm.num_groups == 64
    assert model.roi_heads.box_head.conv1.norm is None
    assert model.roi_heads.box_head.conv1.bias is not None
    assert list(dict(model.roi_heads.box_head.named_children()))[-3:] == [
        *("fc1", "fc_norm1", "fc_relu1")
    ]
    assert isinstance(model.roi_heads.mask_head.mask_fcn1.norm, FrozenBatchNorm2d)
    assert list(dict(model.roi_heads.mask_head.named_children()))[-4:] == [
        *("deconv", "deconv_norm", "deconv_relu", "predictor")
    ]
    for layer in (
        model.proposal_generator.rpn_head.conv,
        model.roi_heads.box_head.fc1,
        model.roi_heads.mask_head.deconv,
    ):
        assert layer.bias is None  # the norm's beta takes its place


@pytest.mark.parametrize("norm", ["BN", "LN2d"])
def test_a_norm_of_maps_is_refused_for_fully_connected_layers(norm):
    with pytest.raises(ConfigError, match=f"FC_NORM is '{norm}', which normalizes maps"):
        build_model(config(R18, "MODEL.ROI_BOX_HEAD.FC_NORM", norm))


def zero_initialized(name, *opts):
    """A backbone with ``ZERO_INIT_RESIDUAL``, and its gammas of zeros."""
    cfg = config(name, "MODEL.GN.ZERO_INIT_RESIDUAL", True, *opts)
    model = build_gn_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()
    gammas = {n: v for n, v in model.state_dict().items() if n.endswith("norm.weight")}
    assert all((v == v.flatten()[0]).all() for v in gammas.values())
    return model, {name for name, gamma in gammas.items() if not gamma.any()}


@pytest.mark.parametrize("norm", ["GN", "BN"])
@pytest.mark.parametrize(
    "name, opts, last, numbers",
    [(R18, [], "conv2", (2, 2, 2, 2)), (R50, NARROW, "conv3", (3, 4, 6, 3))],
)
def test_zero_init_residual(norm, name, opts, last, numbers):
    """The last norm of each block, and no other."""
    opts = (*opts, "MODEL.RESNETS.NORM", norm, "MODEL.BACKBONE.FREEZE_AT", 0)
    model, zero = zero_initialized(name, *opts)
    blocks = [f"res{stage}.{i}" for stage, n in enumerate(numbers, 2) for i in range(n)]
    assert zero == {f"{block}.{last}.norm.weight" for block in blocks}
    # Each block is then the identity, or its shortcut, before the ReLU.
    x = torch.rand(1, 64, 8, 8)
    torch.testing.assert_close(model.res2[1](x), x)


def test_zero_init_residual_where_frozen_stages_have_frozen_bn():
    _, zero = zero_initialized(R18, "MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 2)
    assert zero == {f"res{s}.{i}.conv2.norm.weight" for s in (3, 4, 5) for i in (0, 1)}


def test_zero_init_residual_needs_a_gamma():
    with pytest.raises(ConfigError, match="MODEL.RESNETS.NORM is 'FrozenBN', which has no gamma"):
        zero_initialized(R18, "MODEL.RESNETS.NORM", "FrozenBN")


def test_weight_standardization_of_every_convolution_before_a_gn():
    opts = ["MODEL.DEVICE", "meta"]
    plain = build_model(config(RETINANET, *opts))
    model = build_model(config(RETINANET, *opts, "MODEL.GN.WEIGHT_STANDARDIZATION", "timm"))
    modules = list(plain.named_modules())
    before_gn = {n for n, m in modules if isinstance(getattr(m, "norm", None), GroupNorm)}
    subnets = [(n, m) for n, m in modules if n.endswith("subnet")]
    before_gn |= {f"{n}.{i}" for n, m in subnets for i in range(0, len(m), 3)}
    assert variants(model) == dict.fromkeys(before_gn, "timm") and len(before_gn) == 53 + 6 + 8
    # Detectron2's FPN calls its convolutions through lists beside its attributes.
    assert {m.weight_standardization for m in model.backbone.lateral_convs} == {"timm"}
    assert plain.state_dict().keys() == model.state_dict().keys()


def variants(model):
    """The convolutions that are standardized, by name."""
    kinds = {n: getattr(m, "weight_standardization", "") for n, m in model.named_modules()}
    return {name: kind for name, kind in kinds.items() if kind}


@pytest.mark.parametrize(
    "groups, norm, value, variant",
    [
        (1, "GN", "auto", ""),
        (32, "GN", "auto", "authors"),
        (32, "FrozenBN", "auto", ""),
        (32, "GN", "", ""),
        (1, "GN", "timm", "timm"),
    ],
)
def test_weight_standardization_is_on_for_resnext_with_gn(groups, norm, value, variant):
    cfg = config(
        R50,
        *("MODEL.RESNETS.NUM_GROUPS", groups, "MODEL.RESNETS.NORM", norm),
        *("MODEL.GN.WEIGHT_STANDARDIZATION", value),
    )
    assert weight_standardization_from_config(cfg) == variant


def test_weight_standardization_names_the_layer_it_cannot_have():
    module = nn.ModuleDict({"a": Conv2d(4, 4, 1, groups=4, norm=GroupNorm(2, 4))})
    with pytest.raises(ConfigError, match=r"WEIGHT_STANDARDIZATION: m\.a: filters of a single"):
        finish_norms(module, "m", "authors")


def test_weight_standardization_skips_convolutions_without_gn():
    module = nn.Sequential(Conv2d(4, 4, 3, norm=nn.BatchNorm2d(4)), nn.Conv2d(4, 4, 3))
    assert variants(finish_norms(module, "m", "authors")) == {}


class OwnConv2d(Conv2d):
    pass


def test_weights_that_cannot_be_standardized_are_named(caplog):
    module = nn.Sequential(OwnConv2d(4, 4, 3, norm=GroupNorm(2, 4)))
    finish_norms(module, "m", "authors")
    assert caplog.messages == ["m.0: the weights of a OwnConv2d are not standardized"]
