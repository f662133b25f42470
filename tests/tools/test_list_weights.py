"""The list of public weights, and what it says of files made with the names of their sources."""

import re
from unittest import mock

import pytest
import timm
import torch
from detectron_blobs import Shapes
from helpers import refusal, run_tool
from maskrcnn_benchmark_reference import renamed
from mmdetection_reference import State

from gn_detect.checkpoint import Weights
from gn_detect.checkpoint.public import PUBLIC
from gn_detect.checkpoint.sources import locate
from gn_detect.engine.identify import architecture, fitting_configs

pytestmark = pytest.mark.slow


def test_list(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    name = "mmdetection://mask_rcnn_r50_fpn_gn_ws-all_2x_coco"
    file = tmp_path / PUBLIC[name].url.replace("https://download.openmmlab.com/", "")
    file.parent.mkdir(parents=True)
    file.touch()
    shown = run_tool("list_weights.py").stdout
    assert all(name in shown and weights.licence in shown for name, weights in PUBLIC.items())
    assert f"{len(PUBLIC)} of {len(PUBLIC)} public weights with GN" in shown
    (line,) = (line for line in shown.splitlines() if line.startswith(name))
    config = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_ws_2x.yaml"
    assert line.split() == [name, "40.6", "/", "36.6", "183", config, "yes"]
    assert shown.count(" yes\n") == 1
    (line,) = (line for line in shown.splitlines() if "50x3_bit.goog_in21k_ft_in1k" in line)
    assert "MODEL.RESNETS.STEM_OUT_CHANNELS 192" in line and " 869 " in line
    assert locate(name).path == str(file)

    few = run_tool("list_weights.py", "mmdetection", "x101").stdout
    assert f"3 of {len(PUBLIC)} public" in few and "R-50" not in few


def test_unknown_names_of_mmdetection():
    message = refusal("list_weights.py", "--check", "mmdetection://mask_rcnn_r50")
    assert "is unknown; known: mmdetection://mask_rcnn_r50_fpn_gn-all_2x_coco" in message


def test_words_are_not_of_a_check():
    result = run_tool("list_weights.py", "--check", "FILE", "ws", check=False)
    assert result.returncode == 2 and "--check takes one FILE" in result.stderr


@pytest.mark.parametrize("shape", [(), (4,), (4, 0, 3, 3)])
def test_what_is_no_resnet(shape):
    state = {"stem.conv1.weight": (4, 3, 7, 7), "res2.0.conv1.weight": (4, 4, 1, 1)}
    state |= {"res2.0.conv2.weight": shape} if shape else {}
    weights = Weights("Detectron2", {name: torch.zeros(size) for name, size in state.items()})
    assert architecture(weights) == "none"
    assert fitting_configs(weights, "FILE") == ([], mock.ANY)


def without_values(state) -> dict:
    """Zeros that take no room in a file."""
    return {name: torch.zeros(()).expand(value.shape) for name, value in state.items()}


CONFIG = "norm_cfg = dict(type='GN', num_groups=32)\nimg = dict(mean=[1., 2, 3], std=[1., 1, 1])"


def files():
    """A file, and what is said of it."""
    state = without_values(State(2, classes=5).meta())
    yield (
        {"state_dict": state, "meta": {"config": CONFIG}},
        "mmdetection; Mask R-CNN; ResNet-50; 69 GN of 32 groups, 0 BN; none; 5; order not known, "
        "mean 1, 2, 3, deviation 1, 1, 1; none: FILE was trained with another input: ",
    )
    state = without_values(renamed(State(1, mask=False, groups=32, base_width=4).meta()))
    config = "Detectron/mask_rcnn_X_50_32x4d_FPN_gn_ws_2x.yaml MODEL.MASK_ON False"
    yield (
        {"model": {f"module.{name}": value for name, value in state.items()}},
        "maskrcnn-benchmark; Faster R-CNN; ResNeXt-50 32x4d; 65 GN of 32 groups, 0 BN; not known; "
        "80; BGR, mean 103.53, 116.28, 123.675, deviation 1, 1, 1; "
        f"{config} # the prefix 'module.' of all its names is left out",
    )
    state = Shapes(101)
    state.resnet()
    state.heads()
    yield (
        {"blobs": without_values(state)},
        "Detectron; Mask R-CNN; ResNet-101; 120 GN of 32 groups, 0 BN; not known; 80; BGR, mean "
        "103.53, 116.28, 123.675, deviation 1, 1, 1; Detectron/mask_rcnn_R_101_FPN_gn_2x.yaml # ",
    )
    with torch.device("meta"):
        state = timm.create_model("resnetv2_101x3_bit", num_classes=0).state_dict()
    changes = "DEPTH 101 MODEL.RESNETS.STEM_OUT_CHANNELS 192 MODEL.RESNETS.WIDTH_PER_GROUP 192 "
    yield (
        {"state_dict": {f"model.{name}": value for name, value in without_values(state).items()}},
        "timm; no detector; pre-activation ResNet-101 of 3 times the width; 99 GN of 32 groups, 0 "
        "BN; timm; none; RGB, mean 127.5, 127.5, 127.5, deviation 127.5, 127.5, 127.5; "
        "COCO-InstanceSegmentation/mask_rcnn_R_50x1_bit_FPN_gn_ws_3x.yaml MODEL.RESNETS."
        f"{changes}MODEL.RESNETS.RES2_OUT_CHANNELS 768 # the prefix 'model.'",
    )


@pytest.mark.parametrize(
    "content, said", list(files()), ids=["mmdetection", "benchmark", "Detectron", "timm"]
)
def test_check(content, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Of each value, and there are 0.4 G of them, all 0.
    monkeypatch.setattr("gn_detect.checkpoint.convert.check_finite", lambda state, name: None)
    torch.save(content, "FILE")
    result = run_tool("list_weights.py", "--check", "FILE")
    facts = re.findall(r"^(?:[\w ]+?)  +(.*)$", result.stdout, re.MULTILINE)
    said, _, logged = said.partition(" # ")
    assert "; ".join(facts).startswith(said)
    assert logged in result.stdout + result.stderr
