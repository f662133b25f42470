import itertools
import json
import logging
import math

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.samplers import TrainingSampler
from detectron2.engine import hooks
from detectron2.evaluation import COCOEvaluator, COCOPanopticEvaluator, SemSegEvaluator
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from helpers import TINY, config
from safetensors.torch import load_file

from gn_detect.config import ConfigError
from gn_detect.data.coco import register_coco_json
from gn_detect.engine import Trainer
from gn_detect.engine.hooks import ProgressBar

TRAINED = "quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml"


@pytest.fixture
def train(coco_files, tmp_path):
    """``train(output, *opts)``: a trainer on ``coco_files``, after ``resume_or_load``."""
    register_coco_json("own", str(coco_files.json_file), str(coco_files.image_root))

    def build(output: str, *opts, resume: bool = False) -> Trainer:
        cfg = config(
            TRAINED,
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


def weights(trainer):
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}


def record_images(trainer) -> list[list[str]]:
    """The image files of each forward pass in training, from now on."""
    seen = []

    def record(model, inputs):
        if model.training:
            seen.append([image["file_name"] for image in inputs[0]])

    trainer.model.register_forward_pre_hook(record)
    return seen


def stream(start: int, stop: int) -> list[str]:
    """The image files of training with ``TINY``, from ``start`` on, as Detectron2 draws them."""
    files = [image["file_name"] for image in DatasetCatalog.get("own")]
    indices = TrainingSampler(len(files), seed=3)
    return [files[i] for i in itertools.islice(indices, start, stop)]


@pytest.mark.parametrize("channels_last", [False, True])
def test_resumed_run_equals_the_uninterrupted_one(train, tmp_path, channels_last):
    options = ("SOLVER.CHECKPOINT_PERIOD", 4, "TEST.EVAL_PERIOD", 2)
    options += ("MODEL.CHANNELS_LAST", channels_last)
    whole = train("whole", *options)
    whole.train()
    assert (tmp_path / "whole" / "last_checkpoint").read_text() == "model_final.pth"

    stopped = train("stopped", *options)
    stopped.max_iter = 4  # as if it was killed there; the schedule is that of 6 iterations
    stopped.train()
    assert any((weights(whole)[k] != v).any() for k, v in weights(stopped).items())

    # With another seed: what counts is what the checkpoint holds.
    resumed = train("stopped", *options, "SEED", 99, resume=True)
    assert resumed.start_iter == 4
    resumed.train()
    for key, value in weights(whole).items():
        assert torch.equal(weights(resumed)[key], value), key


@pytest.mark.parametrize("old, new", [(True, False), (False, True)])
def test_resuming_with_another_memory_format(train, tmp_path, old, new):
    whole = train("whole", "MODEL.CHANNELS_LAST", old)
    whole.train()
    stopped = train("stopped", "MODEL.CHANNELS_LAST", old)
    stopped.max_iter = 4
    stopped.train()
    saved = load_file(tmp_path / "stopped" / "model_final.safetensors")
    resumed = train("stopped", "MODEL.CHANNELS_LAST", new, resume=True)
    assert list(saved) == sorted(weights(resumed))
    conv = "backbone.bottom_up.res2.0.conv1.weight"
    assert weights(resumed)[conv].is_contiguous(memory_format=torch.channels_last) == new
    for key, value in weights(stopped).items():
        assert torch.equal(saved[key], value) and torch.equal(weights(resumed)[key], value), key
    resumed.train()
    for key, value in weights(whole).items():  # of a run without the change, up to rounding
        change = (value - weights(stopped)[key]).norm()
        assert (weights(resumed)[key] - value).norm() <= 1e-2 * change + 1e-6, key


