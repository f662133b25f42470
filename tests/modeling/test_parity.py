"""Our models against Detectron2's own with ``NORM: "GN"``: same keys, same numbers."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone, build_model
from detectron2.solver import build_optimizer
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from helpers import config
from torch import nn

from gn_detect.layers import GroupNorm


def detectron2_config(ours):
    """What Detectron2 alone builds for the same YAML: its own builders, without our keys."""
    cfg = get_cfg()
    for key in ("RESNETS", "FPN", "ANCHOR_GENERATOR", "RPN", "ROI_HEADS", "ROI_BOX_HEAD"):
        cfg.MODEL[key] = ours.MODEL[key].clone()
    cfg.MODEL.ROI_MASK_HEAD = ours.MODEL.ROI_MASK_HEAD.clone()
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.PIXEL_STD = ours.MODEL.PIXEL_STD
    cfg.MODEL.BACKBONE.FREEZE_AT = ours.MODEL.BACKBONE.FREEZE_AT
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RPN.HEAD_NAME = "StandardRPNHead"
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    return cfg


def training_batch():
    """Two images of different sizes, two objects each."""
    generator = torch.Generator().manual_seed(0)
    batch = []
    for height, width in ((64, 96), (80, 64)):
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor([[4.0, 6, 40, 50], [20, 20, 60, 60]]))
        instances.gt_classes = torch.tensor([1, 3])
        masks = torch.zeros(2, height, width, dtype=torch.bool)
        masks[0, 6:50, 4:40] = masks[1, 30:60, 20:50] = True
        instances.gt_masks = BitMasks(masks)
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch


@pytest.fixture(scope="module")
def r50_pair():
    """(ours, Detectron2's) of the R50-FPN config, with the same weights."""
    torch.manual_seed(0)
    cfg = config("COCO-InstanceSegmentation/scratch_mask_rcnn_R_50_FPN_gn_3x.yaml")
    cfg.INPUT.MASK_FORMAT = "bitmask"
    ours, theirs = build_model(cfg), build_model(detectron2_config(cfg))
    with torch.no_grad():
        for module in ours.modules():
            if isinstance(module, nn.GroupNorm):  # not the identity that they are born as
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.2, 0.2)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def test_same_keys_and_shapes(r50_pair):
    ours, theirs = ({k: v.shape for k, v in m.state_dict().items()} for m in r50_pair)
    assert list(ours.items()) == list(theirs.items())


def test_group_norm_layers_of_r50_fpn(r50_pair):
    ours, _ = r50_pair
    names = [n for n, m in ours.named_modules() if isinstance(m, GroupNorm)]
    prefixes = {
        "backbone.bottom_up.": 53,
        "backbone.fpn_": 8,
        "roi_heads.box_head.": 4,
        "roi_heads.mask_head.": 4,
    }
    assert {p: sum(n.startswith(p) for n in names) for p in prefixes} == prefixes
    assert len(names) == sum(isinstance(m, nn.GroupNorm) for m in ours.modules()) == 69


def test_same_losses_and_gradients(r50_pair):
    results = []
    for model in r50_pair:
        model.train().zero_grad()
        torch.manual_seed(1)  # proposals and RoIs are sampled
        with EventStorage():  # the model logs to one
            losses = model(training_batch())
        sum(losses.values()).backward()
        gradient = model.backbone.bottom_up.stem.conv1.norm.weight.grad.clone()
        results.append(({k: v.detach() for k, v in losses.items()}, gradient))
    (ours, our_gradient), (theirs, their_gradient) = results
    assert set(ours) == {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"}
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-6)


def test_same_inference(r50_pair):
    batch = [{k: v for k, v in d.items() if k != "instances"} for d in training_batch()]
    outputs = []
    for model in r50_pair:
        model.eval()
        threshold = model.roi_heads.box_predictor.test_score_thresh
        model.roi_heads.box_predictor.test_score_thresh = 0.0  # random weights are not confident
        with torch.no_grad():
            outputs.append([d["instances"] for d in model(batch)])
        model.roi_heads.box_predictor.test_score_thresh = threshold
    for ours, theirs in zip(*outputs, strict=True):
        assert len(ours) == len(theirs) > 0
        for field in ("scores", "pred_classes", "pred_masks"):
            torch.testing.assert_close(ours.get(field), theirs.get(field), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            ours.pred_boxes.tensor, theirs.pred_boxes.tensor, rtol=1e-4, atol=1e-3
        )


def test_no_weight_decay_on_gamma_and_beta(r50_pair):
    ours, _ = r50_pair
    cfg = config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x.yaml")
    assert cfg.SOLVER.WEIGHT_DECAY > 0
    decay = {
        id(p): group["weight_decay"]
        for group in build_optimizer(cfg, ours).param_groups
        for p in group["params"]
    }
    norms = [m for m in ours.modules() if isinstance(m, nn.GroupNorm)]
    parameters = [p for m in norms for p in (m.weight, m.bias)]
    assert len(parameters) == 138
    assert {decay[id(p)] for p in parameters} == {0.0}
    assert decay[id(ours.backbone.bottom_up.stem.conv1.weight)] == cfg.SOLVER.WEIGHT_DECAY


@pytest.mark.parametrize("depth", [18, 34, 101, 152])
def test_backbones_of_other_depths(depth):
    cfg = config(
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x.yaml",
        *("MODEL.RESNETS.DEPTH", depth),
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64 if depth < 50 else 256),
    )
    with torch.device("meta"):
        ours = build_backbone_by_name(cfg, "build_gn_resnet_backbone")
        theirs = build_backbone_by_name(cfg, "build_resnet_backbone")
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    norms = [m for m in ours.modules() if isinstance(m, GroupNorm)]
    convs = [m for m in ours.modules() if isinstance(m, nn.Conv2d)]
    assert len(norms) == len(convs) > depth - 2  # GN after every convolution; shortcuts come on top


def build_backbone_by_name(cfg, name):
    cfg = cfg.clone()
    cfg.MODEL.BACKBONE.NAME = name
    return build_backbone(cfg)


@pytest.mark.parametrize(
    "key, layers",
    [
        ("MODEL.RESNETS.STEM_OUT_CHANNELS", ["backbone.bottom_up.stem.conv1.norm"]),
        ("MODEL.FPN.OUT_CHANNELS", ["backbone.fpn_lateral2.norm", "backbone.fpn_output5.norm"]),
        ("MODEL.ROI_BOX_HEAD.CONV_DIM", ["roi_heads.box_head.conv1.norm"]),
        ("MODEL.ROI_MASK_HEAD.CONV_DIM", ["roi_heads.mask_head.mask_fcn4.norm"]),
    ],
)
def test_channels_that_the_groups_do_not_divide(key, layers):
    cfg = config("quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml", key, 48)
    cfg.MODEL.GN.NUM_GROUPS = 32
    with pytest.raises(ValueError, match="48 channels cannot be divided into 32 groups") as error:
        build_model(cfg)
    message = str(error.value)
    assert "MODEL.GN.NUM_GROUPS" in message and "work: 1, 2, 3, 4, 6, 8, 12, 16, 24, 48" in message
    for layer in layers:
        assert layer in message
    assert "res2" not in message  # 64 channels: in order
