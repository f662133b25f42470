"""Detectron2's DefaultTrainer, for GPUs and CPUs, resumable to the bit."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import sys
import weakref

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, TrainerBase, create_ddp_model, hooks
from detectron2.evaluation import (
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    SemSegEvaluator,
)
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter
from tqdm.contrib.logging import logging_redirect_tqdm

from gn_detect.checkpoint import Checkpointer, WeightGuards
from gn_detect.config import ConfigError
from gn_detect.data.coco import COCO_EVALUATORS
from gn_detect.data.loader import (
    ResumableTrainingSampler,
    build_test_loader,
    build_train_loader,
)
from gn_detect.solver import fuse_sgd

from .hooks import FiniteLossCheck, ProgressBar
from .prepare import shorten_expected_error
from .train_loop import AMP_DTYPES, AccumulatingTrainer

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Train, evaluate and resume a detector from a config.

    What it changes in DefaultTrainer: data parallel training on CPUs (gloo); gradient
    accumulation; bfloat16; fused SGD on CPUs; a loss that is not finite names the images; the COCO
    evaluation; a progress bar on a terminal; and a checkpoint that also holds the random state and
    the place in the training data, so that a resumed run goes on as if it had not stopped. With
    several processes, or with data loading workers, the order of the images continues exactly, but
    their random augmentation does not.

    A run can be resumed with another number of images per iteration: it continues at the
    iteration that has seen as many images (rounded down, so that some may be seen twice), with
    the learning rate that its own config has there. Which images of an epoch were seen is exact
    but for those that had waited for a batch of their orientation.
    """

    def __init__(self, cfg: CfgNode):
        TrainerBase.__init__(self)  # DefaultTrainer's own would build its kind of DDP and loader
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        on_cpu = {"device_ids": None} if cfg.MODEL.DEVICE == "cpu" else {}
        model = create_ddp_model(model, broadcast_buffers=False, **on_cpu)
        clip = cfg.SOLVER.CLIP_GRADIENTS
        self._trainer = AccumulatingTrainer(
            model,
            loader,
            optimizer,
            accumulate_steps=cfg.SOLVER.ACCUMULATE_STEPS or 1,
            amp_dtype=AMP_DTYPES[cfg.SOLVER.AMP.DTYPE] if cfg.SOLVER.AMP.ENABLED else None,
            check_gradients=not (clip.ENABLED and clip.CLIP_TYPE == "value"),
        )
        self._finite_losses = FiniteLossCheck()
        self._trainer.register_hooks([self._finite_losses])

        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(
            model,
            cfg.OUTPUT_DIR,
            guards=WeightGuards.from_config(cfg),
            keep=cfg.SOLVER.CHECKPOINT_KEEP,
            config=cfg.dump(),
            trainer=weakref.proxy(self),
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self._resumed_random_state: dict | None = None
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
        optimizer = super().build_optimizer(cfg, model)
        fuse_sgd(optimizer)
        return optimizer

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """The COCO evaluation (pycocotools), and for panoptic data those of semantic segmentation
        and of panoptic quality; results JSON in ``OUTPUT_DIR/inference``."""
        kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
        if kind not in COCO_EVALUATORS:
            raise ValueError(
                f"the dataset {dataset_name} has the evaluator type {kind!r}; supported: "
                f"{', '.join(COCO_EVALUATORS)}: register it in COCO format"
            )
        # With several test sets, one directory for each, so that none overwrites another's.
        parts = ["inference"] if len(cfg.DATASETS.TEST) == 1 else ["inference", dataset_name]
        output = os.path.join(cfg.OUTPUT_DIR, *parts)
        instances = COCOEvaluator(dataset_name, output_dir=output, use_fast_impl=False)
        if kind == "coco":
            return instances
        semantic = SemSegEvaluator(dataset_name, output_dir=output)
        return DatasetEvaluators([instances, semantic, COCOPanopticEvaluator(dataset_name, output)])

    @classmethod
    def test(cls, cfg: CfgNode, model, evaluators=None) -> dict:
        """Evaluate; leaves the random state as it was, so that training goes on the same."""
        with _preserved_random_state():
            return super().test(cfg, model, evaluators)

    def build_hooks(self) -> list:
        ret = super().build_hooks()
        if not self.cfg.DATASETS.TEST:
            ret = [h for h in ret if not isinstance(h, hooks.EvalHook)]
        return ret

    @property
    def _sampler(self) -> ResumableTrainingSampler | None:
        sampler = getattr(getattr(self.data_loader, "dataset", None), "sampler", None)
        return sampler if isinstance(sampler, ResumableTrainingSampler) else None

    def train(self):
        """Train to the end, with a progress bar if the output is a terminal."""
        logging.getLogger(TrainerBase.__module__).addFilter(shorten_expected_error)
        if not (comm.is_main_process() and sys.stdout.isatty() and sys.stderr.isatty()):
            return super().train()
        bar = ProgressBar(self.start_iter, self.max_iter)
        self.register_hooks([hooks.PeriodicWriter([bar], period=1)])
        loggers = [log for log in map(logging.getLogger, logging.root.manager.loggerDict)]
        loggers = [log for log in loggers if log.handlers]
        with logging_redirect_tqdm(loggers):
            for handler in (h for log in loggers for h in log.handlers):
                if getattr(handler, "stream", None) in (sys.stdout, sys.stderr):
                    handler.addFilter(_is_not_metrics)  # the bar shows them; log.txt has them
            return super().train()

    def before_train(self) -> None:
        super().before_train()
        if self._sampler:
            self._sampler.start = self.start_iter * self._trainer.accumulate_steps
        # Creating the iterator draws from torch's generator: first that, then the saved state.
        self._trainer._data_loader_iter  # noqa: B018
        if self._resumed_random_state:
            _set_random_state(self._resumed_random_state)
        if self.start_iter >= self.max_iter > 0:  # finished, but perhaps on a full disk
            self.checkpointer.save_safetensors()

    def run_step(self) -> None:
        """
        Raises:
            FloatingPointError: a loss, a predicted box or a gradient is infinite or NaN.
        """
        try:
            super().run_step()
        except FloatingPointError as error:
            remedy = (
                "lower SOLVER.BASE_LR, raise SOLVER.WARMUP_ITERS or enable SOLVER.CLIP_GRADIENTS"
            )
            message = self._finite_losses.describe(self.iter, error, remedy)
            raise FloatingPointError(message) from None

    def state_dict(self) -> dict:
        state = super().state_dict()
        state["random_state"] = _get_random_state()
        state["batch"] = self._batch
        if self._sampler:
            state["data_seed"] = self._sampler.seed
        return state

    def load_state_dict(self, state: dict) -> None:
        base_lrs = self.scheduler.base_lrs  # loading puts those of the checkpoint in their place
        super().load_state_dict(state)
        self._continue_at_same_image(state.get("batch", self._batch), base_lrs)
        # The state is of the first process; the others keep the seeds that they have, as sharing
        # it would give all of them the same augmentations.
        if comm.is_main_process():
            self._resumed_random_state = state.get("random_state")
        if self._sampler and "data_seed" in state:
            self._sampler.seed = state["data_seed"]

    @property
    def _batch(self) -> dict[str, int]:
        """How the images of an iteration come about."""
        return {
            "images_per_iteration": self.cfg.SOLVER.IMS_PER_BATCH,
            "accumulate_steps": self._trainer.accumulate_steps,
            "processes": comm.get_world_size(),
        }

    def _continue_at_same_image(self, saved: dict[str, int], base_lrs: list[float]) -> None:
        """Translate the loaded state of a run with the batch ``saved`` to that of this run."""
        if saved == self._batch:
            return
        old, new = saved["images_per_iteration"], self._batch["images_per_iteration"]
        if old == new:
            logger.warning(
                f"resuming with {_describe(self._batch)}, where the checkpoint had "
                f"{_describe(saved)}: an iteration still has {new} images, but their order and "
                "augmentation are not those of a run without the change"
            )
            return
        done = self.iter + 1  # iterations; self.iter is the last one of the checkpoint
        start = done * old // new
        if (start - self.max_iter) * new >= old + new:  # more than rounding can make
            raise ConfigError(
                f"the checkpoint's {done} iterations of {old} images saw more than the "
                f"SOLVER.MAX_ITER {self.max_iter} iterations of {new} images of this run; scale "
                "SOLVER.MAX_ITER with the images, or let SOLVER.IMS_PER_GPU do it"
            )
        start = min(start, self.max_iter)
        self.iter = start - 1
        # The optimizer keeps its momentum, but takes the learning rate of this config.
        self.scheduler.base_lrs, self.scheduler.last_epoch = base_lrs, start
        rates = self.scheduler.get_lr()
        for group, base_lr, rate in zip(self.optimizer.param_groups, base_lrs, rates, strict=True):
            group["initial_lr"], group["lr"] = base_lr, rate
        logger.warning(
            f"resuming with SOLVER.IMS_PER_BATCH {new} (images per iteration), where the "
            f"checkpoint had {old}: its {done} iterations saw {done * old} images, so this run "
            f"continues at iteration {start} of {self.max_iter}, after {start * new} images, with "
            f"the learning rate of its own config there, {rates[0]:.4g}"
        )


def _describe(batch: dict[str, int]) -> str:
    return f"{batch['processes']} process(es) and {batch['accumulate_steps']} accumulation step(s)"


def _is_not_metrics(record: logging.LogRecord) -> bool:
    return record.name != CommonMetricPrinter.__module__


def _get_random_state() -> dict:
    """The state of the generators that training draws from, in types that ``torch.load`` with
    ``weights_only`` accepts."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": (name, keys.tolist(), *rest),
        "python": random.getstate(),
    }


def _set_random_state(state: dict) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


@contextlib.contextmanager
def _preserved_random_state():
    state = _get_random_state()
    try:
        yield
    finally:
        _set_random_state(state)
