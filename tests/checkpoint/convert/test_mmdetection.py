"""Detectors of mmdetection: names and shapes, and what their configs tell."""

import pytest
import torch
from detectron2.modeling import build_model
from helpers import SMALL, config
from mmdetection_reference import State

from gn_detect.checkpoint.convert import mmdetection
from gn_detect.checkpoint.convert.weights import Weights
from gn_detect.checkpoint.origin import Origin
from gn_detect.checkpoint.safe_load import WeightsError

pytestmark = pytest.mark.slow


def convert(state, meta=None) -> Weights:
    assert mmdetection.recognizes(list(state))
    return mmdetection.convert(state, meta or {})


PUBLISHED = {  # mmdetection's configs/gn, configs/gn+ws and configs/scratch
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_2x": {},
    "COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_gn_2x": {"depth": 101},
    "COCO-InstanceSegmentation/mask_rcnn_X_50_32x4d_FPN_gn_ws_2x": {"groups": 32, "base_width": 4},
    "COCO-Detection/faster_rcnn_R_50_FPN_gn_ws_1x": {"mask": False},
    # not published
    "COCO-Detection/cascade_rcnn_R_50_FPN_gn_heads_2x": {
        **{"mask": False, "norm": "bn", "stages": 3, "agnostic": True},
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_of_whole_detectors(name):
    model = build_model(config(f"{name}.yaml", "MODEL.DEVICE", "meta"))
    expected = {name: value.shape for name, value in model.state_dict().items()}
    for version in (1, 2):
        state = State(version, **PUBLISHED[name]).meta()
        weights = convert(state)
        assert {name: value.shape for name, value in weights.state.items()} == expected
        assert (weights.format, weights.partial) == ("mmdetection", False)
        assert all(name.endswith(".num_batches_tracked") for name in weights.left_out)
        assert len(weights.left_out) == len(state) - len(expected)


@pytest.mark.parametrize("version", [1, 2])
def test_what_version_1_needs_is_said(version, caplog):
    convert(State(version, **SMALL).meta())
    assert ("MODEL.ANCHOR_GENERATOR.OFFSET 0.5" in caplog.text) == (version == 1)


def test_heads_of_two_layers_and_class_agnostic_ones():
    state = State(1, num_convs=0, num_fcs=2, agnostic=True, **SMALL).random()
    weights = convert(state).state
    for ours, theirs in [
        ("box_head.fc2.weight", "bbox_head.shared_fcs.1.weight"),
        ("box_predictor.bbox_pred.bias", "bbox_head.fc_reg.bias"),
        ("mask_head.predictor.weight", "mask_head.conv_logits.weight"),
    ]:
        assert torch.equal(weights[f"roi_heads.{ours}"], state[theirs])


@pytest.mark.parametrize("version, order", [(1, [1, 2, 3, 4, 5, 0]), (2, [0, 1, 2, 3, 4, 5])])
def test_stages_of_cascade(version, order):
    state = State(version, stages=3, agnostic=True, mask=False, **SMALL).random()
    weights = convert(state).state
    for stage in range(3):
        theirs = f"{'' if version == 1 else 'roi_head.'}bbox_head.{stage}."
        for ours, value in [
            (f"box_head.{stage}.conv4.norm.bias", state[f"{theirs}shared_convs.3.gn.bias"]),
            (f"box_head.{stage}.fc1.weight", state[f"{theirs}shared_fcs.0.weight"]),
            (f"box_predictor.{stage}.cls_score.weight", state[f"{theirs}fc_cls.weight"][order]),
            (f"box_predictor.{stage}.bbox_pred.weight", state[f"{theirs}fc_reg.weight"]),
        ]:
            assert torch.equal(weights[f"roi_heads.{ours}"], value)


def test_what_no_detector_has_is_left_out():
    extra = ["backbone.fc.weight", "ema_neck_fpn_convs_0_gn_weight"]
    state = State(**SMALL).meta()
    weights = convert({**state, **{name: torch.zeros(1) for name in extra}})
    assert weights.left_out == extra
    assert len(weights.state) == len(state)


@pytest.mark.parametrize(
    "name",
    [
        "backbone.layer2.0.conv2.conv_offset.weight",  # deformable convolution
        "backbone.stem.0.weight",  # deep stem
        "backbone.layer2.0.downsample.2.weight",  # avg_down
        "backbone.layer2.0.conv1.weight_gamma",  # ConvAWS
        "neck.fpn_convs.4.conv.weight",  # RetinaNet
        "rpn_head.rpn_conv.0.conv.weight",
        "roi_head.bbox_head.cls_convs.0.conv.weight",
        "roi_head.mask_head.0.conv_logits.weight",  # Cascade Mask R-CNN
        "roi_head.semantic_head.lateral_convs.0.conv.weight",  # HTC
    ],
)
def test_layers_that_detectron2_lacks_are_named(name):
    state = {**State(**SMALL).meta(), name: torch.zeros(1)}
    with pytest.raises(WeightsError, match=rf"1 weights .*: {name}\."):
        convert(state)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"rpn_head.rpn_cls.weight": 6},
            "rpn_cls.weight has 6 channels, .* has 12: .* sigmoid",
        ),  # softmax
        (
            {"rpn_head.rpn_cls.weight": 9, "rpn_head.rpn_reg.weight": 36},
            "9 channels, one for each anchor",
        ),
        ({"roi_head.bbox_head.fc_reg.weight": 24}, "fc_reg.weight has 24 channels"),
        ({"roi_head.mask_head.conv_logits.bias": 6}, "conv_logits.bias has 6 channels"),
        ({"roi_head.bbox_head.fc_cls.weight": 7}, "expected 24, or 4"),  # Seesaw loss
    ],
)
def test_channels_that_detectron2_lacks_are_named(changes, message):
    state = State(**SMALL).meta()
    for name, channels in changes.items():
        state[name] = state[name].new_empty(channels, *state[name].shape[1:])
    with pytest.raises(WeightsError, match=message):
        convert(state)


