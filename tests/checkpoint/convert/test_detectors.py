"""Files that were changed: what is wrong is a sentence, which names the file."""

import re

import pytest
import torch
from helpers import SMALL
from maskrcnn_benchmark_reference import renamed
from mmdetection_reference import State
from tensorpack_reference import State as Tensorpack

from gn_detect.checkpoint import WeightsError
from gn_detect.checkpoint.convert import convert
from gn_detect.checkpoint.coverage import num_classes, num_keypoints

FILES = {
    "mmdetection": State(**SMALL).meta(),
    "maskrcnn-benchmark": renamed(State(1, **SMALL).meta()),
    "tensorpack": Tensorpack(suffix=":0", **SMALL).meta(),
}
TWICE = {
    "mmdetection": ("backbone.layer1.0.gn1.weight", "backbone.layer1.0.bn1.weight"),
    "maskrcnn-benchmark": ("backbone.body.layer1.0.bn1.bias", "backbone.body.layer1.0.gn1.bias"),
    "tensorpack": ("conv0/W:0", "conv0/W"),
}


@pytest.mark.parametrize("library", FILES)
def test_two_names_of_one_weight_are_refused(library):
    name, other = TWICE[library]
    state = {**FILES[library], other: FILES[library][name]}
    message = f"file: {name} and {other} are one weight of {library}"
    with pytest.raises(WeightsError, match=re.escape(message)):
        convert(state, "file")


def scalar(pattern, state):
    return {n: torch.zeros(()) if re.search(pattern, n) else v for n, v in state.items()}


@pytest.mark.parametrize(
    "state, message",
    [
        (scalar("rpn_cls.weight", FILES["mmdetection"]), "by some names .* of mmdetection, .*0-d"),
        (
            scalar("cls_score", FILES["maskrcnn-benchmark"]),
            "by some .* of maskrcnn_benchmark",
        ),
        (scalar("class/b", FILES["tensorpack"]), r"class/b:0 has the shape \[\]"),
        ({"layer1.0.conv1.weight": torch.zeros(4), "bn1.weight": torch.zeros(4)}, "KeyError"),
        (
            {f"layer1.0.{n}1.weight": torch.zeros(0) for n in ("conv", "bn")},
            "of torchvision, .*ZeroDivisionError",
        ),
        ({0: torch.zeros(1)}, "0 in it is no name"),
    ],
)
def test_shapes_that_no_network_has(state, message):
    with pytest.raises(WeightsError, match=f"^changed.pth: .*{message}"):
        convert(state, "changed.pth")


@pytest.mark.parametrize("meta", [None, "text", [1], {"config": 1}])
def test_what_is_no_metadata_tells_nothing(meta):
    weights = convert({"state_dict": FILES["mmdetection"], "meta": meta}, "file")
    assert weights.origin.input_format is None


@pytest.mark.parametrize("shape", [(), (0,), (0, 4)])
def test_predictors_without_outputs_have_no_classes(shape):
    for name in ("roi_heads.box_predictor.cls_score.weight", "head.cls_score.weight"):
        assert num_classes({name: shape, "head.bbox_pred.weight": (4, 1)}) is None
    assert num_classes({"head.cls_score.weight": (4, 1), "head.bbox_pred.weight": shape}) is None
    if len(shape) < 2:
        assert num_keypoints({"roi_heads.keypoint_head.score_lowres.weight": shape}) is None
