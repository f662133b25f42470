"""Classifiers of timm and torchvision against the backbones that their weights make."""

import functools

import pytest
import timm
import torch
import torchvision
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import build_backbone
from helpers import config, randomize

from gn_detect.checkpoint import WeightsError
from gn_detect.checkpoint.convert import convert
from gn_detect.checkpoint.convert.torchvision import original_name, rename
from gn_detect.checkpoint.coverage import cover
from gn_detect.checkpoint.origin import IMAGENET, Origin

pytestmark = pytest.mark.slow

C4 = "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_gn_3x.yaml"
NAMES = [f"layer{i}" for i in range(1, 5)]
NORM = functools.partial(torch.nn.GroupNorm, 32)


OUT = ["res2", "res3", "res4", "res5"]


def backbone_of(depth=50, *opts):
    """A ResNet with GN, its last stage included."""
    opts = ["MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.OUT_FEATURES", OUT, *opts]
    if depth < 50:
        opts += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
    return build_backbone(config(C4, *opts), ShapeSpec(channels=3)).eval()


CLASSIFIERS = {
    "timm resnet50_gn": (lambda: timm.create_model("resnet50_gn"), 50),
    "torchvision R-50": (lambda: torchvision.models.resnet50(norm_layer=NORM), 50),
    "torchvision R-101": (lambda: torchvision.models.resnet101(norm_layer=NORM), 101),
    "torchvision R-18": (lambda: torchvision.models.resnet18(norm_layer=NORM), 18),
}


def features(classifier, image):
    """Outputs of the four stages, by hooks on the classifier's own forward."""
    outputs = []
    hooks = [
        classifier.get_submodule(name).register_forward_hook(lambda m, i, o: outputs.append(o))
        for name in NAMES
    ]
    classifier(image)
    for hook in hooks:
        hook.remove()
    return dict(zip(OUT, outputs, strict=True))


