"""Our models against Detectron2's own with ``NORM: "GN"``: same numbers. Keys, shapes and weight
decay of every config are compared in ``tests/test_configs.py``."""

import pytest
import torch
from detectron2.modeling import build_backbone, build_model
from detectron2.utils.events import EventStorage
from detectron2_reference import detectron2_config
from helpers import config, randomize, training_image
from torch import nn

from gn_detect.layers import GroupNorm

R50 = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x.yaml"
# Detectron2's GN has 32 groups.
NARROW = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 32),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.FPN.OUT_CHANNELS", 32),
    *("MODEL.ROI_BOX_HEAD.CONV_DIM", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 32),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", 32, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 50),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", 20, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16),
]


@pytest.fixture(scope="module")
def pair():
    """(ours, Detectron2's) of R50-FPN with fewer channels, with the same weights."""
    torch.manual_seed(0)
    cfg = config(R50, *NARROW, "INPUT.MASK_FORMAT", "bitmask", "MODEL.BACKBONE.FREEZE_AT", 0)
    ours, theirs = build_model(cfg), build_model(detectron2_config(cfg))
    theirs.load_state_dict(randomize(ours).state_dict(), strict=True)
    return ours, theirs


def test_same_losses_and_gradients(pair):
    results = []
    for model in pair:
        model.train().zero_grad()
        torch.manual_seed(1)  # proposals and RoIs are sampled
        with EventStorage():  # the model logs to one
            losses = model([training_image(), training_image(80, 64)])
        sum(losses.values()).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
        results.append(({k: v.detach() for k, v in losses.items()}, gradients))
    (ours, our_gradients), (theirs, their_gradients) = results
    assert set(ours) == {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"}
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_gradients, their_gradients, rtol=1e-4, atol=1e-6)


def test_same_inference(pair):
    outputs = []
    for model in pair:
        model.eval()
        model.roi_heads.box_predictor.test_score_thresh = 0.0  # random weights are not confident
        with torch.no_grad():
            batch = [training_image(), training_image(80, 64)]
            outputs.append([d["instances"].get_fields() for d in model(batch)])
    for ours, theirs in zip(*outputs, strict=True):
        assert len(ours["scores"]) > 0
        for fields in (ours, theirs):
            fields["pred_boxes"] = fields["pred_boxes"].tensor
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("depth", [34, 152])
def test_backbones_of_other_depths(depth):
    channels = 64 if depth < 50 else 256
    cfg = config(R50, "MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.RES2_OUT_CHANNELS", channels)
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
