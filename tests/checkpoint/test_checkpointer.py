"""Weights that fit by name and shape, and do not fit."""

import re
from contextlib import nullcontext

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from helpers import config, randomize

from gn_detect.checkpoint import (
    Checkpointer,
    Origin,
    WeightGuards,
    Weights,
    WeightsError,
    read_weights,
)
from gn_detect.checkpoint.convert import convert
from gn_detect.checkpoint.origin import same
from gn_detect.config import ConfigError

guards_of = WeightGuards.from_config

R50 = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x.yaml"
R18 = "quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml"
# An R-50 Mask R-CNN of 0.6 million parameters: one that is an eighth as wide.
SMALL = ["MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.GN.NUM_GROUPS", 4]
SMALL += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 8]
for key in ("FPN.OUT_CHANNELS", "ROI_BOX_HEAD.CONV_DIM", "ROI_MASK_HEAD.CONV_DIM"):
    SMALL += [f"MODEL.{key}", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 32]
NORMS = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")


def small(*opts):
    return config(R18, *SMALL, *opts)


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


@pytest.mark.parametrize("wrapper", ["", "module."])
def test_bn_weights_into_gn_are_refused(wrapper, tmp_path):
    weights = save(small(*all_norms("BN")), tmp_path)
    state = torch.load(weights)["model"]
    torch.save({"model": {f"{wrapper}{k}": v for k, v in state.items()}}, weights)
    with pytest.raises(ConfigError, match=r"weights.pth was trained with BN in 69 layers") as error:
        load(small(), weights)
    assert "backbone.fpn_lateral2.norm" in str(error.value)
    load(small("GUARDS.BN_WEIGHTS_INTO_GN", False), weights)
    load(small(*all_norms("BN")), weights)


def test_convolutions_alone_of_batch_norm(tmp_path, caplog):
    cfg = small("MODEL.RESNETS.NORM", "BN")
    bn = randomize(build_model(cfg))
    DetectionCheckpointer(bn, str(tmp_path)).save("weights")
    model = build_model(small())
    guards = guards_of(small("GUARDS.BN_WEIGHTS_INTO_GN", False))
    Checkpointer(model, guards=guards).load(str(tmp_path / "weights.pth"))
    theirs, norms = bn.state_dict(), 0
    for name, value in model.state_dict().items():
        if "bottom_up" in name and ".norm." in name:
            norms += 1
            assert torch.equal(value, torch.full_like(value, name.endswith("weight")))
        else:
            assert torch.equal(value, theirs[name])
    assert norms == 106
    assert "gamma and beta of 53 layers of BN that are GN here are left out" in caplog.text


@pytest.mark.parametrize(
    "opts, switch, message",
    [
        (["INPUT.FORMAT", "RGB"], "WEIGHTS_INPUT", "INPUT.FORMAT is RGB, the weights' is BGR"),
        (["MODEL.RESNETS.STRIDE_IN_1X1", True], "WEIGHTS_STRIDE", "IN_1X1 is True, but .* False"),
    ],
)
def test_known_weights_of_another_input_or_stride(opts, switch, message):
    origin = Origin.of_name("catalog://ImageNetPretrained/FAIR/R-50-GN")
    guards_of(config(R50)).check_origin(origin, "R-50-GN")
    with pytest.raises(ConfigError, match=f"{message}.*set GUARDS.{switch} False"):
        guards_of(config(R50, *opts)).check_origin(origin, "R-50-GN")
    guards_of(config(R50, *opts, f"GUARDS.{switch}", False)).check_origin(origin, "R-50-GN")


def test_basic_blocks_have_no_stride_in_1x1():
    r18 = config(R18, "MODEL.PIXEL_STD", [1.0] * 3, "MODEL.RESNETS.STRIDE_IN_1X1", True)
    guards_of(config(R50)).check_origin(guards_of(r18).ours, "R18")


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
        ("http://h/syqiao/WeightStandardization/R-50-GN-WS.pth.tar", "RGB", 58.395, False),
        ("https://host/pretrain/third_party/resnet50_gn-9186a21c.pth", "BGR", 1.0, False),
        ("https://h/third_party/resnext101_32x4d_gn_ws-34ac1a9e.pth", "RGB", 58.395, False),
        ("detectron2://Misc/scratch_mask_rcnn_R_50_FPN_9x_gn/1/m.pkl", "BGR", 57.375, False),
    ],
)
def test_known_weights(name, input_format, std, stride_in_1x1):
    origin = Origin.of_name(name)
    assert (origin.input_format, origin.stride_in_1x1) == (input_format, stride_in_1x1)
    assert origin.pixel_std[0] == std
    assert origin.pixel_mean[0] == (103.53 if input_format == "BGR" else 123.675)


