"""Say at the start of a run what data it trains on, as its config makes the model see them."""

from __future__ import annotations

import logging
import statistics

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.modeling import build_backbone
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator, build_anchor_generator
from omegaconf import DictConfig
from torch import nn

from gn_detect.config import ConfigError
from gn_detect.data.coco import load_coco
from gn_detect.data.loader import NamingDatasetMapper
from gn_detect.data.model_input import ModelInput, Resizing
from gn_detect.data.summary import summarize
from gn_detect.settings import Settings

from .guards import without_weights
from .lazy_config import instantiate_key

logger = logging.getLogger(__name__)


def describe_data(cfg: CfgNode | DictConfig, names: list[str]) -> None:
    """Log what there is to train on, in datasets that are COCO JSON files.

    Raises:
        ConfigError: see :func:`model_input`.
    """
    given = model_input(cfg)
    for name in names:
        summary = summarize(load_coco(MetadataCatalog.get(name).json_file), given)
        logger.info(f"data of {name}: {summary.text(num_classes=5)}")


def model_input(cfg: CfgNode | DictConfig) -> ModelInput:
    """
    Raises:
        ConfigError: the sizes of images or the anchors cannot be as ``cfg`` has them.
    """
    run = Settings(cfg)
    try:
        resizing = resizings(cfg)
    except (AssertionError, TypeError, statistics.StatisticsError) as error:
        key = run.keys["image_size"]
        raise ConfigError(f"{key} is {run['image_size']}: {error}") from None
    try:
        backbone, anchors = _backbone_and_anchors(cfg)
    except (AssertionError, KeyError) as error:
        raise ConfigError(f"the backbone of the config, or its anchors: {error}") from None
    if isinstance(anchors, DefaultAnchorGenerator):
        return ModelInput(resizing, anchors, getattr(backbone, "size_divisibility", 0))
    return ModelInput(resizing)


def resizings(cfg: CfgNode | DictConfig) -> dict[str, Resizing]:
    """``ModelInput.resizing``."""
    found = {}
    for use in ("training", "evaluation"):
        share = 1.0
        for augmentation in augmentations(cfg, use == "training"):
            if isinstance(augmentation, (T.ResizeShortestEdge, T.ResizeScale)):
                found[use] = Resizing(augmentation, share)
            elif isinstance(augmentation, T.RandomCrop):  # Detectron2's, before the resizing
                if augmentation.crop_type == "relative":
                    share = statistics.fmean(augmentation.crop_size)
    return found


def augmentations(cfg: CfgNode | DictConfig, training: bool) -> list[T.Augmentation]:
    """Of the images of the config, one after the other."""
    if isinstance(cfg, DictConfig):
        key = f"dataloader.{'train' if training else 'test'}.mapper.augmentations"
        return instantiate_key(cfg, key) or []
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.KEYPOINT_ON = cfg.MODEL.MASK_ON = False  # which need, or say, more
    return NamingDatasetMapper.from_config(cfg, training)["augmentations"]


def _backbone_and_anchors(cfg: CfgNode | DictConfig) -> tuple[nn.Module, nn.Module | None]:
    if isinstance(cfg, DictConfig):
        backbone = without_weights(lambda _: instantiate_key(cfg, "model.backbone"))
        keys = ("model.proposal_generator.anchor_generator", "model.anchor_generator")
        return backbone, next(filter(None, (instantiate_key(cfg, key) for key in keys)), None)
    backbone = without_weights(lambda _: build_backbone(cfg))
    retinanet = "RetinaNet" in cfg.MODEL.META_ARCHITECTURE
    if not retinanet and cfg.MODEL.PROPOSAL_GENERATOR.NAME not in ("RPN", "GNRPN"):
        return backbone, None
    levels = (cfg.MODEL.RETINANET if retinanet else cfg.MODEL.RPN).IN_FEATURES
    shapes = backbone.output_shape()
    return backbone, build_anchor_generator(cfg, [shapes[level] for level in levels])
