"""Weights that fit by name and shape, and do not fit."""

import pickle

import pytest
import safetensors.torch
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.backbone import build_resnet_backbone
from helpers import config, randomize

from gn_detect.checkpoint import Checkpointer, Origin, WeightGuards
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


def test_convolutions_alone_of_batch_norm(tmp_path, caplog):
    cfg = config(R18, "MODEL.RESNETS.NORM", "BN")
    bn = randomize(build_model(cfg))
    DetectionCheckpointer(bn, str(tmp_path)).save("weights")
    model = build_model(config(R18))
    guards = guards_of(config(R18, "GUARDS.BN_WEIGHTS_INTO_GN", False))
    Checkpointer(model, guards=guards).load(str(tmp_path / "weights.pth"))
    theirs, norms = bn.state_dict(), 0
    for name, value in model.state_dict().items():
        if "bottom_up" in name and ".norm." in name:
            norms += 1
            assert torch.equal(value, torch.full_like(value, name.endswith("weight")))
        else:
            assert torch.equal(value, theirs[name])
    assert norms == 40
    assert "gamma and beta of 20 layers of BN that are GN here are left out" in caplog.text


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
        ("detectron://R-101-GN", "BGR", 1.0, False),
        ("timm://resnet50_gn.a1h_in1k", "RGB", 58.395, False),
        (
            "http://cs.jhu.edu/~syqiao/WeightStandardization/R-50-GN-WS.pth.tar",
            "RGB",
            58.395,
            False,
        ),
        ("https://host/pretrain/third_party/resnet50_gn-9186a21c.pth", "BGR", 1.0, False),
        ("https://h/third_party/resnext101_32x4d_gn_ws-34ac1a9e.pth", "RGB", 58.395, False),
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
    assert Origin.of_name("downloads/R-50-GN-WS.pth.tar") is None


def test_weights_of_a_known_name_are_checked_when_they_are_loaded():
    """Also where nothing is trained."""
    checkpointer = Checkpointer(build_model(config(R18)), guards=guards_of(config(R18)))
    name = "detectron2://Misc/scratch_mask_rcnn_R_50_FPN_3x_gn/138602908/model_final_01ca85.pkl"
    with pytest.raises(ConfigError, match="PIXEL_STD is .* the weights' is"):
        checkpointer.load(name)  # before it is downloaded


def own(cfg, path):
    """A checkpoint of this project."""
    Checkpointer(build_model(cfg), str(path), guards=guards_of(cfg)).save("weights")
    return str(path / "weights.pth")


def test_weight_standardization_and_groups_travel_with_the_weights(tmp_path):
    cfg = config(R18, "MODEL.GN.WEIGHT_STANDARDIZATION", "authors", "MODEL.GN.NUM_GROUPS", 8)
    weights = own(cfg, tmp_path)
    load(cfg, weights)
    with pytest.raises(ConfigError, match=r"with Weight Standardization \(authors\), .* \(timm\)"):
        load(config(R18, "MODEL.GN.WEIGHT_STANDARDIZATION", "timm"), weights)
    plain = config(R18, "MODEL.GN.NUM_GROUPS", 8)
    with pytest.raises(ConfigError, match="the model has no Weight Standardization: set MODEL.GN"):
        load(plain, weights)
    with pytest.raises(ConfigError, match="norm has 16 groups of 4 .* trained with 8 groups"):
        load(config(R18, "MODEL.GN.WEIGHT_STANDARDIZATION", "authors"), weights)
    plain.GUARDS.WEIGHTS_NORM = False
    load(plain, weights)


def test_channels_per_group(tmp_path):
    by_channels = ["MODEL.GN.NUM_GROUPS", 0, "MODEL.GN.CHANNELS_PER_GROUP", 16]
    weights = own(config(R18, *by_channels), tmp_path)
    load(config(R18, *by_channels), weights)
    with pytest.raises(ConfigError, match="trained with 16 channels per group"):
        load(config(R18), weights)


