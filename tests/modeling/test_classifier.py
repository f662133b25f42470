"""The classifier against torchvision's ResNets."""

import functools

import pytest
import torch
import torch.nn.functional as F
import torchvision
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from helpers import config, randomize
from torch import nn

import gn_detect
from gn_detect.checkpoint import Origin, Weights
from gn_detect.checkpoint.export import export_backbone
from gn_detect.checkpoint.origin import IMAGENET
from gn_detect.engine.lazy_config import load_lazy_config
from gn_detect.modeling.resnet import build_gn_resnet_backbone

NORM = functools.partial(nn.GroupNorm, 32)
STAGES = ["res2", "res3", "res4", "res5"]


def classifier(depth="18_gn", *overrides):
    path = gn_detect.get_config_file(f"lazy/ImageNet/resnet_{depth}.py")
    return instantiate(load_lazy_config(path, ["model.num_classes=7", *overrides]).model)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_scores_and_loss_are_those_of_torchvision(smoothing):
    """From the same BGR bytes: one normalizes them, the other's weights have the order RGB."""
    torch.manual_seed(0)
    ours = randomize(classifier("18_gn", f"model.label_smoothing={smoothing}")).double()
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    batch = [{"image": image, "label": i + 2} for i, image in enumerate(images)]
    origin = Origin("BGR", IMAGENET["pixel_mean"][::-1], IMAGENET["pixel_std"][::-1], None)
    weights = Weights("Detectron2", ours.state_dict(), True, origin)
    theirs = torchvision.models.resnet18(norm_layer=NORM, num_classes=7).double()
    theirs.load_state_dict(export_backbone(weights, "file"))
    mean, std = (torch.tensor(IMAGENET[f"pixel_{k}"]).view(3, 1, 1) for k in ("mean", "std"))
    expected = theirs(((images.flip(1) - mean) / std).double())
    torch.testing.assert_close(ours(batch)["loss_cls"], cross_entropy(expected, smoothing))
    torch.testing.assert_close(ours.eval()(batch), expected)


def cross_entropy(scores, smoothing):
    target = F.one_hot(torch.tensor([2, 3, 4]), 7) * (1 - smoothing) + smoothing / 7
    return -(target * scores.log_softmax(1)).sum(1).mean()


def test_its_names_are_those_of_a_backbone():
    cfg = config(
        "quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml", "MODEL.RESNETS.OUT_FEATURES", STAGES
    )
    with torch.device("meta"):
        ours = classifier().state_dict()
        backbone = build_gn_resnet_backbone(cfg, ShapeSpec(channels=3)).state_dict()
    shapes = {name: tensor.shape for name, tensor in ours.items()}
    assert shapes.pop("linear.weight") == (7, 512) and shapes.pop("linear.bias") == (7,)
    assert shapes == {name: tensor.shape for name, tensor in backbone.items()}


@pytest.mark.parametrize("depth", ["18_gn", "50_gn"])
def test_each_block_starts_as_the_identity(depth):
    model = classifier(depth)
    last = "conv3" if depth == "50_gn" else "conv2"
    gammas = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.GroupNorm)}
    zero = {name for name, gamma in gammas.items() if not gamma.any()}
    assert zero == {name for name in gammas if name.endswith(f".{last}.norm")}
    assert all((g == 1).all() for name, g in gammas.items() if name not in zero)
    assert classifier(depth, "model.zero_init=False").res2[0].conv2.norm.weight.all()


def test_mixed_images_have_mixed_labels():
    model = classifier()
    model.mix = lambda images, labels: (images[:1], torch.full((1, 7), 1 / 7))
    batch = [{"image": torch.zeros(3, 32, 32, dtype=torch.uint8), "label": i} for i in (0, 6)]
    scores = model.eval()(batch[:1])
    loss = model.train()(batch)["loss_cls"]
    torch.testing.assert_close(loss, -scores.log_softmax(1).mean())


@pytest.mark.parametrize(
    "overrides, norms",
    [
        (["model.stages.norm=BN"], {nn.BatchNorm2d}),
        (["model.stages.norm.num_groups=1"], {(1, 64), (1, 128), (1, 256), (1, 512)}),
        (
            ["model.stages.norm.num_groups=0", "model.stages.norm.channels_per_group=1"],
            {(64, 64), (128, 128), (256, 256), (512, 512)},
        ),
    ],
)
def test_one_override_exchanges_all_norms(overrides, norms):
    with torch.device("meta"):
        model = classifier("18_gn", *overrides)
    kinds = (nn.GroupNorm, nn.BatchNorm2d)
    found = {getattr(m, "norm", None) for m in model.modules()} - {None}
    assert len(found) == 20 and all(isinstance(norm, kinds) for norm in found)
    assert {
        type(norm) if isinstance(norm, nn.BatchNorm2d) else (norm.num_groups, norm.num_channels)
        for norm in found
    } == norms
