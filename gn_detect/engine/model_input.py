"""What a config makes of images before the model sees them, and the anchors it meets them with."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.detection_utils import build_augmentation
from detectron2.modeling import build_backbone
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator, build_anchor_generator
from omegaconf import DictConfig, OmegaConf
from torch import nn

from gn_detect.config import ConfigError
from gn_detect.data.anchors import AnchorGrid
from gn_detect.data.coco import load_coco
from gn_detect.data.input_size import Resizing
from gn_detect.data.summary import summarize

from .lazy_config import instantiate_key

logger = logging.getLogger(__name__)


@dataclass
class ModelInput:
    """
    Attributes:
        resizing: "training", "evaluation" -> how images are resized for it, where that is known.
        anchors: None where the model has none, or others than Detectron2's horizontal boxes.
    """

    resizing: dict[str, Resizing] = field(default_factory=dict)
    anchors: AnchorGrid | None = None

    @classmethod
    def from_config(cls, cfg: CfgNode | DictConfig) -> ModelInput:
        """
        Raises:
            ConfigError: the backbone cannot be built, or the anchors are not those of its levels.
        """
        resizing, anchors = _of_yaml(cfg) if isinstance(cfg, CfgNode) else _of_lazy(cfg)
        return cls({use: r for use, r in resizing.items() if r}, anchors)


def describe_data(cfg: CfgNode | DictConfig, names: list[str]) -> None:
    """Log what there is to train on, in datasets that are COCO JSON files.

    Raises:
        ConfigError: see :meth:`ModelInput.from_config`.
    """
    given = ModelInput.from_config(cfg)
    for name in names:
        data = load_coco(MetadataCatalog.get(name).json_file)
        summary = summarize(data, given.resizing, given.anchors)
        logger.info(f"data of {name}: {summary.brief()}")


def _of_yaml(cfg: CfgNode) -> tuple[dict[str, Resizing | None], AnchorGrid | None]:
    lsj, edges = cfg.INPUT.LSJ, cfg.INPUT.MIN_SIZE_TRAIN
    try:
        (training, *_), (evaluation, *_) = (
            build_augmentation(cfg, train) for train in (True, False)
        )
        if edges in ((), []):
            raise AssertionError("it is empty")
    except AssertionError as error:
        raise ConfigError(f"INPUT.MIN_SIZE_TRAIN is {edges}: {error}") from None
    if lsj.ENABLED:
        training = T.ResizeScale(lsj.MIN_SCALE, lsj.MAX_SCALE, lsj.IMAGE_SIZE, lsj.IMAGE_SIZE)
    note = "; INPUT.CROP, which comes before, is not counted" if cfg.INPUT.CROP.ENABLED else ""
    resizing = {"training": Resizing(training, note), "evaluation": Resizing(evaluation)}
    retinanet = cfg.MODEL.META_ARCHITECTURE in ("RetinaNet", "GNRetinaNet")
    if not retinanet and cfg.MODEL.PROPOSAL_GENERATOR.NAME != "RPN":
        return resizing, None
    levels = cfg.MODEL.RETINANET.IN_FEATURES if retinanet else cfg.MODEL.RPN.IN_FEATURES
    try:
        with _without_weights():
            backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        generator = build_anchor_generator(cfg, [shapes[level] for level in levels])
    except (AssertionError, KeyError) as error:
        raise ConfigError(f"MODEL.BACKBONE or MODEL.ANCHOR_GENERATOR: {error}") from None
    except RuntimeError:  # a backbone that computes with its weights while it is built
        return resizing, None
    return resizing, _grid(generator, backbone)


def _of_lazy(cfg: DictConfig) -> tuple[dict[str, Resizing | None], AnchorGrid | None]:
    resizing = {}
    for use, split in (("training", "train"), ("evaluation", "test")):
        key = f"dataloader.{split}.mapper.augmentations"
        found = instantiate_key(cfg, key) if OmegaConf.select(cfg, key) else ()
        kinds = (T.ResizeShortestEdge, T.ResizeScale)
        resizing[use] = next((Resizing(a) for a in found if isinstance(a, kinds)), None)
    for key in ("model.proposal_generator.anchor_generator", "model.anchor_generator"):
        if OmegaConf.select(cfg, key) and OmegaConf.select(cfg, "model.backbone"):
            try:
                with _without_weights():
                    backbone = instantiate_key(cfg, "model.backbone")
            except RuntimeError:
                continue
            return resizing, _grid(instantiate_key(cfg, key), backbone)
    return resizing, None


def _grid(generator: nn.Module, backbone: nn.Module) -> AnchorGrid | None:
    if not isinstance(generator, DefaultAnchorGenerator):
        return None
    return AnchorGrid(generator, backbone.size_divisibility)


@contextlib.contextmanager
def _without_weights() -> Iterator[None]:
    """Build modules of which only the shapes are asked, in no time and memory; what building them
    says will be said when the model is built."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with torch.device("meta"):
            yield
    finally:
        logging.disable(disabled)
