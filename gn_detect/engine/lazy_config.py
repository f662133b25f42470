"""A lazy config, loaded, completed for this machine, and checked before a run.

In place of registries and keys, it holds the calls themselves
(detectron2/docs/tutorials/lazyconfigs.md).
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterator

from detectron2.config import LazyConfig
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf

from gn_detect.checkpoint import Origin, WeightGuards
from gn_detect.checkpoint.weight_guards import SWITCHES
from gn_detect.config import ConfigError
from gn_detect.data.coco import check_coco_dataset

from .prepare import check_evaluation, check_keep, check_weights, usable_amp, usable_device

logger = logging.getLogger(__name__)

_TRAIN = ("output_dir", "init_checkpoint", "max_iter", "device", "amp.enabled", "amp.dtype")
_TRAIN += ("accumulate_steps", "ddp", "checkpointer", "eval_period", "log_period")
_REQUIRED = ("model", "optimizer", "lr_multiplier", "dataloader", *(f"train.{k}" for k in _TRAIN))


def load_lazy_config(config_file: str, overrides: list[str] | None = None) -> DictConfig:
    """Load a lazy config, then apply ``overrides`` (``key=value``).

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
    missing = [key for key in _REQUIRED if OmegaConf.select(cfg, key) is None]
    if missing:
        raise ConfigError(
            f"{config_file} is no complete lazy config: it has no {', '.join(missing)} "
            "(configs/lazy/common/train.py has the defaults of train; the YAML files of configs/ "
            "are for tools/train_net.py)"
        )
    for override in overrides or []:
        _apply_override(cfg, override)
    return cfg


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
    if isinstance(before, (int, float)) and isinstance(after, str):
        raise ConfigError(f"the command line: {key} is {after!r}, not a number like {before!r}")


def prepare_lazy_run(cfg: DictConfig, *, eval_only: bool = False, resume: bool = False) -> None:
    """Complete ``cfg`` in place for this machine, and check it and its datasets.

    Sets ``train.device`` and ``train.amp.enabled`` where there is no CUDA, and logs it. Each
    process calls it; the first one looks through the annotations.

    Args:
        cfg: of :func:`load_lazy_config`.
        eval_only: evaluate, do not train.
        resume: continue from the last checkpoint in ``train.output_dir``.

    Raises:
        ConfigError, DataError: the run could not work.
    """
    train = cfg.train
    train.device = usable_device("train.device", train.device, comm.get_world_size())
    train.amp.enabled = usable_amp(
        "train.amp.enabled", train.amp.enabled, "train.amp.dtype", train.amp.dtype, train.device
    )
    check_weights(
        "train.init_checkpoint", train.init_checkpoint, train.output_dir, eval_only, resume
    )
    _check_input_format(cfg)
    if not eval_only:
        resumes = resume and os.path.isfile(os.path.join(train.output_dir, "last_checkpoint"))
        if not train.init_checkpoint and not resumes:
            _check_scratch(cfg)
        elif not resumes and (origin := Origin.of_name(train.init_checkpoint)):
            weight_guards(cfg).check_origin(origin, train.init_checkpoint)
        _check_batch(cfg)
        check_keep("train.checkpointer.max_to_keep", train.checkpointer.get("max_to_keep") or 0)
    if comm.is_main_process():
        _check_datasets(cfg, eval_only)


def weight_guards(cfg: DictConfig) -> WeightGuards:
    """What the weights of a lazy run are held to; ``train.guards`` has the switches."""
    keys = {field: f"model.{field}" for field in ("input_format", "pixel_mean", "pixel_std")}
    values = {field: OmegaConf.select(cfg, key) for field, key in keys.items()}
    strides = {
        key: value
        for key, value in _leaves(OmegaConf.to_container(cfg.model), "model")
        if key.endswith(".stride_in_1x1")
    }
    if len(set(strides.values())) > 1:
        stated = ", ".join(f"{key} is {value}" for key, value in strides.items())
        raise ConfigError(f"{stated}: make them equal, as the stages of one ResNet are")
    stages = OmegaConf.select(cfg, f"{_bottom_up(cfg)}.stages")
    basic = isinstance(stages, DictConfig) and stages.get("depth") in (18, 34)
    return WeightGuards(
        Origin(
            values["input_format"],
            values["pixel_mean"] and tuple(values["pixel_mean"]),
            values["pixel_std"] and tuple(values["pixel_std"]),
            None if basic else next(iter(strides.values()), None),  # none in basic blocks
        ),
        {
            **keys,
            "stride_in_1x1": ", ".join(strides),
            "weight_standardization": "model.weight_standardization",
            "num_groups": "num_groups or channels_per_group of GroupNormFactory",
        },
        {name: (f"train.guards.{name.lower()}", _guard(cfg, name.lower())) for name in SWITCHES},
    )


