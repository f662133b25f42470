"""Keypoints of a model, from its data. (Classes and masks: test_prepare.py.)"""

import json
import logging

import pytest
import torch
from detectron2.data.datasets.builtin_meta import COCO_PERSON_KEYPOINT_NAMES
from helpers import CONFIGS, TINY

from gn_detect import get_config_file
from gn_detect.checkpoint import Weights
from gn_detect.config import ConfigError, load_config
from gn_detect.data.coco import DataError, register_coco_json
from gn_detect.engine import prepare_run
from gn_detect.engine.follow_data import outputs_from_weights
from gn_detect.engine.lazy_config import load_lazy_config

CONFIG = get_config_file("COCO-Keypoints/scratch_keypoint_rcnn_R_50_FPN_gn_3x.yaml")
LAZY = get_config_file("lazy/COCO-Keypoints/keypoint_rcnn_R_50_FPN_gn_3x.py")
NAMES = ["nose", "left_eye", "right_eye"]
SIGMAS = "TEST.KEYPOINT_OKS_SIGMAS"


@pytest.fixture
def register(coco_files):
    """``register(dataset, names)``: three images of two classes with these keypoints; returns the
    name."""

    def register(name, names=NAMES):
        for category in coco_files.content["categories"]:
            category["keypoints"] = names
        for annotation in coco_files.content["annotations"]:
            annotation["keypoints"] = [12, 14, 2] * len(names)
        path = coco_files.json_file.with_name(f"{name}.json")
        path.write_text(json.dumps(coco_files.content))
        register_coco_json(name, str(path), str(coco_files.image_root))
        return name

    return register


def prepare(train, *opts, config=CONFIG):
    data = ["DATASETS.TRAIN", (train,), "DATASETS.TEST", (train,)]
    cfg = load_config(config, [*TINY, *data, *opts])
    prepare_run(cfg)
    return cfg


@pytest.mark.parametrize("name", [name for name in CONFIGS if "keypoint_rcnn" in name])
def test_every_config_for_keypoints_takes_own_data(register, name):
    small = ("MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.RESNETS.NUM_GROUPS", 1)
    cfg = prepare(register("own"), *small, config=get_config_file(name))
    assert (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS) == (2, 3)


def test_keypoints_follow_the_data(register, caplog):
    caplog.set_level(logging.INFO, "gn_detect")
    cfg = prepare(register("own"))
    assert cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS == 3
    assert cfg.TEST.KEYPOINT_OKS_SIGMAS == [0.067] * 3
    assert "NUM_KEYPOINTS = 3, from the dataset own: nose, left_eye, right_eye" in caplog.text
    assert caplog.text.count("TEST.KEYPOINT_OKS_SIGMAS = 0.067 for each keypoint") == 1
    assert "exchanges left_eye/right_eye; nose keeps its identity\n" in caplog.text
    assert prepare("own", SIGMAS, [0.1, 0.2, 0.3]).TEST.KEYPOINT_OKS_SIGMAS == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    "names, opts, message",
    [
        (["tip", "tail"], (), "no keypoints; tip, tail keep their identity. If it should"),
        (["left_a", "right_a", "left"], (), "left_a/right_a; left keeps its identity. If"),
        (["tip", "tail"], ("INPUT.KEYPOINT_FLIP_PAIRS", [["tip", "tail"]]), "tip/tail\n"),
        (["tip", "tail"], ("INPUT.KEYPOINT_FLIP_PAIRS", []), "tip, tail keep their identity\n"),
        (["tip", "tail"], ("INPUT.RANDOM_FLIP", "none"), ""),
    ],
)
def test_what_a_flip_exchanges_is_said(register, caplog, names, opts, message):
    caplog.set_level(logging.INFO, "gn_detect")
    prepare(register("own", names), *opts)
    assert message in caplog.text
    assert caplog.text.count("the horizontal flip") == bool(message)


@pytest.mark.parametrize(
    "opts, message",
    [
        (("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 17), "is 17, but .* declares 3 keypoints"),
        ((SIGMAS, [0.1]), r"SIGMAS is \[0.1\]; it must be 3 positive numbers"),
        ((SIGMAS, [0.1, 0.2, "a"]), "it must be 3 positive numbers"),
        (("INPUT.KEYPOINT_FLIP_PAIRS", [["nose", "ear"]]), "'ear', which is no keypoint"),
        (("DATASETS.TEST", ("other",)), "own and other have different keypoints"),
    ],
)
def test_what_contradicts_the_data_is_refused(register, opts, message):
    register("other", NAMES[::-1])
    with pytest.raises((ConfigError, DataError), match=message):
        prepare(register("own"), *opts)


def test_coco_has_tolerances_of_its_own(register, caplog):
    caplog.set_level(logging.INFO, "gn_detect")
    names = list(COCO_PERSON_KEYPOINT_NAMES)
    assert not prepare(register("own", names)).TEST.KEYPOINT_OKS_SIGMAS
    assert prepare(register("own", names[::-1])).TEST.KEYPOINT_OKS_SIGMAS == [0.067] * 17


def lazy(name, *overrides):
    options = ["model.roi_heads.num_classes=2", "train.device=cpu", "train.init_checkpoint="]
    options += ["model.backbone.bottom_up.freeze_at=0", "dataloader.train.dataset.names=own"]
    options += ["dataloader.test.dataset.names=own", *overrides]
    cfg = load_lazy_config(LAZY, options)
    prepare_run(cfg)
    return cfg


def test_a_lazy_config_states_them_and_is_checked(register, caplog):
    register("own")
    number = "model.roi_heads.keypoint_head.num_keypoints"
    flip = "dataloader.train.mapper.keypoint_hflip_indices"
    with pytest.raises(ConfigError, match=f"{number} is 17, but .* declares 3 keypoints"):
        lazy("own")
    with pytest.raises(ConfigError, match=rf"{flip} is \[0, 2.*by their names it is \[0, 2, 1\]"):
        lazy("own", f"{number}=3")
    cfg = lazy("own", f"{number}=3", f"{flip}=null")
    assert cfg.dataloader.train.mapper.keypoint_hflip_indices == [0, 2, 1]
    assert cfg.dataloader.evaluator.kpt_oks_sigmas == [0.067] * 3
    lazy("own", f"{number}=3", f"{flip}=[0,1,2]")
    assert f"{flip} is [0, 1, 2]; by the names of the keypoints it is [0, 2, 1]" in caplog.text


@pytest.mark.parametrize("shape, number", [((8, 5, 4, 4), 5), (None, 17)])
def test_keypoints_of_weights(shape, number):
    name = "roi_heads.keypoint_head.score_lowres.weight"
    cfg = load_config(CONFIG)
    outputs_from_weights(cfg, Weights("Detectron2", {name: torch.zeros(shape)} if shape else {}))
    assert cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS == number