def test_weights_of_another_backbone_are_refused(tmp_path):
    weights = own(config(R18), tmp_path)
    deeper = config(R18, "MODEL.RESNETS.DEPTH", 34)
    with pytest.raises(ConfigError, match="another backbone .* 48 of its parameters, .*res2.2"):
        load(deeper, weights)
    deeper.GUARDS.WEIGHTS_COVERAGE = False
    load(deeper, weights)


def test_weights_of_a_deeper_backbone_are_refused(tmp_path):
    """Though all parameters of the model are in them."""
    weights = own(config(R18, "MODEL.RESNETS.DEPTH", 34), tmp_path)
    with pytest.raises(ConfigError, match="it has 16 further layers, such as .*res2.2.conv1"):
        load(config(R18), weights)


def test_heads_of_other_classes_are_dropped_and_named(tmp_path, caplog):
    weights = own(config(R18, "MODEL.ROI_HEADS.NUM_CLASSES", 3), tmp_path)
    theirs = torch.load(weights)["model"]
    cfg = config(R18)
    model = build_model(cfg)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    caplog.set_level("INFO")
    Checkpointer(model, guards=guards_of(cfg)).load(weights)
    dropped = {k for k, v in model.state_dict().items() if not torch.equal(v, theirs[k])}
    layers = ("box_predictor.cls_score", "box_predictor.bbox_pred", "mask_head.predictor")
    assert dropped == {f"roi_heads.{n}.{p}" for n in layers for p in ("weight", "bias")}
    assert all(torch.equal(model.state_dict()[k], before[k]) for k in dropped)
    for name in dropped:
        assert f"{name}: {list(theirs[name].shape)} in the file" in caplog.text


def test_a_checkpoint_resumes_its_training(tmp_path):
    """What else is in the file goes to its owner, or is returned."""
    cfg = config(R18)
    optimizer = torch.optim.SGD(build_model(cfg).parameters(), lr=0.3)
    checkpointer = Checkpointer(build_model(cfg), str(tmp_path), guards=guards_of(cfg), o=optimizer)
    checkpointer.save("weights", iteration=7)
    optimizer.param_groups[0]["lr"] = 0.1
    assert checkpointer.resume_or_load("", resume=True) == {"iteration": 7}
    assert optimizer.param_groups[0]["lr"] == 0.3
    optimizer.param_groups[0]["lr"] = 0.1
    rest = checkpointer.resume_or_load(str(tmp_path / "weights.pth"), resume=False)
    assert optimizer.param_groups[0]["lr"] == 0.1 and rest["iteration"] == 7


def test_weights_that_are_not_finite_are_refused(tmp_path):
    weights = own(config(R18), tmp_path)
    content = torch.load(weights)
    content["model"]["backbone.fpn_lateral2.weight"][0] = float("nan")
    torch.save(content, weights)
    with pytest.raises(
        ConfigError, match="'backbone.fpn_lateral2.weight' has elements that are NaN"
    ):
        load(config(R18), weights)


def test_names_without_their_beginning(tmp_path):
    """Detectron2's query; without it, such names are of another model."""
    cfg = config(R18)
    model = build_model(cfg)
    state = {k.removeprefix("backbone.bottom_up."): v for k, v in model.state_dict().items()}
    state = {f"stages.{k}": v for k, v in state.items() if k.startswith("res")}
    path = str(tmp_path / "weights.pth")
    torch.save({k.removeprefix("stages."): torch.rand_like(v) for k, v in state.items()}, path)
    cfg.GUARDS.WEIGHTS_COVERAGE = False  # the stem is not in it
    with pytest.raises(ConfigError, match="are not those of a ResNet"):
        load(cfg, path)
    Checkpointer(model, guards=guards_of(cfg)).load(f"{path}?matching_heuristics=True")
    for name, value in torch.load(path).items():
        assert torch.equal(model.state_dict()[f"backbone.bottom_up.{name}"], value)