def test_a_checkpoint_of_detectron2s_own_trainer_can_be_resumed(train, tmp_path):
    trainer = train("own")
    trainer.train()
    checkpoint = torch.load(tmp_path / "own" / "model_final.pth")
    for key in ("random_state", "data_seed", "batch"):
        del checkpoint["trainer"][key]
    checkpoint["iteration"] = checkpoint["trainer"]["iteration"] = 2
    torch.save(checkpoint, tmp_path / "own" / "model_final.pth")
    assert train("own", resume=True).start_iter == 3


def test_the_optimizer_is_fused_on_a_cpu(train, monkeypatch):
    trainer, calls, kernel = train("run", "SOLVER.MAX_ITER", 1), [], torch._fused_sgd_
    trained = [p for p in trainer.model.parameters() if p.requires_grad]

    def count(parameters, *args, **kwargs):
        calls.append(len(parameters))
        return kernel(parameters, *args, **kwargs)

    monkeypatch.setattr(torch, "_fused_sgd_", count)
    trainer.train()
    assert sum(calls) == len(trained)
    assert not any(group["fused"] for group in trainer.optimizer.state_dict()["param_groups"])


@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler"])
def test_an_iteration_takes_its_images_in_steps(train, sampler):
    trainer = train(
        "run",
        *("SOLVER.IMS_PER_BATCH", 4, "SOLVER.ACCUMULATE_STEPS", 2, "SOLVER.MAX_ITER", 2),
        *("DATALOADER.SAMPLER_TRAIN", sampler, "DATALOADER.REPEAT_THRESHOLD", 0.1),
    )
    seen = record_images(trainer)
    trainer.train()
    assert [len(batch) for batch in seen] == [2] * 4
    if sampler == "TrainingSampler":
        assert list(itertools.chain(*seen)) == stream(0, 8)


def test_resumed_run_with_accumulation_equals_the_uninterrupted_one(train):
    options = ("SOLVER.IMS_PER_BATCH", 2, "SOLVER.ACCUMULATE_STEPS", 2, "SOLVER.MAX_ITER", 4)
    whole = train("whole", *options)
    whole.train()
    stopped = train("stopped", *options, "SOLVER.CHECKPOINT_PERIOD", 2)
    stopped.max_iter = 2
    stopped.train()
    resumed = train("stopped", *options, "SEED", 99, resume=True)
    assert resumed.start_iter == 2
    resumed.train()
    for key, value in weights(whole).items():
        assert torch.equal(weights(resumed)[key], value), key


NO_TEST = ("DATASETS.TEST", ())
TWO_IMAGES = (*NO_TEST, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 6, "SOLVER.BASE_LR", 0.02)


@pytest.fixture
def stopped(train):
    """Train 3 of 6 iterations of 2 images; return the momentum of the optimizer."""
    trainer = train("run", *TWO_IMAGES)
    trainer.max_iter = 3
    trainer.train()
    return momentum(trainer)


def messages(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("gn_detect")]


def momentum(trainer) -> list[torch.Tensor]:
    state = trainer.optimizer.state_dict()["state"]
    return [values["momentum_buffer"].clone() for values in state.values()]


def cosine(base_lr: float, iteration: int, max_iter: int) -> float:
    """The learning rate of the config, after its warm-up."""
    return base_lr * (1 + math.cos(math.pi * iteration / max_iter)) / 2


ONE_IMAGE = (*NO_TEST, "SOLVER.IMS_PER_BATCH", 1, "SOLVER.MAX_ITER", 12, "SOLVER.BASE_LR", 0.01)


