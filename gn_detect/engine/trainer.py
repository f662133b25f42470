"""Detectron2's DefaultTrainer, for GPUs and CPUs, resumable to the bit."""

from __future__ import annotations

import functools
import logging
import os
import sys
import weakref
from collections.abc import Iterable

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, TrainerBase, create_ddp_model, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter
from torch import nn
from tqdm.contrib.logging import logging_redirect_tqdm

from gn_detect.checkpoint import Checkpointer, WeightGuards
from gn_detect.data.coco import output_names
from gn_detect.data.loader import build_test_loader, build_train_loader
from gn_detect.data.workers import keep_workers
from gn_detect.evaluation import build_evaluator, describe_tta, masks_one_by_one, with_tta
from gn_detect.modeling.normalizer import RunningMeans
from gn_detect.settings import Settings

from .best import best_of
from .ema import EMA, evaluate_both
from .errors import shorten_expected_error
from .hooks import EvalHook, Saving
from .prepare import dataset_names
from .progress import FirstIterations, ProgressBar
from .report import Report
from .resume import Resume, preserved_random_state
from .train_loop import AMP_DTYPES, AccumulatingTrainer, EndsEarly

logger = logging.getLogger(__name__)


def build_loop(
    run: Settings,
    model: nn.Module,
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    *,
    config: str,
    ddp: dict,
    remedy: str,
    check_gradients: bool = True,
) -> tuple[AccumulatingTrainer, Checkpointer, Resume, EMA | None]:
    """What a training consists of, whichever kind of config tells it. The EMA, where there is one,
    is the first hook to register.

    Args:
        run: its settings, as :func:`.prepare.prepare_run` has left them.
        model: not yet wrapped for several processes, with the arguments ``ddp``.
        loader, optimizer, remedy, check_gradients: of AccumulatingTrainer.
        config: as YAML, to save with the weights.
    """
    # Slurm may let each process see its own GPU alone, whatever its place among them.
    devices = None if run["device"] == "cpu" else [torch.cuda.current_device()]
    ema = EMA(model, run["ema_decay"]) if run["ema"] else None
    model = create_ddp_model(model, **ddp, device_ids=devices)
    keep_workers(loader)
    loop = AccumulatingTrainer(
        model,
        loader,
        optimizer,
        accumulate_steps=run["accumulate_steps"] or 1,
        amp_dtype=AMP_DTYPES[run["amp_dtype"]] if run["amp"] else None,
        check_gradients=check_gradients,
        remedy=remedy,
    )
    checkpointer = Checkpointer(
        model,
        run["output_dir"],
        guards=WeightGuards.from_config(run.cfg),
        keep=run["keep"] or 0,
        config=config,
        names=output_names(dataset_names(run, "train"), run["keypoints"]),
        averaged=ema.model if ema else None,
    )
    logging.getLogger(TrainerBase.__module__).addFilter(shorten_expected_error)
    return loop, checkpointer, Resume(run, loop, checkpointer), ema


def load_to_evaluate(run: Settings, model: nn.Module, resume: bool = False) -> None:
    """Load the weights of ``run`` into ``model``, which is only evaluated and needs all of them; to
    ``resume``, those of the last checkpoint. Raises what :meth:`.Checkpointer.load` does."""
    checkpointer = Checkpointer(
        model,
        run["output_dir"],
        guards=WeightGuards.from_config(run.cfg),
        names=output_names(dataset_names(run, "test"), run["keypoints"]),
        evaluation=True,
    )
    checkpointer.resume_or_load(run["weights"], resume=resume)


