"""Training and evaluation from a lazy config, in the steps of Detectron2's
``tools/lazyconfig_train_net.py``."""

from __future__ import annotations

import copy
import logging
import os
import tempfile

from detectron2.config import LazyConfig
from detectron2.data import MetadataCatalog
from detectron2.engine import TrainerBase, create_ddp_model, default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import DictConfig, ListConfig
from torch import nn

from gn_detect.checkpoint import Checkpointer, WeightGuards
from gn_detect.settings import Settings

from .hooks import FiniteLossCheck, FirstIterations
from .lazy_config import instantiate_key
from .prepare import shorten_expected_error
from .resume import Resume, preserved_random_state
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

    A run that is resumed goes on as if it had not stopped (:class:`.resume.Resume`).

    Args:
        cfg: of :func:`.prepare.prepare_run`.
        resume: continue from the last checkpoint in ``train.output_dir``, if there is one.

    Returns:
        the results of the last evaluation; empty in other processes than the first.

    Raises:
        FloatingPointError: a loss, a predicted box or a gradient is infinite or NaN.
    """
    text, images = _config_text(cfg), cfg.dataloader.train.total_batch_size
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
        classes=_classes(cfg),
        trainer=trainer,
    )
    progress = Resume(trainer, images, train.max_iter, train.checkpointer.period)
    results = {}

    def evaluate() -> dict:
        with preserved_random_state():
            results.update(do_test(cfg, model))
        return results

    schedule = hooks.LRScheduler(scheduler=instantiate_key(cfg, "lr_multiplier"))
    finite_losses = FiniteLossCheck()
    trainer.register_hooks([finite_losses, progress, hooks.IterationTimer(), schedule])
    if comm.is_main_process():
        trainer.register_hooks([hooks.PeriodicCheckpointer(checkpointer, **periodic)])
    trainer.register_hooks([hooks.EvalHook(train.eval_period, evaluate)])
    if comm.is_main_process():  # last, so that it writes what the others have measured
        writers = default_writers(train.output_dir, train.max_iter)
        trainer.register_hooks([hooks.PeriodicWriter(writers, period=train.log_period)])
        trainer.register_hooks([FirstIterations(train.max_iter)])
    checkpointer.resume_or_load(train.init_checkpoint, resume=resume)
    resumes = resume and checkpointer.has_checkpoint()
    start_iter = progress.start(trainer.iter + 1) if resumes else 0
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


def _classes(cfg: DictConfig) -> list[str]:
    """The names of the classes of the data, where its metadata has them."""
    names = Settings(cfg)["train_data"]
    name = names if isinstance(names, str) or not names else names[0]
    return MetadataCatalog.get(name).get("thing_classes", []) if name else []


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
