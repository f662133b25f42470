import itertools
import json
import logging
import math
import re

import pytest
import torch
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.events import EventStorage
from helpers import assert_equal, record_images, stream, weights

from gn_detect.engine import Trainer
from gn_detect.engine.progress import ProgressBar
from gn_detect.evaluation.masks import PastedMasks

pytestmark = pytest.mark.slow


def test_an_iteration_takes_its_images_in_steps(train):
    steps = ("SOLVER.IMS_PER_BATCH", 4, "SOLVER.ACCUMULATE_STEPS", 2, "SOLVER.MAX_ITER", 2)
    trainer = train("run", *steps, "DATASETS.TEST", ())
    seen = record_images(trainer)
    trainer.train()
    assert [len(batch) for batch in seen] == [2] * 4
    assert list(itertools.chain(*seen)) == stream(trainer, 0, 8)


def test_evaluation_does_not_change_what_training_draws(train):
    trainer = train("evaluated")
    before = torch.get_rng_state()
    results = Trainer.test(trainer.cfg, trainer.model)
    assert torch.equal(before, torch.get_rng_state())
    assert {"bbox", "segm"} <= results.keys() and "AP50" in results["bbox"]


@pytest.fixture
def pasted(monkeypatch):
    """How many masks were made one by one."""
    made, make = [], PastedMasks.__getitem__

    def count(masks, index):
        made.append(make(masks, index))
        return made[-1]

    monkeypatch.setattr(PastedMasks, "__getitem__", count)
    return made


class OthersTrainer(Trainer):
    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return super().build_evaluator(cfg, dataset_name)


def test_results_are_detectron2s(train, tmp_path, pasted):
    trainer = train("evaluated")
    ours = Trainer.test(trainer.cfg, trainer.model)
    assert pasted
    pasted.clear()
    detectron2 = COCOEvaluator("own", output_dir=str(tmp_path / "theirs"), use_fast_impl=False)
    theirs = Trainer.test(trainer.cfg, trainer.model, [detectron2])
    OthersTrainer.test(trainer.cfg, trainer.model)
    assert not pasted  # others may look at the masks in any way
    assert ours.keys() == theirs.keys() == {"bbox", "segm"}
    for task, metrics in theirs.items():
        assert ours[task] == pytest.approx(metrics, nan_ok=True)
    files = (tmp_path / "evaluated" / "inference", tmp_path / "theirs")
    found = [json.loads((f / "coco_instances_results.json").read_text()) for f in files]
    assert found[0] == found[1] and "counts" in found[0][0]["segmentation"]


def test_a_loss_that_is_not_finite(train, tmp_path, monkeypatch):
    trainer = train("diverged", "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.IMS_PER_BATCH", 2)
    before_step, losses = trainer.run_step, trainer.model.roi_heads.box_predictor.losses

    def broken(*args):
        scale = math.nan if trainer.iter == 3 else 1.0
        return {k: v * (scale if k == "loss_cls" else 1.0) for k, v in losses(*args).items()}

    monkeypatch.setattr(trainer.model.roi_heads.box_predictor, "losses", broken)
    good = {}

    def remember():
        if trainer.iter == 3:
            good.update(weights(trainer))
        before_step()

    monkeypatch.setattr(trainer, "run_step", remember)
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    message = str(error.value)
    assert "diverged at iteration 3 (a loss is not finite)" in message
    assert "loss_cls nan" in message and "loss_rpn_loc 0." in message
    assert message.count(".png") == 2 and "SOLVER.BASE_LR" in message
    # The optimizer has not taken the step, and the last good checkpoint is the last one.
    assert_equal(weights(trainer), good)
    assert (tmp_path / "diverged" / "last_checkpoint").read_text() == "model_0000001.pth"
    assert train("diverged", resume=True).start_iter == 2


@pytest.mark.parametrize("kind, checked", [("norm", True), ("value", False)])
def test_options_of_the_loop(train, kind, checked):
    """Gradients that are clipped by value are not checked."""
    clip = ("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", kind)
    assert train("run", *clip)._trainer.check_gradients is checked
    amp = ("SOLVER.AMP.ENABLED", checked, "SOLVER.AMP.DTYPE", "bfloat16")
    assert train("run", *amp)._trainer.amp_dtype is (torch.bfloat16 if checked else None)


def test_predicted_boxes_that_are_not_finite(train):
    trainer = train("diverged")
    with torch.no_grad():
        trainer.model.proposal_generator.rpn_head.anchor_deltas.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"iteration 0 \(Predicted.*images: .*\.png"):
        trainer.train()


def test_metrics_and_results_are_written(train, tmp_path):
    train("run", "TEST.EVAL_PERIOD", 3).train()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.json").open()]
    assert {"iteration", "total_loss", "loss_mask", "lr", "bbox/AP", "segm/AP"} <= set().union(
        *rows
    )
    assert list((tmp_path / "run").glob("events.out.tfevents*"))
    results = json.loads((tmp_path / "run/inference/coco_instances_results.json").read_text())
    assert results and {"image_id", "bbox", "score", "segmentation"} <= results[0].keys()


def test_a_run_ends_early(train, tmp_path, monkeypatch, caplog):
    values = iter([2.0, 2.0, 1.0, 1.0])  # of the average, and of the weights
    monkeypatch.setattr(
        Trainer, "test", classmethod(lambda *_: {"segm": {"AP": next(values)}, "bbox": {"AP": 9.0}})
    )
    options = ("TEST.EVAL_PERIOD", 1, "SOLVER.EARLY_STOP", 1)
    options += ("TEST.EXPECTED_RESULTS", [["segm", "AP", 1.0, 0.1]])
    trainer = train("run", *options, "SOLVER.EMA.ENABLED", True)
    trainer.train()
    assert trainer.iter == trainer.max_iter == 2
    lines = (tmp_path / "run" / "metrics.json").read_text().splitlines()
    assert json.loads(lines[-1])["segm/AP"] == 1.0
    files = {name: torch.load(tmp_path / "run" / f"model_{name}.pth") for name in ("final", "best")}
    assert {name: file["iteration"] for name, file in files.items()} == {"final": 1, "best": 0}
    resumed = train("run", *options, resume=True)
    resumed.train()
    averaged = tmp_path / "run" / "model_final_ema.safetensors"
    assert averaged.exists() and "model_final_ema.safetensors is not of this run" in caplog.text
    assert resumed.iter == resumed.start_iter == 2
    # The best is weights to start from.
    started = train("next", "MODEL.WEIGHTS", str(tmp_path / "run" / "model_best.safetensors"))
    assert_equal(weights(started), files["best"]["model"])


def test_the_first_iterations_are_logged_early(train, caplog):
    trainer = train("run", "DATASETS.TEST", (), "SOLVER.MAX_ITER", 12)
    with caplog.at_level(logging.INFO):
        trainer.train()
    logged = [re.search(r"iter: (\d+) .*total_loss", message) for message in caplog.messages]
    assert [int(match[1]) for match in logged if match] == [0, 1, 4, 9, 11]  # counted from 0


def test_progress_bar_shows_iteration_losses_and_time(capsys):
    with EventStorage(4) as storage:
        bar = ProgressBar(start_iter=4, max_iter=10)
        for _ in range(3):
            storage.put_scalars(total_loss=2.5, loss_cls=1.25, lr=0.1)
            bar.write()
            storage.step()
        bar._bar.refresh()
        bar.close()
    shown = capsys.readouterr().err.split("\r")[-1]
    assert "7/10" in shown and "total_loss=2.5" in shown and "cls=1.25" in shown
    assert "<" in shown and "lr" not in shown  # elapsed<remaining
