"""Training and evaluation from a lazy config, in the steps of Detectron2's
``tools/lazyconfig_train_net.py``."""

from __future__ import annotations

import copy
import logging
import os
import tempfile

from detectron2.config import LazyConfig
from detectron2.engine import TrainerBase, create_ddp_model, default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import DictConfig, ListConfig
from torch import nn

from gn_detect.checkpoint import Checkpointer, WeightGuards

from .hooks import FiniteLossCheck
from .lazy_config import instantiate_key
from .prepare import shorten_expected_error
from .train_loop import AMP_DTYPES, AccumulatingTrainer


def build_lazy_model(cfg: DictConfig) -> nn.Module:
    """The model of ``cfg``, on its device.

    Raises:
        ConfigError: a call in ``cfg.model`` lacks an argument or has one that it does not take, or
            the groups of a norm do not divide the channels.
    """
    return instantiate_key(cfg, "model").to(cfg.train.device)


def do_train(cfg: DictConfig, resume: bool = False) -> dict:
    """Train, and evaluate every ``train.eval_period`` iterations and at the end.

    A checkpoint holds the model, the optimizer and the iteration. The order of the images is drawn
    anew when a run is resumed, as by Detectron2's tool.

    Args:
        cfg: of :func:`.prepare.prepare_run`.
        resume: continue from the last checkpoint in ``train.output_dir``, if there is one.

    Returns:
        the results of the last evaluation; empty in other processes than the first.

    Raises:
        FloatingPointError: a loss, a predicted box or a gradient is infinite or NaN.
    """
    text = _config_text(cfg)
    cfg = copy.deepcopy(cfg)  # completed in the next lines
    train = cfg.train
    cfg.dataloader.train.total_batch_size //= train.accumulate_steps
    model = build_lazy_model(cfg)
    cfg.optimizer.params.model = model
    optimizer = instantiate_key(cfg, "optimizer")
    loader = instantiate_key(cfg, "dataloader.train")
    on_cpu = {"device_ids": None} if train.device == "cpu" else {}
    model = create_ddp_model(model, **train.ddp, **on_cpu)
    amp_dtype = AMP_DTYPES[train.amp.dtype] if train.amp.enabled else None
    trainer = AccumulatingTrainer(model, loader, optimizer, train.accumulate_steps, amp_dtype)
    periodic = dict(train.checkpointer)
    checkpointer = Checkpointer(
        model,
        train.output_dir,
        guards=WeightGuards.from_config(cfg),
        keep=periodic.pop("max_to_keep", None) or 0,
        config=text,
        trainer=trainer,
    )
    results = {}

    def evaluate() -> dict:
        results.update(do_test(cfg, model))
        return results

    schedule = hooks.LRScheduler(scheduler=instantiate_key(cfg, "lr_multiplier"))
    finite_losses = FiniteLossCheck()
    trainer.register_hooks([finite_losses, hooks.IterationTimer(), schedule])
    if comm.is_main_process():
        trainer.register_hooks([hooks.PeriodicCheckpointer(checkpointer, **periodic)])
    trainer.register_hooks([hooks.EvalHook(train.eval_period, evaluate)])
    if comm.is_main_process():  # last, so that it writes what the others have measured
        writers = default_writers(train.output_dir, train.max_iter)
        trainer.register_hooks([hooks.PeriodicWriter(writers, period=train.log_period)])
    checkpointer.resume_or_load(train.init_checkpoint, resume=resume)
    start_iter = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    if start_iter >= train.max_iter > 0:  # finished, but perhaps on a full disk
        checkpointer.save_safetensors()
    logging.getLogger(TrainerBase.__module__).addFilter(shorten_expected_error)
    try:
        trainer.train(start_iter, train.max_iter)
    except FloatingPointError as error:
        remedy = "lower optimizer.lr or raise lr_multiplier.warmup_length"
        message = finite_losses.describe(trainer.iter, error, remedy)
        raise FloatingPointError(message) from None
    return results


def _config_text(cfg: DictConfig) -> str:
    """The text of the YAML that Detectron2 writes, with calls by name."""
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "config.yaml")
        LazyConfig.save(cfg, path)
        with open(path) as f:
            return f.read()


def do_test(cfg: DictConfig, model: nn.Module) -> dict:
    """Evaluate ``model`` on ``cfg.dataloader.test`` and print the results; empty where ``cfg`` has
    no evaluator, and in other processes than the first."""
    if "evaluator" not in cfg.dataloader:
        return {}
    evaluator = instantiate_key(cfg, "dataloader.evaluator")
    if isinstance(evaluator, ListConfig):
        evaluator = list(evaluator)
    results = inference_on_dataset(model, instantiate_key(cfg, "dataloader.test"), evaluator)
    if comm.is_main_process():
        print_csv_format(results)
    return results