@pytest.mark.parametrize("factor, expected", [(0.991, True), (1.009, True), (0.98, False)])
def test_pixels_agree_but_for_rounding(factor, expected):
    """Detectron's mean is 102.9801, torchvision's 103.53; other channels differ by 6 %."""
    mean = (103.53, 116.28, 123.675)
    for channel in range(3):
        theirs = tuple(v * (factor if i == channel else 1) for i, v in enumerate(mean))
        assert same(mean, theirs) is expected
        message = "PIXEL_MEAN is .103.53, 116.28, 123.675., the"
        with nullcontext() if expected else pytest.raises(ConfigError, match=message):
            guards_of(config(R50)).check_origin(Origin("BGR", theirs, (1.0, 1.0, 1.0)), "R-50")
    assert not same(mean, mean[::-1]) and not same(mean, mean[:1])


@pytest.mark.parametrize("array", [np.zeros(2, ">f4"), np.zeros(2, "g")])
def test_arrays_that_are_no_tensors(array):
    with pytest.raises(WeightsError, match="file: 'stem.conv1.weight' in it is an array of dtype"):
        convert({"stem.conv1.weight": array}, "file")


def test_a_name_alone_proves_nothing():
    for name in ("output/model_final.pth", "converted/timm/R-50-GN.pkl", "down/R-50-GN-WS.pth.tar"):
        assert Origin.of_name(name) is None


def test_weights_of_a_known_name_are_checked_when_they_are_loaded():
    """Also where nothing is trained."""
    checkpointer = Checkpointer(build_model(small()), guards=guards_of(small()))
    name = "detectron2://Misc/scratch_mask_rcnn_R_50_FPN_3x_gn/138602908/model_final_01ca85.pkl"
    with pytest.raises(ConfigError, match="PIXEL_STD is .* the weights' is"):
        checkpointer.load(name)  # before it is downloaded


def own(cfg, path):
    """A checkpoint of this project."""
    Checkpointer(build_model(cfg), str(path), guards=guards_of(cfg)).save("weights")
    return str(path / "weights.pth")


AUTHORS, TIMM = (["MODEL.GN.WEIGHT_STANDARDIZATION", v] for v in ("authors", "timm"))
EIGHT_GROUPS = ["MODEL.GN.NUM_GROUPS", 8]
BY_CHANNELS = ["MODEL.GN.NUM_GROUPS", 0, "MODEL.GN.CHANNELS_PER_GROUP", 4]
DEEPER = ["MODEL.RESNETS.DEPTH", 101]


@pytest.mark.parametrize(
    "theirs, ours, switch, message",
    [
        ([], ["MODEL.PIXEL_STD", [1.0] * 3], "WEIGHTS_INPUT", r"is \[1.0, 1.0, 1.0\], .* is \[57"),
        (AUTHORS, TIMM, "WEIGHTS_NORM", r"with Weight Standardization \(authors\), .* \(timm\)"),
        (AUTHORS, [], "WEIGHTS_NORM", "the model has no Weight Standardization: set MODEL.GN"),
        (EIGHT_GROUPS, [], "WEIGHTS_NORM", "norm has 4 groups of 8 .* trained with 8 groups"),
        (BY_CHANNELS, [], "WEIGHTS_NORM", "trained with 4 channels per group"),
        (
            *(["MODEL.RESNETS.NORM", "FrozenBN"], [], "BN_WEIGHTS_INTO_GN"),
            "BN in 53 layers .* such as backbone.bottom_up.stem",
        ),
        (
            *(["MODEL.RESNETS.NORM", "BN"], ["MODEL.RESNETS.NORM", "LN2d"], "BN_WEIGHTS_INTO_GN"),
            "BN in 53 layers that are LN2d here",
        ),
        # Their gamma and beta would fit, with statistics of no data.
        (
            *([], ["MODEL.RESNETS.NORM", "FrozenBN"], "WEIGHTS_NORM"),
            "without BN in 53 layers that are FrozenBatchNorm2d",
        ),
        ([], DEEPER, "WEIGHTS_COVERAGE", "another backbone .* 153 of its parameters, .*res4.6"),
        # Though all parameters of the model are in them.
        (DEEPER, [], "WEIGHTS_COVERAGE", "it has 51 further layers, such as .*res4.6.conv1"),
    ],
)
def test_weights_of_another_network_are_refused(theirs, ours, switch, message, tmp_path):
    """What they were trained with travels with them."""
    weights = own(small(*theirs), tmp_path)
    load(small(*theirs), weights)
    with pytest.raises(ConfigError, match=f"{message}.*set GUARDS.{switch} False"):
        load(small(*ours), weights)
    load(small(*ours, f"GUARDS.{switch}", False), weights)


