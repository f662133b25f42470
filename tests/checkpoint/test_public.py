"""The table of public weights: every config builds, and takes a file with the names and shapes of
its source."""

import functools
import re

import pytest
import tensorpack_reference as tensorpack
import timm
import torch
import torchvision
from detectron2.modeling import build_model
from detectron2_reference import detectron2_config
from detectron_blobs import Shapes
from helpers import config
from mmdetection_reference import State

from gn_detect.checkpoint import Origin, WeightGuards, sources
from gn_detect.checkpoint.convert import convert
from gn_detect.checkpoint.coverage import BACKBONE, cover, num_classes
from gn_detect.checkpoint.public import PUBLIC

pytestmark = pytest.mark.slow

# Files that share a config and a number of parameters share their names and shapes.
ROWS = {}
for row in PUBLIC.values():
    ROWS.setdefault((row.config, row.changes, row.layout, row.parameters), []).append(row)


class OneForEach(torch.nn.Module):
    """The parameters of chengyangfu's GroupNorm2d: for each group of ``channels``."""

    def __init__(self, channels, num_channels):
        super().__init__()
        for name in ("weight", "bias"):
            setattr(self, name, torch.nn.Parameter(torch.empty(num_channels // channels)))


@functools.cache
def model_of(name, changes):
    cfg = config(name, *changes, "MODEL.DEVICE", "meta")
    with torch.device("meta"):
        return cfg, build_model(cfg)


@functools.cache
def state_of_detectron2():
    """Its configs/Misc/mask_rcnn_R_50_FPN_3x_gn.yaml, and the two from scratch."""
    cfg = config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x.yaml", "MODEL.DEVICE", "meta")
    with torch.device("meta"):
        return build_model(detectron2_config(cfg)).state_dict()


def content(row, cfg):
    """Of the file of ``row``."""
    model, resnets = cfg.MODEL, cfg.MODEL.RESNETS
    detector = row.is_detector()
    if row.layout == "Detectron2":
        return {"model": state_of_detectron2(), "__author__": ""}
    if row.layout == "mmdetection":
        groups = {"groups": 32, "base_width": 4} if resnets.NUM_GROUPS == 32 else {}
        state = State(2, depth=resnets.DEPTH, mask=model.MASK_ON, **groups)
        return {"state_dict": state.meta(), "meta": {}}
    if row.layout == "tensorpack":
        cascade = model.ROI_HEADS.NAME == "CascadeROIHeads"
        return tensorpack.State(depth=resnets.DEPTH, cascade=cascade, detector=detector).meta()
    if row.layout == "Detectron":
        blobs = Shapes(resnets.DEPTH)
        blobs.resnet()
        blobs.heads() if detector else blobs.conv("pred", 1000, 2048)
        return {"blobs": blobs} if detector else blobs
    with torch.device("meta"):
        if row.name.startswith("timm://"):
            classes = 21843 if row.name.endswith("in21k") else 1000
            architecture = re.split(r"[/.]", row.name)[2]
            return {"model": timm.create_model(architecture, num_classes=classes).state_dict()}
        letter, depth = ("X" if resnets.NUM_GROUPS == 32 else "R"), resnets.DEPTH
        norm = functools.partial(torch.nn.GroupNorm, 32)
        if channels := cfg.MODEL.GN.CHANNELS_PER_GROUP:
            norm = functools.partial(OneForEach, channels)
        width = {"groups": 32, "width_per_group": 4} if letter == "X" else {}
        make = {50: torchvision.models.resnet50, 101: torchvision.models.resnet101}[depth]
        state = make(norm_layer=norm, **width).state_dict()
    return {"state_dict": {f"module.{name}": value for name, value in state.items()}}


@pytest.mark.parametrize("key", ROWS, ids=lambda key: ROWS[key][0].name.rpartition("/")[2])
def test_the_config_takes_the_file(key):
    row = ROWS[key][0]
    cfg, model = model_of(row.config, row.changes)
    source = content(row, cfg)
    weights = convert(source, row.name)
    assert weights.format == row.layout
    assert num_classes(weights.shapes) == (80 if row.is_detector() else None)
    coverage = cover(weights, model)
    assert not coverage.unexpected and not coverage.mismatched
    assert not (coverage.afresh if row.is_detector() else coverage.lacking(BACKBONE))
    for other in ROWS[key]:
        known = Origin.of_name(other.name) or Origin.of_name(other.url) or Origin()
        weights.origin = known.completed_by(weights.origin)
        WeightGuards.from_config(cfg).check(weights, coverage, model, other.name)
    state = next((source[k] for k in ("model", "state_dict", "blobs") if k in source), source)
    assert row.parameters == round(sum(value.numel() for value in state.values()) / 1e6, 1)


def test_all_of_timm_with_gn_are_there_with_their_input():
    named = {name for name in PUBLIC if name.startswith("timm://")}
    bit = timm.list_pretrained("resnetv2_*_bit*")
    assert named == {f"timm://{name}" for name in bit + timm.list_pretrained("resnet*_gn.*")}
    for name in named:
        url, origin = sources._timm(name.removeprefix("timm://"))
        assert url == PUBLIC[name].url
        cfg = config(PUBLIC[name].config, *PUBLIC[name].changes)
        WeightGuards.from_config(cfg).check_origin(origin, name)
        assert origin.input_format == "RGB" and origin.pixel_mean
