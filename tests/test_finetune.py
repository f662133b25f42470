"""configs/finetune/: they fit the weights that they name, train what they say, and name no data."""

import inspect
import operator
import re
import shlex
from fnmatch import fnmatch
from pathlib import Path

import detectron2
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron_blobs import Blobs
from helpers import CONFIGS, ROOT, as_shipped

import gn_detect
from gn_detect.checkpoint import WeightGuards
from gn_detect.checkpoint.convert import convert
from gn_detect.checkpoint.coverage import component_of, cover
from gn_detect.checkpoint.origin import Origin
from gn_detect.checkpoint.sources import _DETECTRON_GN
from gn_detect.config import load_config, locate
from gn_detect.engine import recipe
from gn_detect.engine.guards import without_weights
from gn_detect.settings import Settings

FINETUNE = [name for name in CONFIGS if name.startswith("finetune/")]
PAGE = (ROOT / "docs/finetune.md").read_text()
ZOO = Path(detectron2.__file__).parent / "model_zoo"
every_config = pytest.mark.parametrize("name", FINETUNE)
every_weights = pytest.mark.parametrize("name", [n for n in FINETUNE if "scratch" not in n])


def of_own_data(name):
    """The config as it becomes with data of 3 classes and 5 keypoints."""
    cfg = as_shipped(name).clone()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 3, 5
    return cfg


def built(cfg):
    def build(device):
        cfg.MODEL.DEVICE = device
        return build_model(cfg)

    return without_weights(build)


class Names(Blobs):
    """The names and shapes alone."""

    def add(self, name, *shape, scale=None):
        self[name] = torch.empty(shape, device="meta")


def published(weights):
    """The names and shapes in public weights: of Detectron's functions, or of the model that
    Detectron2's own config of that name builds."""
    if match := re.fullmatch(r"detectron2://(Misc/\w+)/(\d+/\w+\.pkl)", weights):
        assert f'"{match[1]}": "{match[2]}"' in (ZOO / "model_zoo.py").read_text()
        cfg = get_cfg()
        cfg.merge_from_file(str(ZOO / f"configs/{match[1]}.yaml"))
        return built(cfg).state_dict()
    blobs = Names(101 if "R-101" in weights else 50)
    blobs.resnet()
    if weights.startswith("detectron://"):
        assert weights.removeprefix("detectron://") in _DETECTRON_GN
        blobs.heads()
    else:
        assert re.fullmatch(r"catalog://ImageNetPretrained/FAIR/R-(50|101)-GN", weights)
        blobs.conv("pred", 1000, 2048)
    return dict(blobs)


@every_weights
def test_the_weights_fit(name):
    """All that they can give, they give, and the input is theirs."""
    cfg = of_own_data(name)
    model, weights = built(cfg), convert(published(cfg.MODEL.WEIGHTS), name)
    weights.origin = Origin.of_name(cfg.MODEL.WEIGHTS)
    coverage = cover(weights, model)
    WeightGuards.from_config(cfg).check(weights, coverage, model, name)
    given = {component_of(name) for name in coverage.loaded}
    if "imagenet" in name:
        assert given == {"backbone"} and not coverage.unexpected
        return
    heads = {"mask head"} if "mask" in name else set()
    assert given == {"backbone", "FPN", "RPN", "box head"} | heads
    afresh = {n for n in coverage.afresh if component_of(n) != "keypoint head"}
    assert afresh and all("predictor" in n for n in afresh)
    assert bool(coverage.unexpected) == ("keypoint" in name)
    assert all("mask_head." in n for n in coverage.unexpected)


def test_the_input_of_the_zoo_is_that_of_its_config():
    for name in FINETUNE:
        if match := re.search(r"Misc/\w+", (cfg := as_shipped(name)).MODEL.WEIGHTS):
            theirs = get_cfg()
            theirs.merge_from_file(str(ZOO / f"configs/{match[0]}.yaml"))
            assert cfg.MODEL.PIXEL_STD == theirs.MODEL.PIXEL_STD
            assert cfg.MODEL.PIXEL_MEAN == theirs.MODEL.PIXEL_MEAN
            assert cfg.INPUT.FORMAT == theirs.INPUT.FORMAT


@pytest.mark.parametrize("name", [name for name in FINETUNE if "heads_only" in name])
def test_heads_alone_are_trained(name):
    model = built(of_own_data(name))
    resnet = {n: m for n, m in model.named_modules() if n.startswith("backbone.bottom_up.")}
    in_resnet = {f"{n}.{p}" for n, m in resnet.items() for p, _ in m.named_parameters()}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == dict(model.named_parameters()).keys() - in_resnet
    assert {component_of(n) for n in trained} >= {"FPN", "RPN", "box head"}


@every_config
def test_the_name_says_what_it_is(name):
    cfg = as_shipped(name)
    kind, depth = re.search(r"(mask|keypoint)_rcnn_R_(\d+)_FPN_gn", name).groups()
    assert cfg.MODEL.RESNETS.DEPTH == int(depth)
    assert (cfg.MODEL.MASK_ON, cfg.MODEL.KEYPOINT_ON) == (kind == "mask", kind == "keypoint")
    assert cfg.DATASETS.TRAIN == cfg.DATASETS.TEST == ()
    scratch = "scratch" in name
    assert bool(cfg.MODEL.WEIGHTS) != scratch
    assert cfg.SOLVER.EPOCHS == (80 if scratch else 40) == 10 * cfg.TEST.EVAL_EPOCHS
    # The linear rule of COCO, but for the small network, whose rate is that of the quickstart.
    assert cfg.SOLVER.BASE_LR == (0.02 if depth == "18" else 0.02 * 2 / 16)


def test_the_table_of_rules_names_each_key_that_a_rule_sets():
    source = inspect.getsource(recipe)
    names = {*re.findall(r'Row\("(\w+)"', source), "rpn_batch", "roi_batch"}
    names |= {f"{which}_nms_{use}" for which in ("pre", "post") for use in ("train", "test")}
    keys = {Settings(as_shipped(FINETUNE[0])).keys[name] for name in names}
    table = PAGE.partition("| rows | rule |")[2].partition("\n\n")[0]
    patterns = re.findall(r"`([A-Z][\w.*]+)`", " ".join(re.findall(r"(?m)^\| (.*?) \|", table)))
    unnamed = [key for key in keys if not any(fnmatch(key, p) for p in patterns)]
    idle = [p for p in patterns if not any(fnmatch(key, p) for key in keys)]
    assert len(keys) > 20 and not unnamed and not idle


def test_the_page_names_every_config_and_keys_that_there_are():
    named = re.findall(r"`((?:scratch_)?(?:mask|keypoint)_rcnn_[^`]+)`", PAGE)
    depths = [n.replace("{50,101}", depth) for n in named for depth in ("50", "101")]
    assert {f"finetune/{name}.yaml" for name in depths} == set(FINETUNE)
    cfg = as_shipped(FINETUNE[0])
    for key in re.findall(r"`([A-Z]\w+\.[A-Z_.\d]+)`", PAGE):
        operator.getitem(*locate(cfg, key))
    options = re.findall(r"`([A-Z]\w+\.[A-Z_.\d]+ [^`]+)`", PAGE)
    assert len(options) >= 10
    for option in options:
        load_config(gn_detect.get_config_file(FINETUNE[0]), shlex.split(option))