def test_resuming_with_half_of_the_images_per_iteration(train, stopped, caplog):
    with caplog.at_level(logging.WARNING, "gn_detect"):
        resumed = train("run", *ONE_IMAGE, "SEED", 99, resume=True)
    assert messages(caplog) == [
        "resuming with SOLVER.IMS_PER_BATCH 1 (images per iteration), where the checkpoint had 2: "
        "its 3 iterations saw 6 images, so this run continues at iteration 6 of 12, after 6 "
        "images, with the learning rate of its own config there, 0.005"
    ]
    assert resumed.start_iter == 6
    pairs = zip(momentum(resumed), stopped, strict=True)
    assert all(torch.equal(actual, expected) for actual, expected in pairs)

    rates, seen = [], record_images(resumed)
    resumed.optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates.append([group["lr"] for group in optimizer.param_groups])
    )
    resumed.train()
    assert all(group["initial_lr"] == 0.01 for group in resumed.optimizer.param_groups)
    assert len(rates) == 6
    for iteration, groups in zip(range(6, 12), rates, strict=True):
        assert groups == pytest.approx([cosine(0.01, iteration, 12)] * len(groups))
    assert [file for (file,) in seen] == stream(6, 12)
    assert all(value.isfinite().all() for value in weights(resumed).values())

    # What it has saved is its own: resumed once more, it is complete.
    assert train("run", *ONE_IMAGE, resume=True).start_iter == 12


def test_resuming_with_more_images_per_iteration_sees_some_twice(train, stopped, caplog):
    options = (*NO_TEST, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 3, "SOLVER.BASE_LR", 0.04)
    with caplog.at_level(logging.WARNING, "gn_detect"):
        resumed = train("run", *options, "SOLVER.ACCUMULATE_STEPS", 2, resume=True)
    assert resumed.start_iter == 1  # not 1.5
    assert "continues at iteration 1 of 3, after 4 images" in caplog.text
    seen = record_images(resumed)
    resumed.train()
    assert [len(batch) for batch in seen] == [2] * 4
    assert list(itertools.chain(*seen)) == stream(4, 12)


def test_resuming_after_less_than_one_iteration(train):
    trainer = train("run", *TWO_IMAGES)
    trainer.max_iter = 1
    trainer.train()
    resumed = train("run", "SOLVER.IMS_PER_BATCH", 4, resume=True)
    assert resumed.start_iter == 0
    lr = resumed.optimizer.param_groups[0]["lr"]
    assert lr == pytest.approx(resumed.cfg.SOLVER.WARMUP_FACTOR * resumed.cfg.SOLVER.BASE_LR)


def test_resuming_with_the_same_images_in_other_steps(train, stopped, caplog):
    with caplog.at_level(logging.WARNING, "gn_detect"):
        resumed = train("run", *TWO_IMAGES, "SOLVER.ACCUMULATE_STEPS", 2, resume=True)
    assert messages(caplog) == [
        "resuming with 1 process(es) and 2 accumulation step(s), where the checkpoint had "
        "1 process(es) and 1 accumulation step(s): an iteration still has 2 images, but their "
        "order and augmentation are not those of a run without the change"
    ]
    assert resumed.start_iter == 3
    assert resumed.optimizer.param_groups[0]["lr"] == pytest.approx(cosine(0.02, 3, 6))
    seen = record_images(resumed)
    resumed.train()
    assert list(itertools.chain(*seen)) == stream(6, 12)


def test_resuming_with_mixed_precision_switched_on_and_off(train, stopped):
    amp = ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE")
    half = train("run", *TWO_IMAGES, *amp, "float16", resume=True)
    half.max_iter = 4
    half.train()
    resumed = train("run", *TWO_IMAGES, *amp, "bfloat16", resume=True)
    assert resumed.start_iter == 4
    dtypes = set()
    resumed.model.roi_heads.mask_head.predictor.register_forward_hook(
        lambda module, inputs, output: dtypes.add(output.dtype)
    )
    resumed.train()
    assert dtypes == {torch.bfloat16}
    assert all(value.isfinite().all() for value in weights(resumed).values())


def test_fine_tuning_for_other_classes_keeps_all_but_the_predictors(train, tmp_path):
    trainer = train("two")
    trainer.checkpointer.save("two_classes")
    path = str(tmp_path / "two" / "two_classes.pth")
    options = ("MODEL.ROI_HEADS.NUM_CLASSES", 5, "MODEL.WEIGHTS", path, "SEED", 4)
    old, new = weights(trainer), weights(train("five", *options))
    other = {key for key in old if not torch.equal(old[key], new[key])}
    assert old.keys() == new.keys()
    assert other and all("predictor" in key for key in other)
    assert new["roi_heads.box_predictor.cls_score.weight"].shape[0] == 6


