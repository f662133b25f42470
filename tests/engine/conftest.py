import functools
import os

import pytest
from engine.trainers import build_trainer

import gn_detect
from gn_detect.data.coco import register_coco_json
from gn_detect.engine.lazy_config import load_lazy_config

QUICK = gn_detect.get_config_file("lazy/quickstart/mask_rcnn_R_18_FPN_gn_shapes.py")


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Not to wait for the disk: tests/checkpoint/test_saving.py holds what a crash leaves."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def lazy_data(coco_files):
    """The quickstart config on three images of two classes."""
    register_coco_json("own", str(coco_files.json_file), str(coco_files.image_root))

    def load(*overrides):
        options = ["model.roi_heads.num_classes=2", "train.device=cpu"]
        for loader in ("dataloader.train", "dataloader.test"):
            options += [f"{loader}.num_workers=0", f"{loader}.dataset.names=own"]
            options += [f"{loader}.mapper.augmentations.0.short_edge_length=[64,64]"]
        return load_lazy_config(QUICK, [*options, *overrides])

    return load


@pytest.fixture
def train(coco_files, tmp_path, monkeypatch):
    """``train(output, *opts)``: a trainer on ``coco_files``, after ``resume_or_load``."""
    monkeypatch.chdir(tmp_path)
    return functools.partial(build_trainer, coco_files)
