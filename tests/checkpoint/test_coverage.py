import re

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from helpers import config

from gn_detect.checkpoint.convert import convert
from gn_detect.checkpoint.coverage import component_of, cover

R18 = "quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml"


@pytest.fixture(scope="module")
def model():
    return build_model(config(R18, "MODEL.DEVICE", "meta"))


@pytest.fixture
def state(model):
    return dict(model.state_dict())


def test_all_of_a_detector(model, state):
    coverage = cover(convert({"model": state}, "file"), model)
    assert coverage.loaded.keys() == state.keys()
    assert not (coverage.missing or coverage.mismatched or coverage.unexpected)
    total = sum(p.numel() for p in model.parameters())
    table = str(coverage)
    assert sum(int(row.split("|")[2].replace(",", "")) for row in table.splitlines()[2:]) == total
    assert table.count("100.00 %") == len({component_of(name) for name in state})


def test_what_does_not_fit_is_named(model, state):
    predictor = "roi_heads.box_predictor.cls_score"
    state[f"{predictor}.weight"] = torch.zeros(4, state[f"{predictor}.weight"].shape[1])
    del state["proposal_generator.rpn_head.conv.weight"]
    state["pixel_mean"] = torch.zeros(3, 1, 1)  # in checkpoints of 2020
    state["roi_heads.track_head.weight"] = torch.zeros(1)
    coverage = cover(convert({"model": state}, "file"), model)
    assert coverage.mismatched == {f"{predictor}.weight": (4, 256)}
    assert coverage.missing == ["proposal_generator.rpn_head.conv.weight"]
    assert coverage.unexpected == ["roi_heads.track_head.weight"]
    assert coverage.lacking("RPN") == coverage.missing and coverage.lacking("backbone") == []
    text = str(coverage)
    assert f"other shape: {predictor}.weight: [4, 256] in the file, [81, 256] in the model" in text
    assert "missing: proposal_generator.rpn_head.conv.weight" in text
    assert "unexpected: roi_heads.track_head.weight" in text
    rpn = next(row for row in text.splitlines() if row.startswith("| RPN"))
    assert float(rpn.split("|")[3].split("%")[0]) < 50


@pytest.mark.parametrize(
    "name", [R18, "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_gn_3x.yaml"], ids=["FPN", "C4"]
)
def test_names_of_a_backbone_end_those_of_the_detector(name, tmp_path):
    """As Detectron2 matches them with ``matching_heuristics``."""
    narrow = ["MODEL.RESNETS.WIDTH_PER_GROUP", 32] if name != R18 else []
    model = build_model(config(name, "MODEL.ROI_BOX_HEAD.FC_DIM", 32, *narrow))
    ours = {n: t for n, t in model.state_dict().items() if component_of(n) == "backbone"}
    assert any(".res5." in n for n in ours)
    theirs = {re.search(r"(stem|res\d)\..*", n)[0]: torch.rand(t.shape) for n, t in ours.items()}
    coverage = cover(convert(theirs, "file"), model)
    assert coverage.loaded.keys() == ours.keys() and not coverage.unexpected
    torch.save({"model": theirs, "matching_heuristics": True}, tmp_path / "weights.pth")
    DetectionCheckpointer(model).load(str(tmp_path / "weights.pth"))
    assert all(torch.equal(model.state_dict()[n], t) for n, t in coverage.loaded.items())


def test_less_than_all_is_not_100_percent(model, state):
    del state["backbone.bottom_up.res2.0.conv1.norm.bias"]
    row = str(cover(convert({"model": state}, "file"), model)).splitlines()[3]
    assert row.startswith("| backbone") and "99.99 %" in row


def test_statistics_are_not_trained():
    model = build_model(config(R18, "MODEL.RESNETS.NORM", "BN", "MODEL.DEVICE", "meta"))
    state = {n: t for n, t in model.state_dict().items() if "running" not in n}
    coverage = cover(convert({"model": state}, "file"), model)
    assert coverage.missing == []
    assert coverage.statistics == [n for n in model.state_dict() if "running" in n]


def test_one_name_for_several_layers_is_left_out():
    """The three heads of a cascade; Detectron2 raises an error there."""
    name = "COCO-InstanceSegmentation/cascade_mask_rcnn_R_50_FPN_gn_3x.yaml"
    model = build_model(config(name, "MODEL.DEVICE", "meta"))
    state = {"stem.conv1.weight": torch.rand(64, 3, 7, 7), "cls_score.weight": torch.rand(81, 1024)}
    coverage = cover(convert(state, "file"), model)
    assert list(coverage.loaded) == ["backbone.bottom_up.stem.conv1.weight"]
    assert coverage.unexpected == ["cls_score.weight"]
