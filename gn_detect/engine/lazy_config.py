"""A lazy config, loaded, completed for this machine, and checked before a run.

In place of registries and keys, it holds the calls themselves
(detectron2/docs/tutorials/lazyconfigs.md).
"""

from __future__ import annotations

import difflib
from typing import Any

from detectron2.config import LazyConfig, instantiate
from omegaconf import DictConfig, OmegaConf

from gn_detect.config import ConfigError, load_config
from gn_detect.settings import Settings

_TRAIN = ("output_dir", "init_checkpoint", "max_iter", "device", "amp.enabled")
_TRAIN += ("ddp", "checkpointer", "eval_period", "log_period")
_REQUIRED = (
    *("model", "optimizer.lr", "lr_multiplier", "dataloader.train.total_batch_size"),
    *(f"train.{key}" for key in _TRAIN),
)


def load_lazy_config(config_file: str, overrides: list[str] | None = None) -> DictConfig:
    """Load a lazy config, then apply ``overrides`` (``key=value``).

    Where ``train`` lacks what our YAML configs have under ``SOLVER`` and ``GUARDS``, as in
    Detectron2's own lazy configs, it gets their defaults (``gn_detect/config.py``).

    Raises:
        ConfigError: the file is missing or no lazy config, or an override names a key that is not
            there, or gives it a value of another kind.
    """
    if not config_file:
        raise ConfigError("--config-file: name a lazy config, such as one of configs/lazy")
    try:
        cfg = LazyConfig.load(config_file)
    except (ImportError, OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f"{config_file}: {error}") from None
    complete_lazy_config(cfg, config_file, overrides)
    return cfg


def complete_lazy_config(
    cfg: DictConfig, config_file: str, overrides: list[str] | None = None
) -> None:
    """What :func:`load_lazy_config` does with a config, of ``config_file``, that is loaded."""
    missing = [key for key in _REQUIRED if OmegaConf.select(cfg, key) is None]
    if missing:
        raise ConfigError(
            f"{config_file} is no complete lazy config: it has no {', '.join(missing)} "
            "(configs/lazy/common/train.py has the defaults of train; the YAML files of configs/ "
            "are for tools/train_net.py)"
        )
    defaults = load_config()
    cfg.train.amp.setdefault("dtype", defaults.SOLVER.AMP.DTYPE)
    for name in (
        *("ims_per_gpu", "accumulate_steps", "reference_batch_size", "epochs", "warmup_epochs"),
        *("early_stop", "early_stop_min_delta"),
    ):
        cfg.train.setdefault(name, defaults.SOLVER[name.upper()])
    cfg.train.setdefault("eval_epochs", defaults.TEST.EVAL_EPOCHS)
    cfg.train.reference_max_iter = cfg.train.max_iter  # which may be overridden
    cfg.train.setdefault("best_metric", defaults.TEST.BEST_METRIC)
    cfg.train.setdefault("report", defaults.TEST.REPORT)
    cfg.train.setdefault("ema", {})
    for name, value in defaults.SOLVER.EMA.items():
        cfg.train.ema.setdefault(name.lower(), value)
    cfg.train.checkpointer.setdefault("seconds", defaults.SOLVER.CHECKPOINT_SECONDS)
    cfg.train.setdefault("guards", {})
    for name, on in defaults.GUARDS.items():
        cfg.train.guards.setdefault(name.lower(), on)
    mapper = OmegaConf.select(cfg, "dataloader.train.mapper")
    if isinstance(mapper, DictConfig) and "use_instance_mask" in mapper:
        mapper.setdefault("instance_mask_format", "polygon")  # which then follows the data
    for override in overrides or []:
        _apply_override(cfg, override)


def _apply_override(cfg: DictConfig, override: str) -> None:
    key, equals, _ = override.partition("=")
    if not equals:
        raise ConfigError(f"the command line: {override!r} is not of the form key=value")
    absent = object()
    before = OmegaConf.select(cfg, key, default=absent)
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    # A call (_target_) may get another argument, and says itself whether it takes it. Anywhere
    # else, a key that is not there would be ignored.
    if before is absent and not (isinstance(node, DictConfig) and "_target_" in node):
        names = list(map(str, node)) if isinstance(node, DictConfig) else []
        similar = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names
        prefix = f"{parent}." if parent else ""
        hint = f"; similar: {', '.join(prefix + n for n in similar)}" if similar else ""
        raise ConfigError(f"the command line: the config has no key {key}{hint}")
    try:
        LazyConfig.apply_overrides(cfg, [override])
    except Exception as error:  # the parser's, omegaconf's, and what eval of a value raises
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"the command line: {override}: {reason} (a value with other characters than letters, "
            f"digits and ./:_- is quoted twice: '{key}=\"VALUE\"')"
        ) from None
    after = OmegaConf.select(cfg, key)
    section = isinstance(before, DictConfig) and "_target_" not in before
    if section and not isinstance(after, DictConfig):
        raise ConfigError(f"the command line: {key} holds keys, such as {key}.{next(iter(before))}")
    automatic = (key, after) == ("train.ims_per_gpu", "auto")
    if isinstance(before, (int, float)) and isinstance(after, str) and not automatic:
        raise ConfigError(f"the command line: {key} is {after!r}, not a number like {before!r}")


def instantiate_key(cfg: DictConfig, key: str) -> Any:
    """What the call at ``key`` returns.

    Raises:
        ConfigError: it lacks an argument, or has one that it does not take.
    """
    try:
        return instantiate(OmegaConf.select(cfg, key))
    except TypeError as error:  # Detectron2 has logged whose it is
        if "argument" not in str(error):
            raise
        raise ConfigError(f"{key}: {error}") from error


def check_lazy_config(cfg: DictConfig) -> None:
    """Check what a lazy config states more than once, and a YAML config cannot.

    Raises:
        ConfigError: two values differ that must be the same.
    """
    # The mappers decide the order of the channels; the model only says which one it expects. The
    # stages of one ResNet have one stride.
    stride = Settings(cfg).keys.get("stride_in_1x1", "")
    for first, second in (
        ("model.input_format", "dataloader.train.mapper.image_format"),
        ("model.input_format", "dataloader.test.mapper.image_format"),
        ("dataloader.train.mapper.bit_depth_range", "dataloader.test.mapper.bit_depth_range"),
        (stride, "model.roi_heads.res5.stride_in_1x1"),
        *((stride, stride.replace("[0]", f"[{stage}]")) for stage in (1, 2, 3)),
    ):
        expected, given = OmegaConf.select(cfg, first), OmegaConf.select(cfg, second)
        if None not in (expected, given) and given != expected:
            raise ConfigError(f"{second} is {given}, but {first} is {expected}; make them equal")