class Trainer(DefaultTrainer, EndsEarly):
    """Train, evaluate and resume a detector from a config.

    What it changes in DefaultTrainer: data parallel training on CPUs (gloo); gradient
    accumulation; bfloat16; a loss that is not finite names the images; the COCO
    evaluation; a progress bar on a terminal; and a run that is resumed goes on as if it had not
    stopped (:class:`~gn_detect.engine.resume.Resume`).
    """

    def __init__(self, cfg: CfgNode):
        TrainerBase.__init__(self)  # DefaultTrainer's own would build its kind of DDP and loader
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        clip = cfg.SOLVER.CLIP_GRADIENTS
        self._trainer, self.checkpointer, self._resume, self._ema = build_loop(
            Settings(cfg),
            model,
            loader,
            optimizer,
            config=cfg.dump(),
            ddp={"broadcast_buffers": False},
            remedy="lower SOLVER.BASE_LR, raise SOLVER.WARMUP_ITERS or enable "
            "SOLVER.CLIP_GRADIENTS",
            check_gradients=not (clip.ENABLED and clip.CLIP_TYPE == "value"),
        )
        self.checkpointer.add_checkpointable("trainer", weakref.proxy(self))
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        means = RunningMeans(model)  # before what is saved
        self.register_hooks([means, self._ema, self._resume, *self.build_hooks()])

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        loader = build_test_loader(cfg, dataset_name)
        keep_workers(loader)
        return loader

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """See :func:`gn_detect.evaluation.build_evaluator`; results in ``OUTPUT_DIR/inference``."""
        # With several test sets, one directory for each, so that none overwrites another's.
        parts = ["inference"] if len(cfg.DATASETS.TEST) == 1 else ["inference", dataset_name]
        output = os.path.join(cfg.OUTPUT_DIR, *parts)
        sigmas, coco_eval = cfg.TEST.KEYPOINT_OKS_SIGMAS, cfg.TEST.COCO_EVAL
        return build_evaluator(dataset_name, output, sigmas, coco_eval)

    @classmethod
    def test(cls, cfg: CfgNode, model, evaluators=None) -> dict:
        """Evaluate; leaves the random state as it was, so that training goes on the same."""
        # Evaluators of others may take the masks as the tensor that Detectron2 makes of them.
        ours = cls.build_evaluator.__func__ is Trainer.build_evaluator.__func__
        with preserved_random_state(), masks_one_by_one(model, when=ours and evaluators is None):
            return super().test(cfg, model, evaluators)

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model) -> dict:
        """Evaluate with test-time augmentation; empty unless ``TEST.AUG.ENABLED``. The names of the
        results end in "_TTA", as in Detectron2's ``tools/train_net.py``; ``OUTPUT_DIR/TTA`` has
        the predictions."""
        if not (cfg.TEST.AUG.ENABLED and cfg.DATASETS.TEST):
            return {}
        logger.info(f"evaluation with test-time augmentation, {describe_tta(cfg)}")
        augmented = cfg.clone()
        augmented.defrost()
        augmented.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "TTA")
        results = cls.test(augmented, with_tta(cfg, model))
        return {f"{name}_TTA": result for name, result in results.items()}

    def build_hooks(self) -> list:
        ret = super().build_hooks()
        solver, test = self.cfg.SOLVER, self.cfg.TEST
        saving = Saving(
            self.checkpointer,
            self._resume,
            solver.CHECKPOINT_PERIOD,
            seconds=solver.CHECKPOINT_SECONDS,
            eval_period=test.EVAL_PERIOD if self.cfg.DATASETS.TEST else 0,
        )

        def evaluate():
            test = functools.partial(self.test, self.cfg)
            ema = self._ema if self.cfg.DATASETS.TEST else None
            self._last_eval_results = evaluate_both(test, self.model, ema)
            return self._last_eval_results

        ret = [h for h in ret if not isinstance(h, hooks.PeriodicCheckpointer)]
        place = next(i for i, h in enumerate(ret) if isinstance(h, hooks.EvalHook))
        run = Settings(self.cfg)
        self._best = best_of(run)
        evaluation = EvalHook(test.EVAL_PERIOD, evaluate, self._best, saving, run.keys)
        # At the end alone, as in Detectron2: it takes many times as long.
        augmented = EvalHook(0, lambda: self.test_with_tta(self.cfg, self.model))
        ret[place : place + 1] = [saving, evaluation, augmented]
        if comm.is_main_process():
            ret += [FirstIterations(self.max_iter), Report(run)]
        return ret

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume)
        if resume and self.checkpointer.has_checkpoint():
            self.start_iter = self._resume.start(self.start_iter, self.scheduler)
            # For TEST.EXPECTED_RESULTS: a run that had ended early does not evaluate again.
            self._last_eval_results = {}
            for name, value in self._best.metrics.items():
                task, _, metric = name.partition("/")
                self._last_eval_results.setdefault(task, {})[metric] = value

    def train(self):
        """Train to the end, with a progress bar if the output is a terminal.

        Raises:
            FloatingPointError: a loss, a predicted box or a gradient is infinite or NaN.
            Stopped: a signal has come (:func:`.stopping.handle_signals`).
        """
        if not (comm.is_main_process() and sys.stdout.isatty() and sys.stderr.isatty()):
            return super().train()
        bar = ProgressBar(self.start_iter, self.max_iter)
        self.register_hooks([hooks.PeriodicWriter([bar], period=1)])
        loggers = map(logging.getLogger, logging.root.manager.loggerDict)
        loggers = [log for log in loggers if log.handlers]
        with logging_redirect_tqdm(loggers):
            for handler in (h for log in loggers for h in log.handlers):
                if getattr(handler, "stream", None) in (sys.stdout, sys.stderr):
                    # The bar shows the metrics, and log.txt has them.
                    handler.addFilter(lambda log: log.name != CommonMetricPrinter.__module__)
            return super().train()