class Encoder(torch.nn.Module):
    """No detector, and with a state that is no tensor."""

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Linear(3, 3)

    def get_extra_state(self):
        return {"calls": 7}

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize("content", ["checkpoint", "state dict", "compiled"])
def test_a_model_of_any_names_goes_on(content, tmp_path):
    saved, ours = Encoder(), Encoder()
    Checkpointer(saved, str(tmp_path), guards=guards_of(config(R18))).save("model_final")
    state = saved.state_dict()
    if content == "state dict":
        torch.save(state, tmp_path / "model_final.pth")
    elif content == "compiled":
        compiled = {f"_orig_mod.{name}": value for name, value in state.items()}
        torch.save(compiled, tmp_path / "model_final.pth")
    checkpointer = Checkpointer(ours, str(tmp_path), guards=guards_of(config(R18)))
    checkpointer.resume_or_load("", resume=True)
    assert torch.equal(ours.encoder.weight, saved.encoder.weight)


def test_a_checkpoint_of_pycls(tmp_path):
    """One of Detectron2's own formats: names are matched by their ends."""
    cfg = config(R18, "MODEL.RESNETS.NORM", "FrozenBN")
    model, theirs = build_model(cfg), build_model(cfg)
    backbone = dict(theirs.backbone.bottom_up.state_dict())
    before = model.backbone.bottom_up.res2[0].conv1.weight.clone()
    torch.save({"model_state": backbone}, tmp_path / "weights.pyth")
    Checkpointer(model, guards=guards_of(cfg)).load(str(tmp_path / "weights.pyth"))
    loaded = model.backbone.bottom_up.state_dict()
    assert loaded.keys() == backbone.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in backbone.items())
    assert not torch.equal(loaded["res2.0.conv1.weight"], before)


def test_weights_of_gn_for_batch_norm_are_refused(tmp_path):
    """Their gamma and beta would fit, with statistics of no data."""
    weights = own(config(R18), tmp_path)
    frozen = config(R18, "MODEL.RESNETS.NORM", "FrozenBN")
    with pytest.raises(ConfigError, match="without BN in 20 layers that are FrozenBatchNorm2d"):
        load(frozen, weights)
    frozen.GUARDS.WEIGHTS_NORM = False
    load(frozen, weights)


@pytest.mark.parametrize(
    "beside, message",
    [
        ({"metadata": None, "origin": "coco"}, None),
        ({"metadata": [1]}, None),
        ({"origin": {"pixel_mean": 3}}, "origin of its weights is wrong .pixel_mean is 3"),
        ({"origin": {"pixel_mean": ["a", 1, 2]}}, "pixel_mean is .'a', 1, 2"),
        ({"origin": {"num_groups": "32"}}, "num_groups is '32'"),
        ({"batch_norms": 3}, None),
        ({"metadata": {"gn_detect.origin": None}}, "gn_detect.origin in its metadata is no JSON"),
    ],
)
def test_what_is_beside_the_weights(beside, message, tmp_path):
    weights = save(config(R18), tmp_path)
    torch.save({**torch.load(weights), **beside}, weights)
    if message is None:
        load(config(R18), weights)
    else:
        with pytest.raises(ConfigError, match=message):
            load(config(R18), weights)


def test_the_origin_of_a_name_goes_before_that_of_a_format(tmp_path, monkeypatch):
    """timm has a ResNet of torchvision's layout that was trained with another mean."""
    cfg = config(R18, "GUARDS.BN_WEIGHTS_INTO_GN", False)
    path = tmp_path / "cache/timm/resnet34.ra4_e3600_r224_in1k/resolve/main/model.safetensors"
    path.parent.mkdir(parents=True)
    safetensors.torch.save_file(torchvision.models.resnet18().state_dict(), path)
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    name = "timm://resnet34.ra4_e3600_r224_in1k"
    with pytest.raises(ConfigError, match=r"the weights' is \[127.5, 127.5, 127.5\]"):
        load(cfg, name)
    with pytest.raises(ConfigError, match=r"the weights' is \[123.675, 116.28, 103.53\]"):
        load(cfg, str(path))


def test_an_unknown_origin_is_said(tmp_path, caplog):
    load(config(R18), save(config(R18), tmp_path))
    assert (
        "does not say with which input_format, pixel_mean, pixel_std, num_groups it" in caplog.text
    )
    caplog.clear()
    load(config(R18), own(config(R18), tmp_path))
    assert not caplog.records
