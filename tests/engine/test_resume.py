"""A run that goes on as if it had not stopped, and what may change on the way."""

import itertools
import logging
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from detectron2.data.samplers import TrainingSampler
from detectron2.modeling.meta_arch import retinanet
from engine.trainers import build_trainer
from fvcore.nn import sigmoid_focal_loss
from helpers import CocoFiles, assert_equal, config, differences, record_images, stream, weights
from safetensors.torch import load_file

from gn_detect.config import ConfigError
from gn_detect.data.sampler import ResumableSampler
from gn_detect.engine.resume import Resume
from gn_detect.settings import Settings
from gn_detect.solver import resolve_schedule

pytestmark = pytest.mark.slow

NO_TEST = ("DATASETS.TEST", ())
SAMPLER = (*NO_TEST, "DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler")
SAMPLER += ("DATALOADER.REPEAT_THRESHOLD", 0.9)


EMA = ("SOLVER.EMA.ENABLED", True)
STEPS = (*NO_TEST, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.ACCUMULATE_STEPS", 2, *EMA)
STEPS += ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16")
STEPS += ("INPUT.COPY_PASTE.ENABLED", True, "INPUT.COLOR_JITTER", 0.3)  # closed in iteration 5
HOOKS = ("EMA", "EvalHook", "RunningMeans")
EVALUATED = ("TEST.EVAL_PERIOD", 2, *EMA, "SOLVER.EMA.DECAY", 0.5)


# The mean that the mask loss is divided by goes on.
PASSES = ("MODEL.ROI_MASK_HEAD.LOSS_NORMALIZER", "running", "MODEL.GN.MASK_PADDING", True)
# As does that of Detectron2's own RetinaNet.
LEVELS = ["res3", "res4", "res5"]
RETINANET = (*NO_TEST, *EMA, "MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.MASK_ON", False)
RETINANET += ("MODEL.BACKBONE.NAME", "build_gn_retinanet_resnet_fpn_backbone")
RETINANET += ("MODEL.RESNETS.OUT_FEATURES", LEVELS, "MODEL.FPN.IN_FEATURES", LEVELS)
RETINANET += ("MODEL.RETINANET.NUM_CLASSES", 2)


@pytest.mark.parametrize(
    "changes",
    [
        EVALUATED,
        (*NO_TEST, "MODEL.CHANNELS_LAST", True, *EMA),
        SAMPLER,
        (*STEPS, *PASSES),
        RETINANET,
    ],
)
def test_resumed_run_equals_the_uninterrupted_one(train, tmp_path, changes, monkeypatch):
    # TorchScript's adds in another order in the first pass of a process.
    monkeypatch.setattr(retinanet, "sigmoid_focal_loss_jit", sigmoid_focal_loss)
    options = ("SOLVER.CHECKPOINT_PERIOD", 4, *changes)
    whole = train("whole", *options)
    whole.train()
    assert (tmp_path / "whole" / "last_checkpoint").read_text() == "model_final.pth"

    stopped = train("stopped", *options)
    stopped.max_iter = 4  # as if it was killed there; the schedule is that of 6 iterations
    stopped.train()
    final = weights(whole)
    assert any((final[k] != v).any() for k, v in weights(stopped).items())

    # With another seed: what counts is what the checkpoint holds.
    resumed = train("stopped", *options, "SEED", 99, resume=True)
    assert resumed.start_iter == 4
    resumed.train()
    assert_equal(weights(resumed), weights(whole))
    states = [torch.load(tmp_path / name / "model_final.pth") for name in ("whole", "stopped")]
    whole, resumed = ({k: s["trainer"]["hooks"].get(k) for k in HOOKS} for s in states)
    assert differences(resumed, whole) == []
    assert ("ema/bbox/AP" in whole["EvalHook"]["metrics"]) == (changes is EVALUATED)
    assert (whole["EMA"] is None) == (changes is SAMPLER)
    if whole["EMA"]:
        assert any((whole["EMA"][f"module.{k}"] != v).any() for k, v in final.items())


@pytest.mark.parametrize("old, new", [(True, False), (False, True)])
def test_resuming_with_another_memory_format(train, tmp_path, old, new):
    whole = train("whole", *NO_TEST, "MODEL.CHANNELS_LAST", old)
    whole.train()
    stopped = train("stopped", *NO_TEST, "MODEL.CHANNELS_LAST", old)
    stopped.max_iter = 4
    stopped.train()
    saved = load_file(tmp_path / "stopped" / "model_final.safetensors")
    resumed = train("stopped", *NO_TEST, "MODEL.CHANNELS_LAST", new, resume=True)
    assert list(saved) == sorted(weights(resumed))
    conv = "backbone.bottom_up.res2.0.conv2.weight"
    assert weights(resumed)[conv].is_contiguous(memory_format=torch.channels_last) == new
    before = weights(stopped)
    assert_equal(saved, before)
    assert_equal(weights(resumed), before)
    resumed.train()
    final = weights(resumed)
    for key, value in weights(whole).items():  # of a run without the change, up to rounding
        change = (value - before[key]).norm()
        assert (final[key] - value).norm() <= 3e-2 * change + 1e-6, key


def test_a_checkpoint_of_detectron2s_own_trainer_can_be_resumed(train, tmp_path):
    trainer = train("own")
    trainer.train()
    checkpoint = torch.load(tmp_path / "own" / "model_final.pth")
    del checkpoint["trainer"]["hooks"]["Resume"], checkpoint["config"], checkpoint["classes"]
    for group in checkpoint["trainer"]["_trainer"]["optimizer"]["param_groups"]:
        del group["param_names"]
    checkpoint["iteration"] = checkpoint["trainer"]["iteration"] = 2
    torch.save(checkpoint, tmp_path / "own" / "model_final.pth")
    assert train("own", resume=True).start_iter == 3


TWO_IMAGES = (*NO_TEST, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 6, "SOLVER.BASE_LR", 0.02)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(directory, momentum) after 3 of 6 iterations of 2 images."""
    root = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        trainer = build_trainer(CocoFiles(root / "data"), "run", *TWO_IMAGES)
        trainer.max_iter = 3
        trainer.train()
    return root / "run", momentum(trainer)


@pytest.fixture
def stopped(checkpoint, tmp_path):
    """What ``train("run", resume=True)`` goes on from; the momentum of its optimizer."""
    shutil.copytree(checkpoint[0], tmp_path / "run")
    return checkpoint[1]


def messages(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("gn_detect")]


def momentum(trainer) -> dict[str, torch.Tensor]:
    """By the names of the parameters."""
    state = trainer.optimizer.state
    return {n: state[p]["momentum_buffer"].clone() for n, p in trainer.model.named_parameters()}


def cosine(base_lr: float, iteration: int, max_iter: int) -> float:
    """The learning rate of the config, after its warm-up."""
    return base_lr * (1 + math.cos(math.pi * iteration / max_iter)) / 2


ONE_IMAGE = (*NO_TEST, "SOLVER.IMS_PER_BATCH", 1, "SOLVER.MAX_ITER", 12, "SOLVER.BASE_LR", 0.01)


def test_resuming_with_half_of_the_images_per_iteration(train, stopped, caplog):
    with caplog.at_level(logging.WARNING, "gn_detect"):
        resumed = train("run", *ONE_IMAGE, "SEED", 99, resume=True)
    assert messages(caplog) == [
        "--resume: the options of this run hold: SEED 99 (it was 3), SOLVER.BASE_LR 0.01 (it was "
        "0.02), SOLVER.IMS_PER_BATCH 1 (it was 2), SOLVER.MAX_ITER 12 (it was 6)",
        "resuming with 1 images per iteration, where the checkpoint had 2: its 3 iterations saw 6 "
        "images, so this run continues at iteration 6 of 12, after 6 images",
    ]
    assert resumed.start_iter == 6
    assert_equal(momentum(resumed), stopped)

    rates, seen = [], record_images(resumed)
    resumed.optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates.append([group["lr"] for group in optimizer.param_groups])
    )
    resumed.train()
    assert all(group["initial_lr"] == 0.01 for group in resumed.optimizer.param_groups)
    assert len(rates) == 6
    for iteration, groups in zip(range(6, 12), rates, strict=True):
        assert groups == pytest.approx([cosine(0.01, iteration, 12)] * len(groups))
    assert [file for (file,) in seen] == stream(resumed, 6, 12)
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
    assert list(itertools.chain(*seen)) == stream(resumed, 4, 12)


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
        "--resume: the options of this run hold: SOLVER.ACCUMULATE_STEPS 2 (it was null)",
        "resuming with 1 process(es) and 2 accumulation step(s), where the checkpoint had "
        "1 process(es) and 1 accumulation step(s): an iteration still has 2 images, but their "
        "order and augmentation are not those of a run without the change",
    ]
    assert resumed.start_iter == 3
    assert resumed.optimizer.param_groups[0]["lr"] == pytest.approx(cosine(0.02, 3, 6))
    seen = record_images(resumed)
    resumed.train()
    assert list(itertools.chain(*seen)) == stream(resumed, 6, 12)


def test_resuming_beyond_the_end(train, tmp_path):
    train("run", *TWO_IMAGES).train()
    with pytest.raises(
        ConfigError, match="6 iterations of 2 images saw more than the 6 iterations of 1"
    ):
        train("run", *ONE_IMAGE, "SOLVER.MAX_ITER", 6, resume=True)
    shorter = train("run", *TWO_IMAGES, "SOLVER.MAX_ITER", 4, resume=True)
    assert shorter.start_iter == 4
    finished = train("run", *ONE_IMAGE, resume=True)  # nothing is left to do
    assert finished.start_iter == finished.max_iter == 12
    file = tmp_path / "run" / "model_final.safetensors"
    file.unlink()  # but to write what a full disk has refused
    finished.train()
    assert_equal(load_file(file), weights(finished))


def progress(
    monkeypatch, processes: int, max_iter: int, batch: tuple, saved=None, close=0.0
) -> Resume:
    """Of a run in so many processes, which has closed its augmentation for the share ``close`` at
    its end; of ``saved``, the state of another one."""
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: processes)
    cfg = config(
        "quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml", "SOLVER.MAX_ITER", max_iter, *batch
    )
    resolve_schedule(Settings(cfg), processes)
    sampler = ResumableSampler(TrainingSampler(9, seed=1), [i % 2 for i in range(9)], 2)
    sampler.close = close
    loader = SimpleNamespace(dataset=SimpleNamespace(sampler=sampler))
    loop = SimpleNamespace(accumulate_steps=cfg.SOLVER.ACCUMULATE_STEPS, data_loader=loader)
    loop._data_loader_iter = None
    resume = Resume(Settings(cfg), loop, None)
    resume.load_state_dict(saved or {})
    return resume


@pytest.mark.parametrize("per_gpu", [1, 3])
@pytest.mark.parametrize("max_iter", [7, 100, 1001])
def test_processes_that_come_and_go(monkeypatch, per_gpu, max_iter):
    """At any moment, the end included: no run sees more images than its share of the recipe, and
    the rounding of iterations is no error."""
    batch = ("SOLVER.IMS_PER_BATCH", 16, "SOLVER.REFERENCE_BATCH_SIZE", 16)
    batch += ("SOLVER.IMS_PER_GPU", per_gpu)
    for first, second in itertools.product((1, 2, 3, 5, 8), repeat=2):
        one = progress(monkeypatch, first, max_iter, batch)
        state = one.state_dict()
        for done in {1, one._max_iter // 2, one._max_iter - 1, one._max_iter}:
            other = progress(monkeypatch, second, max_iter, batch, saved=state)
            start = other.start(done)
            images = min(done * first * per_gpu, other._max_iter * second * per_gpu)
            assert 0 <= images - start * second * per_gpu < second * per_gpu
            assert start <= other._max_iter


@pytest.mark.parametrize(
    "saved, done, start", [(None, 0, 0), ((16, 1), 5, 10), ((8, 2), 5, 5), ((4, 1), 36, 18)]
)
def test_the_end_of_a_run_is_without_more_augmentation(monkeypatch, caplog, saved, done, start):
    """Of a resumed one, too, whose checkpoint is of other images per iteration."""
    batch = ("SOLVER.IMS_PER_BATCH", 8, "SOLVER.REFERENCE_BATCH_SIZE", 8)
    state = None
    if saved:
        images, steps = saved
        state = {"batch": {"images_per_iteration": images, "accumulate_steps": steps}}
        state["batch"]["processes"] = 2
    resume = progress(
        monkeypatch, 2, 20, (*batch, "SOLVER.ACCUMULATE_STEPS", 2), saved=state, close=0.15
    )
    assert resume.start(done) == start
    with caplog.at_level(logging.INFO, "gn_detect"):
        resume.before_train()
    assert "from iteration 17 on: no copy-paste, no colour jitter" in messages(caplog)
    images = list(itertools.islice(resume._sampler, (20 - start) * 4))  # 8 in 2 processes
    assert [image < 0 for image in images] == [i // 4 + start >= 17 for i in range(len(images))]
    plain = list(itertools.islice(resume._sampler._batches(), start * 2, 20 * 2))
    assert [max(i, ~i) for i in images] == list(itertools.chain(*plain))


@pytest.mark.parametrize("accumulate", [1, "auto"])
def test_processes_that_share_the_same_images(monkeypatch, accumulate):
    batch = ("SOLVER.IMS_PER_BATCH", 8, "SOLVER.REFERENCE_BATCH_SIZE", 8)
    if accumulate == "auto":
        batch += ("SOLVER.IMS_PER_GPU", 1, "SOLVER.ACCUMULATE_STEPS", "auto")
    state = progress(monkeypatch, 2, 50, batch).state_dict()
    for processes in (1, 4, 2):
        other = progress(monkeypatch, processes, 50, batch, saved=state)
        assert [other.start(done) for done in (1, 49, 50)] == [1, 49, 50]


OPTIONS = {
    "SOLVER.BASE_LR": 0.005,
    "SOLVER.WEIGHT_DECAY": 0.01,
    "SOLVER.MOMENTUM": 0.5,
    "SOLVER.NESTEROV": True,
    "SOLVER.WEIGHT_DECAY_NORM": 0.002,  # other groups of parameters
    "SOLVER.BIAS_LR_FACTOR": 2.0,
    "SOLVER.GAMMA": 0.5,
}


@pytest.mark.parametrize("key, value", OPTIONS.items())
def test_the_options_of_the_resumed_run_hold(train, stopped, caplog, key, value):
    """In all groups; momentum stays with its parameter, though groups are others."""
    with caplog.at_level(logging.WARNING, "gn_detect"):
        resumed = train("run", *TWO_IMAGES, key, value, resume=True)
    assert any(f"{key} {value} (it was ".lower() in m.lower() for m in messages(caplog))
    fresh = train("fresh", *TWO_IMAGES, key, value)
    multiplier = fresh.scheduler._multiplier(3 / 6)
    groups = zip(resumed.optimizer.param_groups, fresh.optimizer.param_groups, strict=True)
    for actual, expected in groups:
        options = {k: v for k, v in expected.items() if k not in ("params", "lr")}
        assert {k: v for k, v in actual.items() if k not in ("params", "lr")} == options
        assert actual["lr"] == pytest.approx(expected["initial_lr"] * multiplier)
    assert_equal(momentum(resumed), stopped)


def test_parameters_that_are_trained_from_now_on_start_without_momentum(train, caplog):
    trainer = train("run", *TWO_IMAGES, "MODEL.BACKBONE.FREEZE_AT", 2)
    trainer.max_iter = 3
    trainer.train()
    with caplog.at_level(logging.WARNING, "gn_detect"):
        resumed = train("run", *TWO_IMAGES, resume=True)
    assert "does not know 33 parameters of this run, such as backbone.bottom_up.stem" in caplog.text
    names = dict(resumed.model.named_parameters())
    assert names["backbone.bottom_up.stem.conv1.weight"] not in resumed.optimizer.state
    assert names["backbone.bottom_up.res3.0.conv1.weight"] in resumed.optimizer.state
    resumed.train()


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            ("MODEL.ROI_HEADS.NUM_CLASSES", 3),
            r"box_predictor.cls_score.weight is \[3, 32\] in it, \[4, 32\] here",
        ),
        (("MODEL.FPN.OUT_CHANNELS", 64), r"fpn_lateral2.weight is \[32, 32, 1, 1\] in it"),
        (("MODEL.RPN.CONV_DIMS", [-1, -1]), "it lacks 4 of the parameters, such as proposal_gen"),
    ],
)
def test_another_model_is_not_resumed(train, stopped, changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        train("run", *TWO_IMAGES, *changes, resume=True)
    advice = "start a new OUTPUT_DIR with MODEL.WEIGHTS run/model_final.pth"
    assert advice in str(error.value)


def test_exchanged_classes_are_not_resumed(train, stopped, coco_files):
    cat, dog = coco_files.content["categories"]
    cat["name"], dog["name"] = dog["name"], cat["name"]
    coco_files.write()
    with pytest.raises(ConfigError, match=r"2 classes \(dog, cat\), the data 2 \(cat, dog\)"):
        train("run", *TWO_IMAGES, resume=True)


def test_an_order_that_cannot_be_continued_is_one_warning(train, stopped, caplog):
    class Alternating(TrainingSampler):
        """Of a user, without a seed."""

        def __init__(self, size):
            self.size = size

        def __iter__(self):
            return itertools.cycle(range(self.size))

    trainer = train("run", *TWO_IMAGES)
    trainer.data_loader.dataset.sampler.sampler = Alternating(3)
    with caplog.at_level(logging.WARNING, "gn_detect"):
        trainer.resume_or_load(resume=True)
    assert messages(caplog) == [
        "the order of the images is drawn anew: Alternating keeps no seed",
    ]


def test_data_of_another_size_is_said(train, stopped, coco_files, caplog):
    coco_files.content["annotations"].pop()  # without which its image is left out
    coco_files.write()
    with caplog.at_level(logging.WARNING, "gn_detect"):
        train("run", *TWO_IMAGES, resume=True)
    assert "drawn anew: its num_images is 2, the checkpoint's 3" in caplog.text
