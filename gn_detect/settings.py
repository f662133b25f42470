"""What a run is told, by one name, whichever kind of config tells it.

YAML configs (``tools/train_net.py``) and lazy configs (``tools/lazyconfig_train_net.py``) state the
same things under different keys. What derives and checks them (``solver/schedule.py``,
``engine/prepare.py``, ``engine/guards.py``, ``checkpoint/weight_guards.py``) asks here, so that
both tools give the same guarantees, and every message names a key of its own tool.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from detectron2.config import CfgNode
from omegaconf import DictConfig, ListConfig, OmegaConf

from .config import ConfigError, locate

logger = logging.getLogger(__name__)

# Name -> its key in YAML configs, and in lazy configs; "" where they have none.
_KEYS = {
    "device": ("MODEL.DEVICE", "train.device"),
    "amp": ("SOLVER.AMP.ENABLED", "train.amp.enabled"),
    "amp_dtype": ("SOLVER.AMP.DTYPE", "train.amp.dtype"),
    "output_dir": ("OUTPUT_DIR", "train.output_dir"),
    "keep": ("SOLVER.CHECKPOINT_KEEP", "train.checkpointer.max_to_keep"),
    "train_data": ("DATASETS.TRAIN", "dataloader.train.dataset.names"),
    "test_data": ("DATASETS.TEST", "dataloader.test.dataset.names"),
    "train_folder": ("", "dataloader.train.dataset.root"),  # of classes (data/image_folder.py)
    "test_folder": ("", "dataloader.test.dataset.root"),
    "memory": ("MODEL.GN.MEMORY", "model.memory"),
    "num_workers": ("DATALOADER.NUM_WORKERS", "dataloader.train.num_workers"),
    "aspect_ratio_grouping": (
        "DATALOADER.ASPECT_RATIO_GROUPING",
        "dataloader.train.aspect_ratio_grouping",
    ),
    "masks": ("MODEL.MASK_ON", "dataloader.train.mapper.use_instance_mask"),
    "keypoints": ("MODEL.KEYPOINT_ON", "dataloader.train.mapper.use_keypoint"),
    "num_keypoints": (
        "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS",
        "model.roi_heads.keypoint_head.num_keypoints",
    ),
    "flip_pairs": ("INPUT.KEYPOINT_FLIP_PAIRS", ""),  # lazy configs have the indices themselves
    "flip_indices": ("", "dataloader.train.mapper.keypoint_hflip_indices"),
    "flip": ("INPUT.RANDOM_FLIP", ""),
    "mask_format": ("INPUT.MASK_FORMAT", "dataloader.train.mapper.instance_mask_format"),
    "copy_paste": ("INPUT.COPY_PASTE.ENABLED", "dataloader.train.copy_paste"),
    "oks_sigmas": ("TEST.KEYPOINT_OKS_SIGMAS", ""),
    "weights": ("MODEL.WEIGHTS", "train.init_checkpoint"),
    "input_format": ("INPUT.FORMAT", "model.input_format"),
    "bit_depth_range": ("INPUT.BIT_DEPTH_RANGE", "dataloader.train.mapper.bit_depth_range"),
    "pixel_mean": ("MODEL.PIXEL_MEAN", "model.pixel_mean"),
    "pixel_std": ("MODEL.PIXEL_STD", "model.pixel_std"),
    "weight_standardization": ("MODEL.GN.WEIGHT_STANDARDIZATION", ""),
    "min_size_train": ("INPUT.MIN_SIZE_TRAIN", ""),
    "max_size_train": ("INPUT.MAX_SIZE_TRAIN", ""),
    "min_size_test": ("INPUT.MIN_SIZE_TEST", ""),
    "max_size_test": ("INPUT.MAX_SIZE_TEST", ""),
    "crop": ("INPUT.CROP.ENABLED", ""),
    "crop_type": ("INPUT.CROP.TYPE", ""),
    "crop_size": ("INPUT.CROP.SIZE", ""),
    "lsj": ("INPUT.LSJ.ENABLED", ""),
    "anchor_sizes": ("MODEL.ANCHOR_GENERATOR.SIZES", ""),
    "aspect_ratios": ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", ""),
    "detections": ("TEST.DETECTIONS_PER_IMAGE", ""),
    "pre_nms_train": ("MODEL.RPN.PRE_NMS_TOPK_TRAIN", ""),
    "pre_nms_test": ("MODEL.RPN.PRE_NMS_TOPK_TEST", ""),
    "post_nms_train": ("MODEL.RPN.POST_NMS_TOPK_TRAIN", ""),
    "post_nms_test": ("MODEL.RPN.POST_NMS_TOPK_TEST", ""),
    "rpn_batch": ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", ""),
    "roi_batch": ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", ""),
    "sampler": ("DATALOADER.SAMPLER_TRAIN", ""),
    "repeat_threshold": ("DATALOADER.REPEAT_THRESHOLD", ""),
    "ims_per_batch": ("SOLVER.IMS_PER_BATCH", "dataloader.train.total_batch_size"),
    "reference_batch_size": ("SOLVER.REFERENCE_BATCH_SIZE", "train.reference_batch_size"),
    "reference_world_size": ("SOLVER.REFERENCE_WORLD_SIZE", ""),
    "ims_per_gpu": ("SOLVER.IMS_PER_GPU", "train.ims_per_gpu"),
    "accumulate_steps": ("SOLVER.ACCUMULATE_STEPS", "train.accumulate_steps"),
    "reference_max_iter": ("SOLVER.REFERENCE_MAX_ITER", "train.reference_max_iter"),
    "base_lr": ("SOLVER.BASE_LR", "optimizer.lr"),
    "base_lr_end": ("SOLVER.BASE_LR_END", ""),
    "max_iter": ("SOLVER.MAX_ITER", "train.max_iter"),
    "steps": ("SOLVER.STEPS", ""),  # lr_multiplier has them, relative to max_iter
    "warmup_iters": ("SOLVER.WARMUP_ITERS", ""),
    "epochs": ("SOLVER.EPOCHS", "train.epochs"),
    "steps_at": ("SOLVER.STEPS_AT", ""),
    "warmup_epochs": ("SOLVER.WARMUP_EPOCHS", "train.warmup_epochs"),
    "eval_epochs": ("TEST.EVAL_EPOCHS", "train.eval_epochs"),
    "filter_empty": (
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS",
        "dataloader.train.dataset.filter_empty",
    ),
    "min_keypoints": (
        "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE",
        "dataloader.train.dataset.min_keypoints",
    ),
    "checkpoint_period": ("SOLVER.CHECKPOINT_PERIOD", "train.checkpointer.period"),
    "checkpoint_seconds": ("SOLVER.CHECKPOINT_SECONDS", "train.checkpointer.seconds"),
    "ema": ("SOLVER.EMA.ENABLED", "train.ema.enabled"),
    "ema_decay": ("SOLVER.EMA.DECAY", "train.ema.decay"),
    "early_stop": ("SOLVER.EARLY_STOP", "train.early_stop"),
    "early_stop_min_delta": ("SOLVER.EARLY_STOP_MIN_DELTA", "train.early_stop_min_delta"),
    "best_metric": ("TEST.BEST_METRIC", "train.best_metric"),
    "eval_period": ("TEST.EVAL_PERIOD", "train.eval_period"),
    "report": ("TEST.REPORT", "train.report"),
    "coco_eval": ("TEST.COCO_EVAL", "dataloader.evaluator.coco_eval"),
}


class Settings:
    """The settings of ``cfg``, a YAML config or a lazy one, to read and to write: ``run[name]``.

    Args:
        typed: the keys of ``cfg`` that the user typed on the command line.

    Attributes:
        keys: name -> the key of ``cfg`` that states it; the names of the guards are those of
            ``GUARDS`` (``FEW_IMAGES``). What has no key in ``cfg`` reads as None.
    """

    def __init__(self, cfg: CfgNode | DictConfig, typed: Iterable[str] = ()):
        self.cfg = cfg
        self.typed = frozenset(typed)
        self.keys = _yaml_keys(cfg) if isinstance(cfg, CfgNode) else _lazy_keys(cfg)

    def __getitem__(self, name: str) -> Any:
        if name not in self.keys:
            return None
        if isinstance(self.cfg, DictConfig):
            return OmegaConf.select(self.cfg, self.keys[name])
        node, last = locate(self.cfg, self.keys[name])
        return node[last]

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(self.cfg, DictConfig):
            OmegaConf.update(self.cfg, self.keys[name], value)
        else:
            node, last = locate(self.cfg, self.keys[name])
            setattr(node, last, value)

    def is_typed(self, name: str) -> bool:
        """Whether the user typed ``run[name]``, a part of it, or what it is a part of."""
        ours = _parts(self.keys.get(name, ""))
        theirs = map(_parts, self.typed if ours else ())
        return any(key[: len(ours)] == ours[: len(key)] for key in theirs)

    def derive(self, name: str, value: Any, reason: str, *, needed: bool = False) -> bool:
        """Set ``run[name]`` to ``value`` unless the user typed it: the one door for all that a run
        derives. What was typed stays; it is said where it differs. (A typed "auto" or None asks for
        the derived value.)

        Args:
            reason: why, as a clause of a sentence ("the data have 3 classes").
            needed: nothing but ``value`` can work.

        Returns:
            whether it is set.

        Raises:
            ConfigError: ``value`` is ``needed``, but another was typed.
        """
        key, typed = self.keys[name], self[name]
        if not self.is_typed(name) or typed in ("auto", None):
            self[name] = value
            return True
        if _plain(typed) != _plain(value):
            if needed:
                raise ConfigError(
                    f"{key} is {_plain(typed)!r} on the command line, but {reason}; leave it out, "
                    f"or set it to {_plain(value)!r}"
                )
            logger.info(f"{key} stays {_plain(typed)!r}, as typed, and not {value!r} ({reason})")
        return False


def _parts(key: str) -> list[str]:
    return key.replace("[", ".").replace("]", "").split(".") if key else []


def _plain(value: Any) -> Any:
    """``value``, comparable: YAML has lists where a default is a tuple."""
    if isinstance(value, (list, tuple, ListConfig)):
        return tuple(map(_plain, value))
    return OmegaConf.to_container(value) if isinstance(value, DictConfig) else value


def _yaml_keys(cfg: CfgNode) -> dict[str, str]:
    retinanet = cfg.MODEL.META_ARCHITECTURE in ("RetinaNet", "GNRetinaNet")
    section = "RETINANET" if retinanet else "ROI_HEADS"
    keys = {
        **{name: yaml for name, (yaml, _) in _KEYS.items() if yaml},
        **{name: f"GUARDS.{name}" for name in cfg.GUARDS},
        "freeze_at": "MODEL.BACKBONE.FREEZE_AT",
        "num_classes": f"MODEL.{section}.NUM_CLASSES",
        "image_size": f"INPUT.{'LSJ.IMAGE_SIZE' if cfg.INPUT.LSJ.ENABLED else 'MIN_SIZE_TRAIN'}",
        "longest_side": f"INPUT.{'LSJ.IMAGE_SIZE' if cfg.INPUT.LSJ.ENABLED else 'MAX_SIZE_TRAIN'}",
        "num_groups": "MODEL.GN.NUM_GROUPS or CHANNELS_PER_GROUP",  # for messages
    }
    if cfg.MODEL.RESNETS.DEPTH >= 50:  # basic blocks have no 1x1 convolution
        keys["stride_in_1x1"] = "MODEL.RESNETS.STRIDE_IN_1X1"
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        keys["milestones"] = keys["steps"]
    return keys


def _lazy_keys(cfg: DictConfig) -> dict[str, str]:
    absent = object()

    def first(*keys: str) -> str:
        """The first of ``keys`` that ``cfg`` has; "" where it has none."""
        return next((k for k in keys if OmegaConf.select(cfg, k, default=absent) is not absent), "")

    # With and without FPN, and alone.
    resnet = first("model.backbone.bottom_up", "model.backbone") or "model"
    stages = f"{resnet}.stages"
    if isinstance(OmegaConf.select(cfg, stages), ListConfig):
        stages += "[0]"
    augmentations = "dataloader.train.mapper.augmentations"
    keys = {
        **{name: first(lazy) for name, (_, lazy) in _KEYS.items() if lazy},
        **{name.upper(): f"train.guards.{name}" for name in cfg.train.guards},
        "freeze_at": first(f"{resnet}.freeze_at"),
        "num_classes": first("model.roi_heads.num_classes", "model.num_classes"),
        # It has a default, so that a config need not have it.
        "oks_sigmas": first("dataloader.evaluator._target_")
        and "dataloader.evaluator.kpt_oks_sigmas",
        "image_size": first(
            *(f"{augmentations}[1].crop_size", f"{augmentations}[0].short_edge_length"),
            f"{augmentations}[0].size",  # torchvision's
        ),
        "longest_side": first(
            *(f"{augmentations}[1].crop_size", f"{augmentations}[0].max_size"),
            f"{augmentations}[0].size",
        ),
        "stride_in_1x1": first(f"{stages}.stride_in_1x1"),  # none in basic blocks
        "warmup_length": first("lr_multiplier.warmup_length"),
        "milestones": first("lr_multiplier.scheduler.milestones"),
        "num_updates": first("lr_multiplier.scheduler.num_updates"),
        "num_groups": "num_groups or channels_per_group of GroupNormFactory",  # for messages
        "weight_standardization": "model.weight_standardization (of build_detector)",
    }
    return {name: key for name, key in keys.items() if key}