def test_evaluation_does_not_change_what_training_draws(train):
    trainer = train("evaluated")
    before = torch.get_rng_state()
    results = Trainer.test(trainer.cfg, trainer.model)
    assert torch.equal(before, torch.get_rng_state())
    assert {"bbox", "segm"} <= results.keys() and "AP50" in results["bbox"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(train, value, tmp_path, monkeypatch):
    trainer = train("diverged", "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.IMS_PER_BATCH", 2)
    before_step, losses = trainer.run_step, trainer.model.roi_heads.box_predictor.losses

    def broken(*args):
        scale = value if trainer.iter == 3 else 1.0
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
    assert f"loss_cls {value:.4g}" in message and "loss_rpn_loc 0." in message
    assert message.count(".png") == 2 and "SOLVER.BASE_LR" in message
    # The optimizer has not taken the step, and the last good checkpoint is the last one.
    assert all(torch.equal(good[k], v) for k, v in weights(trainer).items())
    assert (tmp_path / "diverged" / "last_checkpoint").read_text() == "model_0000001.pth"
    assert train("diverged", resume=True).start_iter == 2


@pytest.mark.parametrize("broken_step", [0, 1])
def test_a_loss_that_is_not_finite_in_one_of_two_steps(train, broken_step, monkeypatch):
    trainer = train("diverged", "SOLVER.IMS_PER_BATCH", 2, "SOLVER.ACCUMULATE_STEPS", 2)
    seen, losses = record_images(trainer), trainer.model.roi_heads.box_predictor.losses

    def broken(*args):
        terms = losses(*args)
        if len(seen) == 2 * 2 + broken_step + 1:
            terms["loss_cls"] = terms["loss_cls"] * math.nan
        return terms

    monkeypatch.setattr(trainer.model.roi_heads.box_predictor, "losses", broken)
    saved, run_step = [], trainer.run_step
    monkeypatch.setattr(trainer, "run_step", lambda: (saved.append(weights(trainer)), run_step()))
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    message, files = str(error.value), [file for (file,) in seen[-2:]]
    assert "diverged at iteration 2 (a loss is not finite); losses: " in message
    assert "loss_cls nan" in message and files[0] != files[1]
    assert files[broken_step] in message and files[1 - broken_step] not in message
    assert all(torch.equal(saved[-1][k], v) for k, v in weights(trainer).items())


def test_a_gradient_that_is_not_finite_names_the_images_of_all_steps(train):
    trainer = train("diverged", "SOLVER.IMS_PER_BATCH", 2, "SOLVER.ACCUMULATE_STEPS", 2)
    seen = record_images(trainer)

    def break_gradient(grad):
        return grad * (math.inf if trainer.iter == 2 else 1)

    trainer.model.roi_heads.box_predictor.cls_score.bias.register_hook(break_gradient)
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    message = str(error.value)
    assert "diverged at iteration 2 (a gradient is not finite); losses: loss_cls " in message
    assert len(seen) == 6 and all(file in message for (file,) in seen[-2:])
    assert "previous" not in message and "nan" not in message


@pytest.mark.parametrize("kind, checked", [("norm", True), ("value", False)])
def test_gradients_that_are_clipped_by_value_are_not_checked(train, kind, checked):
    trainer = train(
        "run", "SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", kind
    )
    assert trainer._trainer.check_gradients is checked


def test_predicted_boxes_that_are_not_finite(train, monkeypatch):
    trainer = train("diverged")
    with torch.no_grad():
        trainer.model.proposal_generator.rpn_head.anchor_deltas.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"iteration 0 \(Predicted.*images: .*\.png"):
        trainer.train()


