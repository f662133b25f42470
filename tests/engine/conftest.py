import os

import pytest
from detectron2.utils.env import seed_all_rng
from helpers import TINY, config

import gn_detect
from gn_detect.data.coco import register_coco_json
from gn_detect.engine import Trainer
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
def train(coco_files, tmp_path):
    """``train(output, *opts)``: a trainer on ``coco_files``, after ``resume_or_load``."""
    register_coco_json("own", str(coco_files.json_file), str(coco_files.image_root))

    def build(output: str, *opts, resume: bool = False) -> Trainer:
        cfg = config(
            "quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml",
            *(*TINY, "MODEL.ROI_HEADS.NUM_CLASSES", 2, "INPUT.MASK_FORMAT", "polygon"),
            *("DATASETS.TRAIN", ("own",), "DATASETS.TEST", ("own",), "TEST.EVAL_PERIOD", 0),
            *("INPUT.MIN_SIZE_TRAIN", (56, 64, 72), "SOLVER.MAX_ITER", 6),
            *(
                "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
                0.0,
                "OUTPUT_DIR",
                str(tmp_path / output),
                *opts,
            ),
        )
        seed_all_rng(cfg.SEED)  # as default_setup does
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume)
        return trainer

    return build
