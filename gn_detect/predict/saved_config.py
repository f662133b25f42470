"""The config that weights were trained with, as they carry it, and what is built from it."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import yaml
from detectron2.config import CfgNode, instantiate
from detectron2.data import DatasetMapper
from detectron2.modeling import build_model as build_registered
from omegaconf import DictConfig, OmegaConf
from torch import nn

from gn_detect.checkpoint import Weights, WeightsError
from gn_detect.checkpoint.coverage import num_classes, num_keypoints
from gn_detect.config import ConfigError, load_config
from gn_detect.data.loader import NamingDatasetMapper
from gn_detect.engine.lazy import build_lazy_model
from gn_detect.engine.lazy_config import load_lazy_config
from gn_detect.settings import Settings

logger = logging.getLogger(__name__)


def find_config(
    weights: Weights, name: str, config_file: str = "", opts: list[str] | None = None
) -> CfgNode | DictConfig:
    """The config of ``config_file``, or else the one that ``weights``, of the file ``name``, carry;
    with ``opts``. The number of classes that it leaves open is that of the weights.

    Raises:
        ConfigError: there is none, or it cannot be used.
    """
    if config_file:
        load = load_lazy_config if config_file.endswith(".py") else load_config
        cfg = load(config_file, opts)
    else:
        cfg = _saved(weights, name, opts)
    run = Settings(cfg)
    for key, count in (("num_classes", num_classes), ("num_keypoints", num_keypoints)):
        if key in run.keys and run[key] is None:
            run[key] = count(weights.shapes)
    return cfg


def _saved(weights: Weights, name: str, opts: list[str] | None) -> CfgNode:
    metadata = weights.rest.get("metadata")
    text = weights.rest.get("config")
    if not text and isinstance(metadata, Mapping):
        text = metadata.get("gn_detect.config")
    if not text:
        raise WeightsError(
            f"{name} does not say what config it was trained with: name it with config_file "
            "(--config-file)"
        )
    try:
        saved = yaml.safe_load(text)
        if not isinstance(saved, dict) or "MODEL" not in saved:
            raise WeightsError(f"{name}: its config is no YAML config; name it with config_file")
        cfg = load_config()
        cfg.merge_from_other_cfg(CfgNode(saved))
        cfg.merge_from_list(opts or [])
    except (AssertionError, KeyError, ValueError, yaml.YAMLError) as error:
        raise WeightsError(f"{name}: its config: {error}") from None
    return cfg


def build_model(cfg: CfgNode | DictConfig) -> nn.Module:
    return build_registered(cfg) if isinstance(cfg, CfgNode) else build_lazy_model(cfg)


def build_mapper(cfg: CfgNode | DictConfig) -> DatasetMapper:
    """What turns images of an evaluation into inputs."""
    if isinstance(cfg, CfgNode):
        return NamingDatasetMapper(cfg, is_train=False)
    mapper = OmegaConf.select(cfg, "dataloader.test.mapper")
    if mapper is None:
        raise ConfigError("the lazy config has no dataloader.test.mapper")
    return instantiate(mapper)
