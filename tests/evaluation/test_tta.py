"""Test-time augmentation is Detectron2's own."""

import json

import pytest
import torch
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import GeneralizedRCNNWithTTA
from engine.trainers import build_trainer
from helpers import config, run_tool
from torch import nn

from gn_detect.config import ConfigError
from gn_detect.engine import Trainer
from gn_detect.engine.guards import check_options
from gn_detect.evaluation import describe_tta, masks_one_by_one, with_tta
from gn_detect.evaluation.masks import PastedMasks

TTA = ("TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (48, 64), "TEST.AUG.MAX_SIZE", 96)


@pytest.fixture
def trainer(coco_files, tmp_path):
    trainer = build_trainer(coco_files, tmp_path / "run", *TTA, "SOLVER.MAX_ITER", 1)
    with torch.no_grad():  # so that masks have edges
        trainer.model.roi_heads.mask_head.predictor.weight.mul_(300)
    return trainer


def test_results_are_detectron2s(trainer, tmp_path, caplog):
    cfg, model = trainer.cfg, trainer.model.train()
    with caplog.at_level("INFO", "gn_detect"):
        results = Trainer.test_with_tta(cfg, model)
    assert results.keys() == {"bbox_TTA", "segm_TTA"} and results["segm_TTA"].keys() >= {"AP50"}
    assert "4 passes per image: shorter side 48, 64, each also flipped" in caplog.text
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in with_tta(cfg, model.eval()).modules())
    written = json.loads((tmp_path / "run/TTA/inference/coco_instances_results.json").read_text())
    expected = []
    reference = GeneralizedRCNNWithTTA(cfg, model).eval()
    for batch in Trainer.build_test_loader(cfg, "own"):
        with torch.no_grad():
            (found,) = reference(batch)
        expected += instances_to_coco_json(found["instances"], batch[0]["image_id"])
    ids = {0: 3, 1: 7}  # of coco_json
    assert written == [{**e, "category_id": ids[e["category_id"]]} for e in expected]
    assert len(written) > 3


def test_masks_are_made_one_by_one(trainer):
    (batch,) = list(Trainer.build_test_loader(trainer.cfg, "own"))[:1]
    model = GeneralizedRCNNWithTTA(trainer.cfg, trainer.model).eval()
    with torch.no_grad():
        (expected,) = model(batch)
        with masks_one_by_one(model):
            (found,) = model(batch)
        (after,) = model(batch)
    expected, found, after = (o["instances"].pred_masks for o in (expected, found, after))
    assert isinstance(found, PastedMasks) and torch.equal(torch.stack(list(found)), expected)
    assert torch.equal(after, expected) and 0 < expected.float().mean() < 1


def test_at_the_end_of_a_training_and_with_eval_only(trainer, coco_files, tmp_path):
    trainer.cfg.TEST.REPORT = True
    trainer.train()
    assert "mask AP (TTA)" in (tmp_path / "run/report.html").read_text()
    lines = map(json.loads, (tmp_path / "run/metrics.json").read_text().splitlines())
    metrics = {name: value for line in lines for name, value in line.items()}
    assert {"bbox/AP", "segm/AP", "bbox_TTA/AP", "segm_TTA/AP50"} <= metrics.keys()
    (tmp_path / "config.yaml").write_text(trainer.cfg.dump())
    weights = ("MODEL.WEIGHTS", tmp_path / "run/model_final.pth", "OUTPUT_DIR", tmp_path / "again")
    arguments = ["--config-file", tmp_path / "config.yaml", *coco_files.arguments("val")]
    run_tool("train_net.py", "--eval-only", *arguments, *weights)
    for file in ("inference", "TTA/inference"):
        name = f"{file}/coco_instances_results.json"
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_switched_off(trainer):
    trainer.cfg.TEST.AUG.ENABLED = False
    assert Trainer.test_with_tta(trainer.cfg, nn.Identity()) == {}
    trainer.cfg.merge_from_list(["TEST.AUG.ENABLED", True, "DATASETS.TEST", ()])
    assert Trainer.test_with_tta(trainer.cfg, trainer.model) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["MODEL.META_ARCHITECTURE", "GNRetinaNet"], "META_ARCHITECTURE is GNRetinaNet: Detectron"),
        (["MODEL.META_ARCHITECTURE", "PanopticFPN"], "META_ARCHITECTURE is PanopticFPN: Detectron"),
        (["MODEL.KEYPOINT_ON", True], "MODEL.KEYPOINT_ON is True: .* set it to False"),
        (["MODEL.LOAD_PROPOSALS", True], "MODEL.LOAD_PROPOSALS is True: "),
        (["TEST.AUG.MIN_SIZES", ()], r"MIN_SIZES is \(\) and MAX_SIZE 96; they must be"),
        (["TEST.AUG.MIN_SIZES", (0, 64)], r"MIN_SIZES is \(0, 64\)"),
    ],
)
def test_what_cannot_be_augmented(options, message):
    cfg = config("quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml", *TTA)
    check_options(cfg, training=False)
    cfg.merge_from_list(options)
    with pytest.raises(ConfigError, match=message):
        check_options(cfg, training=False)
    cfg.TEST.AUG.ENABLED = False
    check_options(cfg, training=True)


def test_without_flips():
    cfg = config("quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml", *TTA, "TEST.AUG.FLIP", False)
    assert describe_tta(cfg) == "2 passes per image: shorter side 48, 64"
