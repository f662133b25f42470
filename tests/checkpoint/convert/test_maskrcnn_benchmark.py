"""Detectors of maskrcnn-benchmark: names, shapes, classes and what is refused."""

import pytest
import torch
from detectron2.modeling import build_model
from helpers import SMALL, config
from maskrcnn_benchmark_reference import renamed
from mmdetection_reference import State

from gn_detect.checkpoint import WeightsError
from gn_detect.checkpoint.convert import convert
from gn_detect.checkpoint.origin import DETECTRON, Origin
from gn_detect.config import ConfigError

# Its configs/gn_baselines, and those of the authors of Weight Standardization.
PUBLISHED = {
    "mask_rcnn_R_50_FPN_gn_2x": {},
    "mask_rcnn_R_50_FPN_gn_ws_2x": {"mask": False},
    "mask_rcnn_R_101_FPN_gn_ws_2x": {"depth": 101},
    "mask_rcnn_X_50_32x4d_FPN_gn_ws_2x": {"groups": 32, "base_width": 4},
    "mask_rcnn_X_101_32x4d_FPN_gn_ws_2x": {"groups": 32, "base_width": 4, "depth": 101},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_of_whole_detectors(name, caplog):
    caplog.set_level("INFO")
    options = PUBLISHED[name]
    with torch.device("meta"):
        opts = ["MODEL.DEVICE", "meta", "MODEL.MASK_ON", options.get("mask", True)]
        model = build_model(config(f"Detectron/{name}.yaml", *opts))
    state = renamed(State(1, **options).meta())
    # Its Checkpointer saves a DistributedDataParallel.
    content = {"model": {f"module.{n}": v for n, v in state.items()}, "iteration": 9}
    weights = convert(content, "model_final.pth")
    expected = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in weights.state.items()} == expected
    assert (weights.format, weights.partial) == ("maskrcnn-benchmark", False)
    assert weights.left_out == [f"rpn.anchor_generator.cell_anchors.{i}" for i in range(5)]
    assert weights.origin == Origin(**DETECTRON, stride_in_1x1=False, num_groups=32)
    assert "its anchors and RoIAlign are those of configs/Detectron" in caplog.text


def test_names_in_its_source():
    """Of e2e_mask_rcnn_R_50_FPN_Xconv1fc_1x_gn.yaml; what the reference calls them is no proof."""
    names = renamed(State(1).meta()).keys()
    assert names >= {
        "backbone.body.stem.bn1.weight",
        "backbone.body.layer1.0.downsample.1.bias",
        "backbone.fpn.fpn_inner1.0.weight",
        "backbone.fpn.fpn_layer4.1.bias",
        "rpn.head.cls_logits.weight",
        "roi_heads.box.feature_extractor.xconvs.9.weight",
        "roi_heads.box.feature_extractor.xconvs.10.weight",
        "roi_heads.box.feature_extractor.fc6.weight",
        "roi_heads.mask.feature_extractor.mask_fcn4.1.weight",
        "roi_heads.mask.predictor.conv5_mask.weight",
    }


def test_heads_without_gn_and_boxes_for_all_classes():
    state = renamed(State(1, **SMALL).meta())
    extractor = "roi_heads.box.feature_extractor."
    for i in range(4):
        for part in (0, 1):
            for name in ("weight", "bias"):
                state.pop(f"{extractor}xconvs.{3 * i + part}.{name}", None)
    for i in range(4):
        state[f"{extractor}xconvs.{2 * i}.weight"] = torch.full((16, 16, 3, 3), float(i))
        state[f"{extractor}xconvs.{2 * i}.bias"] = torch.zeros(16)
    boxes = torch.arange(8.0)
    state["roi_heads.box.predictor.bbox_pred.bias"] = boxes
    state["roi_heads.box.predictor.bbox_pred.weight"] = boxes[:, None].expand(8, 32)
    weights = convert(state, "file").state
    convs = [weights[f"roi_heads.box_head.conv{i}.weight"] for i in (1, 2, 3, 4)]
    assert [conv.mean().item() for conv in convs] == [0, 1, 2, 3]
    assert weights["roi_heads.box_predictor.bbox_pred.bias"].tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(
    "name, channels, message",
    [
        ("backbone.body.layer2.0.conv2.conv.weight", 8, r"1 weights .*: back.*\. Convert"),  # DCN
        ("roi_heads.box.feature_extractor.fc6.1.weight", 32, "1 weights .*fc6.1.weight"),  # GN
        (
            "roi_heads.keypoint.predictor.kps_score_lowres.weight",
            17,
            "1 weights .*kps_score",
        ),
        ("rpn.head.cls_logits.weight", 15, "weight has 15 channels, .* has 12: .* a sigmoid"),
        (
            "roi_heads.box.predictor.bbox_pred.weight",
            20,
            "bbox_pred.weight has 20 channels, .* has 6: expected 24, or 8",
        ),
        (
            "roi_heads.mask.predictor.mask_fcn_logits.bias",
            5,
            "has 5 channels, .*: expected 6, or 1",
        ),
    ],
)
def test_what_detectron2_lacks_is_named(name, channels, message):
    state = renamed(State(1, **SMALL).meta())
    state[name] = torch.empty(channels, 16, 1, 1, device="meta")
    with pytest.raises(WeightsError, match=message):
        convert(state, "file")


@pytest.mark.parametrize("pooler", ["ROIPool", "ROIAlignV2"])
def test_another_pooler_than_its_own_is_refused(pooler):
    opts = ["MODEL.DEVICE", "meta", "MODEL.ROI_MASK_HEAD.POOLER_TYPE", pooler]
    with torch.device("meta"), pytest.raises(ConfigError, match="set the POOLER_TYPE of all RoI"):
        build_model(config("Detectron/mask_rcnn_R_50_FPN_gn_2x.yaml", *opts))