@pytest.mark.parametrize("name", CLASSIFIERS)
@torch.no_grad()
def test_features_are_those_of_the_classifier(name):
    make, depth = CLASSIFIERS[name]
    torch.manual_seed(0)
    classifier = randomize(make().eval())
    weights = convert(classifier.state_dict(), name)
    assert weights.format == "torchvision" and weights.left_out == ["fc.weight", "fc.bias"]
    assert weights.origin.stride_in_1x1 is (False if depth >= 50 else None)
    backbone = backbone_of(depth)
    coverage = cover(weights, backbone)
    assert not (coverage.missing or coverage.mismatched or coverage.unexpected)
    backbone.load_state_dict(coverage.loaded)  # strict: all of it
    for height, width in [(64, 64), (65, 97)]:
        image = torch.randn(1, 3, height, width)
        expected = features(classifier, image)
        torch.testing.assert_close(backbone(image), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_authors_of_weight_standardization():
    """Their file is the state dict of a DataParallel ResNet whose convolutions standardize
    themselves (joe-siyuan-qiao/pytorch-classification, models/layers/conv2d.py)."""
    torch.manual_seed(0)
    classifier = randomize(torchvision.models.resnet50(norm_layer=NORM).double().eval())
    state = {f"module.{k}": v.clone() for k, v in classifier.state_dict().items()}
    weights = convert(state, "R-50-GN-WS.pth.tar")
    backbone = backbone_of(50, "MODEL.GN.WEIGHT_STANDARDIZATION", "authors").double()
    backbone.load_state_dict(cover(weights, backbone).loaded)
    for module in classifier.modules():
        if isinstance(module, torch.nn.Conv2d):
            weight = module.weight.flatten(1)
            weight = (weight - weight.mean(1, keepdim=True)) / (weight.std(1, keepdim=True) + 1e-5)
            module.weight.copy_(weight.reshape(module.weight.shape))
    image = torch.randn(1, 3, 33, 48).double()
    torch.testing.assert_close(backbone(image), features(classifier, image), rtol=0, atol=1e-9)


class GroupNormOfFu(torch.nn.Module):
    """chengyangfu/pytorch-groupnormalization, group_norm.py: GroupNorm2d(channels, 32)."""

    def __init__(self, channels):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(channels // 32) + 0.5)
        self.bias = torch.nn.Parameter(torch.randn(channels // 32))

    def forward(self, x):
        groups = x.reshape(len(x), len(self.weight), -1)
        groups = (groups - groups.mean(2, True)) / (
            groups.var(2, False, keepdim=True) + 1e-5
        ).sqrt()
        return (groups * self.weight[:, None] + self.bias[:, None]).reshape(x.shape)


@torch.no_grad()
def test_gamma_and_beta_of_groups():
    torch.manual_seed(0)
    classifier = torchvision.models.resnet50(norm_layer=GroupNormOfFu).double().eval()
    state = {f"module.{k}": v for k, v in classifier.state_dict().items()}
    weights = convert({"state_dict": state, "arch": "resnet50"}, "resnet50_groupnorm32.tar")
    groups = {"num_groups": None, "channels_per_group": 32}
    assert weights.origin == Origin(**IMAGENET, stride_in_1x1=False, **groups)
    known = Origin.of_name("http://www.cs.unc.edu/~cyfu/resnet50_groupnorm32.tar")
    whole = known.completed_by(weights.origin)
    assert whole == Origin(**IMAGENET, stride_in_1x1=False, weight_standardization="", **groups)
    opts = ["MODEL.GN.NUM_GROUPS", 0, "MODEL.GN.CHANNELS_PER_GROUP", 32]
    backbone = backbone_of(50, *opts).double()
    backbone.load_state_dict(cover(weights, backbone).loaded)
    image = torch.randn(1, 3, 33, 48).double()
    torch.testing.assert_close(backbone(image), features(classifier, image), rtol=0, atol=1e-9)


RESNET_18 = torchvision.models.resnet18(norm_layer=NORM).state_dict()


def test_backbone_of_mmdetection():
    """Its norms are called gn1, and it does not say which input it was trained with."""
    renamed = {k.replace("bn", "gn"): v for k, v in RESNET_18.items()}
    weights = convert({"state_dict": renamed, "meta": {}}, "mmdetection")
    assert weights.state.keys() == convert(RESNET_18, "torchvision").state.keys()
    assert weights.origin.input_format is None


@pytest.mark.parametrize("prefix", ["backbone.", "backbone.body."])
def test_backbones_of_mmpretrain_and_of_torchvisions_detectors(prefix):
    others = {"head.fc.weight": torch.zeros(1), "rpn.x": torch.zeros(1)}
    weights = convert({**{f"{prefix}{k}": v for k, v in RESNET_18.items()}, **others}, "file")
    assert weights.state.keys() == convert(RESNET_18, "torchvision").state.keys()
    assert set(weights.left_out) >= {"head.fc.weight"}


@pytest.mark.parametrize("name", ["convnext_atto", "regnetx_002", "vit_tiny_patch16_224"])
def test_other_networks_are_refused(name):
    with pytest.raises(WeightsError, match="are not those of a ResNet"):
        convert(timm.create_model(name).state_dict(), name)


def test_training_checkpoint_of_torchvision():
    """references/classification/train.py"""
    weights = convert({"model": RESNET_18, "epoch": 90, "optimizer": {}}, "checkpoint.pth")
    assert len(weights.state) == len(RESNET_18) - 2
    assert weights.origin == Origin(**IMAGENET)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "model._orig_mod.", "module.model."])
def test_prefixes_of_all_names_are_left_out_and_said(prefix, caplog):
    """Of DDP, of torch.compile, and of most modules of Lightning."""
    caplog.set_level("INFO", "gn_detect")
    weights = convert({"state_dict": {prefix + k: v for k, v in RESNET_18.items()}}, "last.ckpt")
    assert weights.state.keys() == convert(RESNET_18, "torchvision").state.keys()
    said = [f"last.ckpt: the prefix {prefix!r} of all its names is left out"]
    assert caplog.messages == (said if prefix else [])


def test_batch_norm_is_told():
    weights = convert(torchvision.models.resnet18().state_dict(), "resnet18")
    assert len(weights.batch_norms) == 20 and "res3.0.shortcut.norm" in weights.batch_norms


@pytest.mark.parametrize(
    "name, layer", [("resnet26d", "conv1.0.weight"), ("seresnet50", "layer1.0.se.fc1.weight")]
)
def test_another_variant_is_refused(name, layer):
    with pytest.raises(WeightsError, match=f"{layer} has no place in Detectron2's ResNet"):
        convert(timm.create_model(name).state_dict(), name)


def test_names_go_both_ways():
    names = set(timm.create_model("resnet50_gn", num_classes=0).state_dict())
    renamed = {rename(name) for name in names}
    assert len(renamed) == len(names) and None not in renamed
    assert {original_name(name) for name in renamed} == names
    assert original_name("fpn_lateral2.weight") is None
