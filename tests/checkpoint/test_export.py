"""Backbones that leave Detectron2, against the classifiers of timm and torchvision."""

import dataclasses
import functools
import re

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.backbone import build_resnet_backbone
from helpers import config, randomize

import gn_detect
from gn_detect.checkpoint import Origin, WeightGuards, Weights, WeightsError, read_weights
from gn_detect.checkpoint.convert import convert
from gn_detect.checkpoint.export import export_backbone, write_state_dict, write_weights
from gn_detect.checkpoint.origin import DETECTRON, IMAGENET
from gn_detect.engine.lazy_config import load_lazy_config
from gn_detect.modeling.resnet import build_gn_resnet_backbone

pytestmark = pytest.mark.slow

R18 = "quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml"
C4 = "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_gn_3x.yaml"
NORM = functools.partial(torch.nn.GroupNorm, 32)
STAGES = ["res2", "res3", "res4", "res5"]
CLASSIFIERS = {
    "timm": lambda: timm.create_model("resnet50_gn", num_classes=0),
    "torchvision": lambda: without_classifier(torchvision.models.resnet50(norm_layer=NORM)),
}


def without_classifier(model):
    model.fc = torch.nn.Identity()
    return model.eval()


@pytest.mark.parametrize("layout, extension", [("timm", ".safetensors"), ("torchvision", ".pth")])
def test_round_trip_is_bit_equal(layout, extension, tmp_path):
    """From the classifier to us, back into a file for it, and to us again."""
    torch.manual_seed(0)
    classifier = randomize(CLASSIFIERS[layout]())
    ours = convert(classifier.state_dict(), layout)
    path = str(tmp_path / f"backbone{extension}")
    write_state_dict(path, export_backbone(ours, "ours"))
    again = read_weights(path)
    assert again.state.keys() == ours.state.keys() and again.origin == ours.origin
    assert all(torch.equal(tensor, ours.state[name]) for name, tensor in again.state.items())
    left = CLASSIFIERS[layout]()
    load = torch.load if extension == ".pth" else safetensors.torch.load_file
    left.load_state_dict(load(path))  # strict: all of it, and nothing else
    pairs = zip(left.parameters(), classifier.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", [R18, C4], ids=["FPN", "C4"])
def test_backbone_of_a_detector(name):
    """Also where the last stage is in the RoI heads."""
    model = randomize(build_model(config(name)))
    origin = Origin(**IMAGENET, stride_in_1x1=False)
    exported = export_backbone(Weights("Detectron2", model.state_dict(), False, origin), "file")
    classifier = torchvision.models.resnet50 if name == C4 else torchvision.models.resnet18
    classifier = without_classifier(classifier(norm_layer=NORM))
    classifier.load_state_dict(exported)
    stages = model.roi_heads if name == C4 else model.backbone.bottom_up
    assert torch.equal(classifier.layer4[-1].conv2.weight, stages.res5[-1].conv2.weight)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["", "authors", "timm"])
def test_another_input_and_weight_standardization_are_folded_in(variant):
    """A backbone for BGR pixels that are not divided, in a classifier for RGB ones that are."""
    torch.manual_seed(0)
    opts = ["MODEL.RESNETS.OUT_FEATURES", STAGES, "MODEL.GN.WEIGHT_STANDARDIZATION", variant]
    cfg = config(C4, *opts)
    ours = randomize(build_gn_resnet_backbone(cfg, ShapeSpec(channels=3))).double().eval()
    origin = Origin(**DETECTRON, stride_in_1x1=False, weight_standardization=variant)
    exported = export_backbone(Weights("Detectron2", ours.state_dict(), True, origin), "file")
    classifier = without_classifier(torchvision.models.resnet50(norm_layer=NORM)).double()
    classifier.load_state_dict(exported)
    rgb = 255 * torch.rand(1, 3, 33, 48).double()
    bgr = rgb.flip(1)

    def normalized(image, values):
        mean, std = (torch.tensor(values[f"pixel_{k}"]).double() for k in ("mean", "std"))
        return (image - mean[:, None, None]) / std[:, None, None]

    expected = ours(normalized(bgr, DETECTRON))["res5"].mean((2, 3))  # as the classifier pools
    # Deviations are kept in float32.
    torch.testing.assert_close(
        classifier(normalized(rgb, IMAGENET)), expected, rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ["18_gn", "50_gn_ws"])