def _check_input_format(cfg: DictConfig) -> None:
    """The mappers decide the order of the channels; the model only says which one it expects."""
    expected = OmegaConf.select(cfg, "model.input_format")
    for split in ("train", "test"):
        key = f"dataloader.{split}.mapper.image_format"
        given = OmegaConf.select(cfg, key)
        if None not in (expected, given) and given != expected:
            raise ConfigError(
                f"{key} is {given}, but model.input_format is {expected}; make them equal"
            )


def _guard(cfg: DictConfig, name: str) -> bool:
    return OmegaConf.select(cfg, f"train.guards.{name}", default=True)


def _bottom_up(cfg: DictConfig) -> str:
    """The key of the ResNet: under the FPN, or the backbone itself."""
    fpn = OmegaConf.select(cfg, "model.backbone.bottom_up") is not None
    return "model.backbone.bottom_up" if fpn else "model.backbone"


def _check_scratch(cfg: DictConfig) -> None:
    key = f"{_bottom_up(cfg)}.freeze_at"
    freeze_at = OmegaConf.select(cfg, key, default=0)
    if freeze_at > 0 and _guard(cfg, "scratch_freeze_at"):
        raise ConfigError(
            f"train.init_checkpoint is empty and {key} is {freeze_at}, so the frozen layers "
            "would keep their random weights; set train.init_checkpoint to ImageNet weights, "
            f"or {key} to 0 to train from scratch; to train so all the same, set "
            "train.guards.scratch_freeze_at False"
        )
    plain = OmegaConf.to_container(cfg.model)  # references to other keys are not followed
    frozen = [key for key, value in _leaves(plain, "model") if value == "FrozenBN"]
    if frozen and _guard(cfg, "scratch_frozen_bn"):
        raise ConfigError(
            f"train.init_checkpoint is empty and {frozen[0]} is FrozenBN: a mean of 0 and a "
            "variance of 1 that belong to no data normalize nothing. Set train.init_checkpoint, or "
            "the norm to GN; to train so all the same, set train.guards.scratch_frozen_bn False"
        )


def _leaves(node, key: str) -> Iterator[tuple[str, object]]:
    """(key, value) of all values in nested dicts and lists."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _leaves(value, f"{key}.{name}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _leaves(value, f"{key}[{index}]")
    else:
        yield key, node


def _check_batch(cfg: DictConfig) -> None:
    steps, processes = cfg.train.accumulate_steps, comm.get_world_size()
    if not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"train.accumulate_steps is {steps!r}; it must be an integer from 1 on")
    key = "dataloader.train.total_batch_size"
    images = OmegaConf.select(cfg, key)
    if images is None or images < 1 or images % (processes * steps):
        raise ConfigError(
            f"{key} is {images}, the images of one iteration; it must be a multiple of "
            f"{processes * steps} ({processes} processes, train.accumulate_steps {steps})"
        )


def _check_datasets(cfg: DictConfig, eval_only: bool) -> None:
    used = {}  # dataset -> splits
    for split in ("test",) if eval_only else ("train", "test"):
        names = OmegaConf.select(cfg, f"dataloader.{split}.dataset.names", default=[])
        for name in [names] if isinstance(names, str) else names:
            used.setdefault(name, []).append(split)
    masks = OmegaConf.select(cfg, "dataloader.train.mapper.use_instance_mask", default=False)
    for name, splits in used.items():
        summary = check_coco_dataset(
            name, masks=masks, training="train" in splits, evaluation="test" in splits
        )
        if summary is None:  # not in COCO format
            continue
        if "test" in splits:
            check_evaluation("dataloader.test.dataset.names", name)
        key = "dataloader.train.mapper.instance_mask_format"
        polygons = OmegaConf.select(cfg, key, default="polygon") == "polygon"
        if "train" in splits and masks and summary.has_rle and polygons:
            raise ConfigError(f"{key} is polygon, but {name} has masks as RLE; set it to bitmask")
        count = len(summary.classes)
        logger.info(
            f"{name}: {summary.num_images} images, {summary.num_annotations} annotations, "
            f"{count} categories"
        )
        for key in ("model.roi_heads.num_classes", "model.num_classes"):
            stated = OmegaConf.select(cfg, key, default=count)
            if stated != count:
                raise ConfigError(
                    f"{key} is {stated}, but the dataset {name} declares {count} categories"
                )