def test_the_losses_before_predicted_boxes_diverged_are_shown(train, monkeypatch):
    trainer = train("diverged")
    bias = trainer.model.proposal_generator.rpn_head.anchor_deltas.bias
    step = trainer.run_step

    def break_at_two():
        if trainer.iter == 2:
            bias.data.fill_(float("nan"))
        step()

    monkeypatch.setattr(trainer, "run_step", break_at_two)
    with pytest.raises(FloatingPointError, match=r"iteration 2 .*previous losses: loss_\w+ \d"):
        trainer.train()


def test_predicted_boxes_that_diverge_in_the_second_step(train):
    trainer = train("diverged", "SOLVER.IMS_PER_BATCH", 2, "SOLVER.ACCUMULATE_STEPS", 2)
    seen = record_images(trainer)
    bias = trainer.model.proposal_generator.rpn_head.anchor_deltas.bias

    def break_the_next(model, inputs, losses):
        bias.data.fill_(math.nan)

    trainer.model.register_forward_hook(break_the_next)
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    (first,), (second,) = seen
    assert f"images: {second}." in str(error.value) and first not in str(error.value)
    assert "iteration 0 (Predicted" in str(error.value)
    assert "previous losses: loss_cls" in str(error.value)


def test_metrics_and_results_are_written(train, tmp_path):
    train("run", "TEST.EVAL_PERIOD", 3).train()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.json").open()]
    assert {"iteration", "total_loss", "loss_mask", "lr", "bbox/AP", "segm/AP"} <= set().union(
        *rows
    )
    assert list((tmp_path / "run").glob("events.out.tfevents*"))
    results = json.loads((tmp_path / "run/inference/coco_instances_results.json").read_text())
    assert results and {"image_id", "bbox", "score", "segmentation"} <= results[0].keys()


def test_resuming_beyond_the_end(train, tmp_path):
    train("run", *TWO_IMAGES).train()
    with pytest.raises(ConfigError, match="6 iterations of 2 images .*MAX_ITER 6 iterations"):
        train("run", *ONE_IMAGE, "SOLVER.MAX_ITER", 6, resume=True)
    finished = train("run", *ONE_IMAGE, resume=True)  # nothing is left to do
    assert finished.start_iter == finished.max_iter == 12
    file = tmp_path / "run" / "model_final.safetensors"
    file.unlink()  # but to write what a full disk has refused
    finished.train()
    saved = load_file(file)
    assert all(torch.equal(saved[key], value) for key, value in weights(finished).items())


def test_without_a_test_set_nothing_is_evaluated(train):
    trainer = train("run", "DATASETS.TEST", ())
    assert not any(isinstance(h, hooks.EvalHook) for h in trainer._hooks)
    trainer.train()


def test_an_evaluator_type_that_is_not_coco(train):
    trainer = train("run")
    MetadataCatalog.get("lvis_data").evaluator_type = "lvis"
    with pytest.raises(ValueError, match="dataset lvis_data has the evaluator type 'lvis'"):
        Trainer.build_evaluator(trainer.cfg, "lvis_data")


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


def test_panoptic_data_has_the_three_evaluations_of_detectron2(train, coco_files):
    """As in Detectron2's tools/train_net.py."""
    DatasetCatalog.register("panoptic", list)
    MetadataCatalog.get("panoptic").set(
        evaluator_type="coco_panoptic_seg",
        json_file=str(coco_files.json_file),
        thing_dataset_id_to_contiguous_id={3: 0, 7: 1},
        stuff_dataset_id_to_contiguous_id={0: 0, 9: 1},
        stuff_classes=["things", "sky"],
        ignore_label=255,
    )
    evaluators = Trainer.build_evaluator(train("run").cfg, "panoptic")._evaluators
    assert [type(e) for e in evaluators] == [COCOEvaluator, SemSegEvaluator, COCOPanopticEvaluator]