def test_detectron2_reads_our_checkpoints(tmp_path):
    DetectionCheckpointer(build_model(small())).load(own(small(), tmp_path))


BOX, MASK = "roi_heads.box_predictor", "roi_heads.mask_head.predictor"


def pair(name, opts, their_opts, given=""):
    """A config, its model, and of the weights of another config's those whose names match."""
    configs = [config(name, "MODEL.DEVICE", "meta", *o) for o in (opts, their_opts)]
    ours, theirs = map(build_model, configs)
    state = {n: t for n, t in theirs.state_dict().items() if re.match(given, n)}
    return guards_of(configs[0]), ours, Weights("Detectron2", state, partial=False)


@pytest.mark.parametrize(
    "name, opts, their_opts, given, message",
    [
        (
            *(R18, ["MODEL.ROI_HEADS.NUM_CLASSES", 3], ["MODEL.ROI_HEADS.NUM_CLASSES", 2], ""),
            f"box head ({BOX}.cls_score, {BOX}.bbox_pred); mask head ({MASK}). It has 2 classes, "
            "the model has 3. ",
        ),
        (
            "COCO-InstanceSegmentation/cascade_mask_rcnn_R_50_FPN_gn_3x.yaml",
            *([], ["MODEL.ROI_HEADS.NUM_CLASSES", 81], "(?!.*mask)"),
            f"box head ({BOX}.0.cls_score, {BOX}.1.cls_score, {BOX}.2.cls_score); mask head. It "
            "has 81 classes, the model has 80. ",
        ),
        (
            *("COCO-Detection/retinanet_R_50_FPN_gn_3x.yaml", ["MODEL.RETINANET.NUM_CLASSES", 3]),
            *([], ""),
            "RetinaNet head (head.cls_score). It has 80 classes, the model has 3. ",
        ),
        (R18, [], [], r"backbone\.bottom_up\.", "model: FPN; RPN; box head; mask head. These "),
        (R18, [], [], r"(?!.*fpn_\w+3\.weight)", "FPN (backbone.fpn_lateral3, backbone.fpn_out"),
        (
            *(R18, ["MODEL.FPN.NORM", "BN"], ["MODEL.FPN.NORM", "BN"], r"(?!.*lateral2.*var)"),
            "model: FPN (backbone.fpn_lateral2.norm). These",
        ),
    ],
    ids=["classes", "cascade", "RetinaNet", "backbone", "layers", "statistics"],
)
def test_evaluation_needs_all_of_a_model(name, opts, their_opts, given, message, caplog):
    """Random layers have no result that means anything; training begins with them."""
    guards, model, weights = pair(name, opts, their_opts, given)
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        Checkpointer(model, guards=guards, evaluation=True).check(weights, "weights.pth")
    assert str(error.value).startswith("weights.pth does not give, or not in the shape of this")
    assert not [r for r in caplog.records if "afresh" in r.message]
    Checkpointer(model, guards=guards).check(weights, "weights.pth")
    (record,) = [r for r in caplog.records if "afresh" in r.message]
    assert record.levelname == "WARNING" and message[:-7] in record.message


def test_evaluation_needs_no_constants():
    """Nor what only training counts."""
    bn = all_norms("BN")
    guards, model, weights = pair(R18, bn, bn, "(?!.*num_batches_tracked)")
    model.register_buffer("pixel_mean", torch.zeros(3, 1, 1))  # as in Detectron2 in 2020
    Checkpointer(model, guards=guards, evaluation=True).check(weights, "weights.pth")


def test_a_part_of_the_last_checkpoint_can_be_evaluated(tmp_path):
    """Boxes alone; a run goes on with all of it, or not at all."""
    cfg = small()
    Checkpointer(build_model(cfg), str(tmp_path), guards=guards_of(cfg)).save("model_final")
    cfg = small("MODEL.MASK_ON", False)
    path, model = str(tmp_path / "model_final.pth"), build_model(cfg)
    arguments = {"guards": guards_of(cfg)}
    evaluated = Checkpointer(model, str(tmp_path), evaluation=True, **arguments)
    evaluated.resume_or_load(path, resume=False)
    evaluated.resume_or_load("", resume=True)
    with pytest.raises(ConfigError, match=f"--resume: {path} is of another model than this run"):
        Checkpointer(model, str(tmp_path), **arguments).resume_or_load("", resume=True)