def test_a_classifier_with_its_last_layer(name):
    """The logits of timm's, of the same pixels."""
    path = gn_detect.get_config_file(f"lazy/ImageNet/resnet_{name}.py")
    cfg = load_lazy_config(path, ["model.num_classes=5"])
    torch.manual_seed(0)
    ours = randomize(instantiate(cfg.model)).double().eval()
    variant = "authors" if name == "50_gn_ws" else ""
    origin = dataclasses.replace(
        WeightGuards.from_config(cfg).ours, weight_standardization=variant, num_groups=32
    )
    exported = export_backbone(Weights("Detectron2", ours.state_dict(), True, origin), "file")
    depth = name[:2]
    timms = timm.create_model(f"resnet{depth}", norm_layer="groupnorm", num_classes=5).double()
    timms.load_state_dict(exported)
    rgb = torch.randint(0, 256, (2, 3, 65, 48), dtype=torch.uint8)
    mean, std = (torch.tensor(IMAGENET[f"pixel_{k}"]).view(3, 1, 1) for k in ("mean", "std"))
    expected = timms.eval()(((rgb - mean) / std).double())
    assert expected.std() > 0.01
    scores = ours([{"image": image.flip(0)} for image in rgb])
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)
    again = convert(exported, "file", ours.state_dict())
    last = ours.linear.state_dict()
    assert all(torch.equal(again.state[f"linear.{n}"], tensor) for n, tensor in last.items())
    assert convert(exported, "file").left_out == ["fc.weight", "fc.bias"]  # for a detector


@pytest.mark.parametrize(
    "origin, message",
    [
        (Origin(), "does not say what input .* --config-file"),
        (Origin(**IMAGENET), "does not say .* where its blocks stride"),
        (Origin(**IMAGENET, stride_in_1x1=True), "strides in 1x1 convolutions"),
        (Origin("RGB", (127.5,) * 3, (127.5,) * 3, False), r"with the pixel mean \[127.5, 127.5"),
    ],
)
def test_what_a_classifier_cannot_compute_is_refused(origin, message):
    cfg = config(C4, "MODEL.RESNETS.OUT_FEATURES", STAGES)
    backbone = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    with pytest.raises(WeightsError, match=message):
        export_backbone(Weights("Detectron2", backbone.state_dict(), True, origin), "file")


STATE = convert(torchvision.models.resnet18(norm_layer=NORM).state_dict(), "resnet18").state


@pytest.mark.parametrize(
    "state, message",
    [
        ({"backbone.stages.0.weight": torch.zeros(1)}, "there is no whole ResNet in it"),
        (
            {name: tensor for name, tensor in STATE.items() if "res5" not in name},
            "no whole ResNet .* layer4.0.conv1.weight would be lacking",
        ),
        (
            {**STATE, "res3.0.conv2_offset.weight": torch.zeros(18, 128, 3, 3)},
            "res3.0.conv2_offset.weight has no place",
        ),
    ],
)
def test_what_a_classifier_does_not_have_is_refused(state, message):
    with pytest.raises(WeightsError, match=message):
        export_backbone(Weights("Detectron2", state, True, Origin(**IMAGENET)), "file")


@pytest.mark.parametrize("name", ["a.pth", "new folder/a.safetensors"])
def test_what_is_written_is_read_again(name, tmp_path):
    origin = Origin(**DETECTRON, stride_in_1x1=False, weight_standardization="timm", num_groups=8)
    state = {"fpn_lateral2.weight": torch.rand(3, 4, 1, 1), "backbone.x": torch.rand(2).half()}
    path = str(tmp_path / name)
    rest = {"iteration": 7, "metrics": {"bbox/AP": 1.5}, "config": "A: 1\n"}
    write_weights(
        path, Weights("Detectron2", state, True, origin, {"res2.0.conv1.norm"}, rest=rest)
    )
    weights = read_weights(path)
    assert weights.progress == {"iteration": 7, "metrics": {"bbox/AP": 1.5}}
    assert weights.rest["config"] == "A: 1\n"
    assert weights.origin == origin and weights.partial
    assert weights.batch_norms == {"res2.0.conv1.norm"} and not weights.rest.get("origin")
    assert all(torch.equal(weights.state[n], t) for n, t in state.items())


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.pth").mkdir()
    for name, message in (
        ("a.pkl", "weights are written as .pth or .safetensors"),
        ("file/a.pth", "there is no folder .*file"),
        ("folder.pth", "cannot be written: it is a folder"),
    ):
        with pytest.raises(WeightsError, match=message):
            write_state_dict(str(tmp_path / name), {"a": torch.zeros(1)})


@pytest.mark.parametrize(
    "origin, message",
    [
        (dict(num_groups=16), "has 16 groups: build norm_layer=partial.GroupNorm, 16"),
        (dict(channels_per_group=8), "has 8 channels per group: build norm_layer=lambda"),
        ({}, "does not say its groups"),
        (dict(num_groups=32), None),
    ],
)
def test_the_groups_are_said(origin, message, caplog):
    export_backbone(Weights("torchvision", STATE, origin=Origin(**IMAGENET, **origin)), "file")
    assert re.search(message, caplog.text) if message else not caplog.records
