import functools
import os

import pytest
from dataset_commands import lazy_config
from engine.trainers import build_trainer

from gn_detect.data.coco import register_coco_json
from gn_detect.engine.lazy_config import load_lazy_config


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Not to wait for the disk: tests/checkpoint/test_saving.py holds what a crash leaves."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def lazy_data(coco_files, tmp_path):
    """A lazy config of three images of two classes."""
    register_coco_json("own", str(coco_files.json_file), str(coco_files.image_root))
    path = str(lazy_config(tmp_path / "lazy.py", coco_files, coco_files))
    own = ["dataloader.train.dataset.names=own", "dataloader.test.dataset.names=own"]
    return lambda *overrides: load_lazy_config(path, ["train.device=cpu", *own, *overrides])


@pytest.fixture
def train(coco_files, tmp_path, monkeypatch):
    """``train(output, *opts)``: a trainer on ``coco_files``, after ``resume_or_load``."""
    monkeypatch.chdir(tmp_path)
    return functools.partial(build_trainer, coco_files)