def test_heads_of_other_classes_are_dropped_and_named(tmp_path, caplog):
    weights = own(small("MODEL.ROI_HEADS.NUM_CLASSES", 3), tmp_path)
    theirs = torch.load(weights)["model"]
    cfg = small()
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
    model = build_model(small())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    checkpointer = Checkpointer(model, str(tmp_path), guards=guards_of(small()), o=optimizer)
    checkpointer.save("weights", iteration=7)
    optimizer.param_groups[0]["lr"] = 0.1
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 7
    assert optimizer.param_groups[0]["lr"] == 0.3
    optimizer.param_groups[0]["lr"] = 0.1
    rest = checkpointer.resume_or_load(str(tmp_path / "weights.pth"), resume=False)
    assert optimizer.param_groups[0]["lr"] == 0.1 and rest["iteration"] == 7


def test_weights_that_are_not_finite_are_refused(tmp_path):
    weights = own(small(), tmp_path)
    content = torch.load(weights)
    content["model"]["backbone.fpn_lateral2.weight"][0] = float("nan")
    torch.save(content, weights)
    with pytest.raises(ConfigError, match="'backbone.fpn_lateral2.weight' has elements that"):
        load(small(), weights)


@pytest.mark.parametrize("key, query", [("", "?matching_heuristics=True"), ("model_state", "")])
def test_names_without_their_beginning(key, query, tmp_path):
    """Detectron2's query and, without it, pycls' checkpoints: names are matched by their ends."""
    cfg = small("GUARDS.WEIGHTS_COVERAGE", False)  # the stem is not in it
    model = build_model(cfg)
    state = model.backbone.bottom_up.state_dict()
    state = {k: torch.rand_like(v) for k, v in state.items() if k.startswith("res")}
    path = str(tmp_path / "weights.pyth")
    torch.save(state, path)
    with pytest.raises(ConfigError, match="are not those of a ResNet"):
        load(cfg, path)
    torch.save({key: state} if key else state, path)
    Checkpointer(model, guards=guards_of(cfg)).load(path + query)
    for name, value in state.items():
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
    Checkpointer(saved, str(tmp_path), guards=guards_of(small())).save("model_final")
    if content != "checkpoint":
        wrapper = "_orig_mod." if content == "compiled" else ""
        state = {f"{wrapper}{name}": value for name, value in saved.state_dict().items()}
        torch.save(state, tmp_path / "model_final.pth")
    checkpointer = Checkpointer(ours, str(tmp_path), guards=guards_of(small()))
    checkpointer.resume_or_load("", resume=True)
    assert torch.equal(ours.encoder.weight, saved.encoder.weight)


class Classifier(torch.nn.Module):
    """All of its names begin with that of a wrapper; behind it, they are torchvision's."""

    def __init__(self):
        super().__init__()
        self.model = torchvision.models.resnet18(norm_layer=lambda n: torch.nn.GroupNorm(8, n))


@pytest.mark.parametrize("name", ["model_final.pth", "model_final.safetensors"])
@pytest.mark.parametrize("model", [Classifier, lambda: Classifier().model], ids=["model.", ""])
def test_our_checkpoints_have_the_names_of_the_model(model, name, tmp_path):
    saved, ours = model(), model()
    checkpointer = Checkpointer(saved, str(tmp_path), guards=guards_of(small()))
    checkpointer.save("model_final", iteration=7)
    checkpointer.save_safetensors()
    weights = read_weights(str(tmp_path / name), ours.state_dict())
    assert weights.state.keys() == saved.state_dict().keys()
    assert weights.rest["iteration"] == 7 and weights.origin.num_groups == 8
    # For a detector they are what their names say, of the origin that the checkpoint states.
    mean = {"pixel_mean": (1.0, 2, 3)}
    saved_origin = {"model": saved.state_dict(), "origin": mean}
    weights = convert(saved_origin, name, build_model(small()).state_dict())
    assert weights.format == "torchvision" and "res2.0.conv1.weight" in weights.state
    assert weights.origin.pixel_mean == (1.0, 2, 3) and weights.origin.input_format == "RGB"


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
        ({"metadata": {"gn_detect.batch_norms": "[" * 100_000}}, "batch_norms in .* is no JSON"),
    ],
)
def test_what_is_beside_the_weights(beside, message, tmp_path):
    weights = save(small(), tmp_path)
    torch.save({**torch.load(weights), **beside}, weights)
    if message is None:
        load(small(), weights)
    else:
        with pytest.raises(ConfigError, match=message):
            load(small(), weights)


def test_the_origin_of_a_name_goes_before_that_of_a_format(tmp_path, monkeypatch):
    """timm has a ResNet of torchvision's layout that was trained with another mean."""
    cfg = small("GUARDS.BN_WEIGHTS_INTO_GN", False)
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
    load(small(), save(small(), tmp_path))
    assert (
        "does not say with which input_format, pixel_mean, pixel_std, stride_in_1x1, num_groups it"
        in caplog.text
    )
    caplog.clear()
    load(small(), own(small(), tmp_path))
    assert not caplog.records