def test_a_detector_without_fpn_is_refused():
    state = State(**SMALL).meta()
    del state["neck.lateral_convs.3.conv.weight"]
    with pytest.raises(WeightsError, match="neck.lateral_convs.3.conv.weight is missing"):
        convert(state)


# As Config.text of version 1 has it: the path of the file, and its content
# (mmdetection's configs/gn/mask_rcnn_r50_fpn_gn_2x.py).
VERSION_1_TEXT = """/data/mmdetection/configs/gn/mask_rcnn_r50_fpn_gn_2x.py
norm_cfg = dict(type='GN', num_groups=32, requires_grad=True)
model = dict(
    type='MaskRCNN',
    backbone=dict(type='ResNet', depth=50, frozen_stages=1, style='pytorch', norm_cfg=norm_cfg))
train_cfg = dict(rpn=dict(allowed_border=0, smoothl1_beta=1 / 9.0))
img_norm_cfg = dict(
    mean=[102.9801, 115.9465, 122.7717], std=[1.0, 1.0, 1.0], to_rgb=False)
data = dict(train=dict(type='CocoDataset', img_norm_cfg=img_norm_cfg, img_scale=(1333, 800)))
"""
# As Config.pretty_text of version 2 has it, with all that it inherits
# (configs/gn+ws/mask_rcnn_r50_fpn_gn_ws-all_2x_coco.py).
VERSION_2_TEXT = """model = dict(
    backbone=dict(
        type='ResNet',
        norm_cfg=dict(type='GN', num_groups=32, requires_grad=True),
        style='pytorch',
        conv_cfg=dict(type='ConvWS')),
    neck=dict(
        type='FPN',
        in_channels=[256, 512, 1024, 2048],
        norm_cfg=dict(type='GN', num_groups=32, requires_grad=True)))
img_norm_cfg = dict(
    mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='Normalize',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        to_rgb=True)
]
"""
# Version 3 sorts the keys (configs/gn/mask-rcnn_r50-fpn-gn-all_2x_coco.py).
VERSION_3_TEXT = """backend_args = None
model = dict(
    backbone=dict(
        norm_cfg=dict(num_groups=16, requires_grad=True, type='GN'), style='caffe', type='ResNet'),
    data_preprocessor=dict(
        bgr_to_rgb=False,
        mean=[
            103.53,
            116.28,
            123.675,
        ],
        pad_size_divisor=32,
        std=[1.0, 1.0, 1.0],
        type='DetDataPreprocessor'))
"""
MEAN, STD, UNIT = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375), (1.0, 1.0, 1.0)


def origin(**meta) -> Origin:
    return convert(State(**SMALL).meta(), meta).origin


def test_origin_of_each_version():
    detectron = (102.9801, 115.9465, 122.7717)
    assert origin(config=VERSION_1_TEXT) == Origin("BGR", detectron, UNIT, False, "", 32)
    assert origin(config=VERSION_2_TEXT) == Origin("RGB", MEAN, STD, False, "authors", 32)
    assert origin(cfg=VERSION_3_TEXT) == Origin("BGR", MEAN[::-1], UNIT, True, "", 16)


def test_origin_that_the_config_does_not_tell():
    assert origin() == origin(config=None) == origin(cfg="not (a config") == Origin()
    twice = VERSION_2_TEXT.replace("to_rgb=True)\n]", "to_rgb=False)\n]")
    assert origin(config=twice) == Origin(None, None, None, False, "authors", 32)
    two_groups = VERSION_2_TEXT.replace("num_groups=32", "num_groups=16", 1)
    assert origin(config=two_groups).num_groups is None


def test_a_config_is_not_executed(tmp_path):
    marker = tmp_path / "executed"
    call = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    text = f"{call}\nimg_norm_cfg = dict(mean={call}, std=[{call}], to_rgb=True)\nx = dict({call})"
    assert origin(config=text) == Origin(weight_standardization="")
    assert not marker.exists()
    eval(call)  # what was not executed would have been seen
    assert marker.exists()


@pytest.mark.parametrize("text", ["dict(" * 10000, "[" * 100000, "-" * 100000 + "1", "a\0b"])
def test_malformed_configs_tell_nothing(text):
    assert origin(config=text) == Origin()
