"""Trainers of a small detector, and what two processes do with them, which import this."""

import os
import signal
from pathlib import Path

import pytest
import torch
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from helpers import TINY, CocoFiles, config
from safetensors.torch import load_file
from torch import nn

from gn_detect.data.coco import register_coco_json
from gn_detect.engine import Trainer, lazy, prepare_run
from gn_detect.engine.stopping import Stopped, handle_signals

TWO_IMAGES = ("DATASETS.TEST", (), "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 4)
# The images of an iteration are those of one process with 2 steps, or of 2 processes.
SAME_IMAGES = (*TWO_IMAGES, "INPUT.RANDOM_FLIP", "none", "INPUT.MIN_SIZE_TRAIN", (64,))
SAME_IMAGES += ("SOLVER.WARMUP_ITERS", 1)
# Of a lazy config: when it is saved and evaluated.
PERIODS = ("train.checkpointer.period=3", "train.eval_period=2", "train.max_iter=4")


def build_trainer(files: CocoFiles, output: str | Path, *opts, resume: bool = False) -> Trainer:
    """On ``files``, after ``resume_or_load``."""
    register_coco_json("own", str(files.json_file), str(files.image_root))
    cfg = config(
        "quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml",
        *(*TINY, "MODEL.ROI_HEADS.NUM_CLASSES", 2, "INPUT.MASK_FORMAT", "polygon"),
        *("DATASETS.TRAIN", ("own",), "DATASETS.TEST", ("own",), "TEST.EVAL_PERIOD", 0),
        *("INPUT.MIN_SIZE_TRAIN", (56, 64, 72), "SOLVER.MAX_ITER", 6),
        *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "OUTPUT_DIR", str(output), *opts),
    )
    seed_all_rng(cfg.SEED)  # as default_setup does
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume)
    return trainer


def train_lazy(cfg, *names: str, stop: int | None = None, resume: bool = False) -> dict:
    """Prepare and train a lazy config, for all iterations or the first ``stop``; the tensors of the
    ``.safetensors`` that it leaves."""
    prepare_run(cfg, resume=resume)
    seed_all_rng(99 if resume else 3)
    cfg.train.max_iter = stop or cfg.train.max_iter
    lazy.do_train(cfg, resume=resume)
    files = {name: load_file(f"{cfg.train.output_dir}/{name}.safetensors") for name in names}
    return {f"{name}.{key}": v for name, tensors in files.items() for key, v in tensors.items()}


def clone(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def train_seeded_by_image(trainer: Trainer) -> list[int]:
    """What the model samples (anchors, RoIs) follows from the image; return their ids."""
    seen = []

    def seed(model, inputs):
        (image,) = inputs[0]
        seen.append(image["image_id"])
        torch.manual_seed(image["image_id"])

    trainer.model.register_forward_pre_hook(seed)
    trainer.train()
    return seen


def unwrapped(trainer: Trainer) -> nn.Module:
    return getattr(trainer.model, "module", trainer.model)


def train_and_resume(files: CocoFiles, output: Path) -> None:
    """In each of two processes."""
    torch.set_num_threads(1)

    def train(name, stop, seed, resume=False, signalled=False):
        periods = ("SOLVER.CHECKPOINT_PERIOD", 3, "TEST.EVAL_PERIOD", 2)  # both are saved at
        options = (*TWO_IMAGES, *periods, "SEED", seed + comm.get_rank())
        options += ("SOLVER.EMA.ENABLED", True)
        trainer = build_trainer(files, output / name, *options, resume=resume)
        seen = []  # what the model sees of an image tells its augmentation: size and flip
        trainer.model.register_forward_pre_hook(
            lambda model, inputs: seen.extend(d["image"][0, 0].tolist() for d in inputs[0])
        )
        trainer.max_iter = stop
        if signalled and comm.get_rank() == 1:  # the other process learns of it after the step
            trainer.model.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        if signalled:
            with pytest.raises(Stopped) as error, handle_signals():
                trainer.train()
            file = f"{output / name}/model_latest.pth"
            message = f"stopped after iteration 1; {file} has it: go on with --resume"
            assert error.value.message == f"SIGTERM: {message} (same command)"
            assert torch.load(file)["iteration"] == 0
        else:
            trainer.train()
        return seen, {**clone(unwrapped(trainer)), **trainer._ema.state_dict()}

    trainer = build_trainer(files, output / "two_processes", *SAME_IMAGES)
    seen = comm.gather(train_seeded_by_image(trainer))
    if comm.is_main_process():
        torch.save({"seen": seen, "model": clone(unwrapped(trainer))}, output / "two_processes.pth")

    whole, expected = train("whole", 4, seed=3)
    train("stopped", 2, seed=3)
    train("elastic", 3, seed=3, resume=True)
    train("signalled", 4, seed=3, signalled=True)
    for name, done in (("stopped", 2), ("signalled", 1)):
        resumed, found = train(name, 4, seed=99, resume=True)
        assert resumed == whole[done:], (comm.get_rank(), resumed, whole)
        assert all(torch.equal(expected[name], value) for name, value in found.items())
    first, second = comm.all_gather(torch.cat([v.float().flatten() for v in found.values()]))
    assert torch.equal(first, second)  # the processes see other images, and train the same
