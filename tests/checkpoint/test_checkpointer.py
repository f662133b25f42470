"""Weights that fit by name and shape, and do not fit."""

import pickle

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.backbone import build_resnet_backbone
from helpers import config

from gn_detect.checkpoint import Checkpointer, Origin, WeightGuards
from gn_detect.checkpoint.weight_guards import bn_into_gn
from gn_detect.config import ConfigError

guards_of = WeightGuards.from_config

R50 = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x.yaml"
R18 = "quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml"
NORMS = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")


def all_norms(norm):
    return [word for key in NORMS for word in (f"MODEL.{key}.NORM", norm)]


def save(cfg, path):
    """Detectron2's own checkpoint of a model of ``cfg``, without origin."""
    checkpointer = DetectionCheckpointer(build_model(cfg), str(path))
    checkpointer.save("weights")
    return str(path / "weights.pth")


def load(cfg, weights):
    model = build_model(cfg)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        return Checkpointer(model, guards=guards_of(cfg)).load(weights)
    except ConfigError:  # a refused file leaves the model as it was
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        raise


def test_bn_weights_into_gn_are_refused(tmp_path):
    weights = save(config(R18, *all_norms("BN")), tmp_path)
    with pytest.raises(ConfigError, match=r"weights.pth was trained with BN in 36 layers") as error:
        load(config(R18), weights)
    assert "backbone.fpn_lateral2.norm" in str(error.value)
    load(config(R18, "GUARDS.BN_WEIGHTS_INTO_GN", False), weights)
    load(config(R18, *all_norms("BN")), weights)


def test_bn_weights_of_a_wrapped_model(tmp_path):
    weights = save(config(R18, *all_norms("BN")), tmp_path)
    content = torch.load(weights)
    content["model"] = {f"module.{k}": v for k, v in content["model"].items()}
    torch.save(content, weights)
    with pytest.raises(ConfigError, match="BN in 36 layers"):
        load(config(R18), weights)


def test_bn_backbone_under_gn_heads_is_in_order(tmp_path):
    cfg = config(R18, "MODEL.RESNETS.NORM", "FrozenBN")
    weights = save(cfg, tmp_path)
    load(cfg, weights)
    with pytest.raises(ConfigError, match="BN in 20 layers .* such as backbone.bottom_up.stem"):
        load(config(R18), weights)


def test_bn_of_a_backbone_without_prefix(tmp_path):
    """As Detectron2's converter writes ImageNet weights: matched by the end of the names."""
    cfg = config(R18, *all_norms("BN"))
    backbone = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    model = {k: v.numpy() for k, v in backbone.state_dict().items()}
    weights = tmp_path / "weights.pkl"
    content = {"model": model, "__author__": "torchvision", "matching_heuristics": True}
    weights.write_bytes(pickle.dumps(content))
    with pytest.raises(ConfigError, match="BN in 20 layers"):
        load(config(R18), str(weights))


@pytest.mark.parametrize("norm, layers", [("bn", 2), ("gn", 0)])
def test_caffe2_names(norm, layers):
    """BN is folded into a scale and a bias there, and leaves no running statistics."""
    names = ["conv1_w", "res2_0_branch2a_w", "pred_w"]
    names += [f"{conv}_{norm}_{p}" for conv in ("conv1", "res2_0_branch2a") for p in "sb"]
    found = bn_into_gn(names, build_model(config(R18)))
    expected = ["backbone.bottom_up.stem.conv1.norm", "backbone.bottom_up.res2.0.conv1.norm"]
    assert sorted(found) == sorted(expected[:layers])


def test_origin_travels_with_the_weights(tmp_path):
    cfg = config(R18)
    Checkpointer(build_model(cfg), str(tmp_path), guards=guards_of(cfg)).save("weights")
    weights = str(tmp_path / "weights.pth")
    load(cfg, weights)
    DetectionCheckpointer(build_model(cfg)).load(weights)  # Detectron2 reads it as before
    with pytest.raises(ConfigError, match=r"PIXEL_STD is \[1.0, 1.0, 1.0\], the weights' is \[57"):
        load(config(R18, "MODEL.PIXEL_STD", [1.0, 1.0, 1.0]), weights)
    load(config(R18, "MODEL.PIXEL_STD", [1.0] * 3, "GUARDS.WEIGHTS_INPUT", False), weights)


def test_input_format():
    cfg = config(R50, "INPUT.FORMAT", "RGB")
    origin = Origin.of_name("catalog://ImageNetPretrained/FAIR/R-50-GN")
    with pytest.raises(
        ConfigError, match="INPUT.FORMAT is RGB, the weights' is BGR.*WEIGHTS_INPUT"
    ):
        guards_of(cfg).check_origin(origin, "R-50-GN")
    guards_of(config(R50)).check_origin(origin, "R-50-GN")


def test_stride():
    cfg = config(R50, "MODEL.RESNETS.STRIDE_IN_1X1", True)
    origin = Origin.of_name("catalog://ImageNetPretrained/FAIR/R-50-GN")
    with pytest.raises(ConfigError, match="STRIDE_IN_1X1 is True, but R-50-GN .* with False"):
        guards_of(cfg).check_origin(origin, "R-50-GN")
    cfg.GUARDS.WEIGHTS_STRIDE = False
    guards_of(cfg).check_origin(origin, "R-50-GN")
    r18 = config(R18, "MODEL.PIXEL_STD", [1.0] * 3, "MODEL.RESNETS.STRIDE_IN_1X1", True)
    guards_of(config(R50)).check_origin(guards_of(r18).ours, "R18")  # has no bottleneck blocks


@pytest.mark.parametrize(
    "name, input_format, std, stride_in_1x1",
    [
        ("detectron2://ImageNetPretrained/MSRA/R-50.pkl", "BGR", 1.0, True),
        ("catalog://ImageNetPretrained/MSRA/R-101", "BGR", 1.0, True),
        ("https://host/ImageNetPretrained/47261647/R-50-GN.pkl", "BGR", 1.0, False),
        ("https://host/ImageNetPretrained/47592356/R-101-GN.pkl?query=1", "BGR", 1.0, False),
        ("detectron2://ImageNetPretrained/torchvision/R-50.pkl", "RGB", 58.395, False),
        ("detectron2://ImageNetPretrained/FAIR/X-101-32x8d.pkl", "BGR", 57.375, False),
        (
            "detectron2://Misc/scratch_mask_rcnn_R_50_FPN_9x_gn/183808979/model_final_da7b4c.pkl",
            *("BGR", 57.375, False),
        ),
    ],
)
def test_known_weights(name, input_format, std, stride_in_1x1):
    origin = Origin.of_name(name)
    assert (origin.input_format, origin.stride_in_1x1) == (input_format, stride_in_1x1)
    assert origin.pixel_std[0] == std
    assert origin.pixel_mean[0] == (103.53 if input_format == "BGR" else 123.675)


def test_unknown_weights():
    assert Origin.of_name("output/model_final.pth") is None
    assert Origin.of_name("converted/timm/R-50-GN.pkl") is None  # a name alone proves nothing


def test_weights_of_a_known_name_are_checked_when_they_are_loaded():
    """Also where nothing is trained."""
    checkpointer = Checkpointer(build_model(config(R18)), guards=guards_of(config(R18)))
    name = "detectron2://Misc/scratch_mask_rcnn_R_50_FPN_3x_gn/138602908/model_final_01ca85.pkl"
    with pytest.raises(ConfigError, match="PIXEL_STD is .* the weights' is"):
        checkpointer.load(name)  # before it is downloaded
