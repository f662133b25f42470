"""Training and evaluation from a lazy config, in the steps of Detectron2's
``tools/lazyconfig_train_net.py``."""

from __future__ import annotations

import copy
import functools
import os
import tempfile

from detectron2.config import LazyConfig
from detectron2.engine import default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import DictConfig, ListConfig
from torch import nn

from gn_detect.data.coco import read_canonical
from gn_detect.data.workers import keep_workers
from gn_detect.evaluation import masks_one_by_one, takes_items
from gn_detect.modeling.normalizer import RunningMeans
from gn_detect.settings import Settings

from .best import best_of
from .ema import evaluate_both
from .hooks import EvalHook, Saving
from .lazy_config import instantiate_key
from .prepare import dataset_names
from .progress import FirstIterations
from .report import Report
from .resume import preserved_random_state
from .trainer import build_loop


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
        Stopped: a signal has come (:func:`.stopping.handle_signals`).
    """
    run = Settings(cfg)
    cfg = copy.deepcopy(cfg)  # completed in the next lines
    train = cfg.train
    cfg.dataloader.train.total_batch_size //= train.accumulate_steps
    model = build_lazy_model(cfg)
    cfg.optimizer.params.model = model
    optimizer = instantiate_key(cfg, "optimizer")
    read_canonical(*dataset_names(run, "train"), exact_names=run["FILE_NAMES"])
    loader = instantiate_key(cfg, "dataloader.train")
    trainer, checkpointer, progress, ema = build_loop(
        run,
        model,
        loader,
        optimizer,
        config=_config_text(run.cfg),
        ddp=dict(train.ddp),
        remedy="lower optimizer.lr or raise lr_multiplier.warmup_length",
    )
    checkpointer.add_checkpointable("trainer", trainer)
    results = {}

    def evaluate() -> dict:
        with preserved_random_state():
            test = functools.partial(do_test, cfg)
            averaged = ema if "evaluator" in cfg.dataloader else None
            results.update(evaluate_both(test, trainer.model, averaged))
        return results

    schedule = hooks.LRScheduler(scheduler=instantiate_key(cfg, "lr_multiplier"))
    eval_period = train.eval_period if "evaluator" in cfg.dataloader else 0
    periodic = {k: v for k, v in train.checkpointer.items() if k != "max_to_keep"}
    saving = Saving(checkpointer, progress, eval_period=eval_period, **periodic)
    trainer.register_hooks(
        [RunningMeans(model), ema, progress, hooks.IterationTimer(), schedule, saving]
    )
    evaluation = EvalHook(train.eval_period, evaluate, best_of(run), saving, run.keys)
    trainer.register_hooks([evaluation])
    if comm.is_main_process():  # last, so that it writes what the others have measured
        writers = default_writers(train.output_dir, train.max_iter)
        trainer.register_hooks([hooks.PeriodicWriter(writers, period=train.log_period)])
        first = FirstIterations(train.max_iter, train.log_period)
        trainer.register_hooks([first, Report(run)])
    checkpointer.resume_or_load(train.init_checkpoint, resume=resume)
    resumes = resume and checkpointer.has_checkpoint()
    start_iter = progress.start(trainer.iter + 1) if resumes else 0
    trainer.train(start_iter, train.max_iter)
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
    run = Settings(cfg)
    read_canonical(*dataset_names(run, "test"), exact_names=run["FILE_NAMES"])
    loader = instantiate_key(cfg, "dataloader.test")
    keep_workers(loader)
    with masks_one_by_one(model, when=takes_items(evaluator)):
        results = inference_on_dataset(model, loader, evaluator)
    if comm.is_main_process():
        print_csv_format(results)
    return results
