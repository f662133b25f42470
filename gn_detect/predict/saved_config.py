"""The config that weights were trained with, as they carry it, and what is built from it.

It comes from a file that may be anyone's. A YAML config holds values alone; a lazy config names
what to call, of which only the components of detectors are allowed.
"""

from __future__ import annotations

import contextlib
import logging
import reprlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.layers import ShapeSpec
from detectron2.modeling import ResNet
from detectron2.modeling import build_model as build_registered
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from gn_detect.checkpoint import Weights, WeightsError
from gn_detect.checkpoint.coverage import num_classes, num_keypoints
from gn_detect.config import ConfigError, load_config
from gn_detect.data.loader import NamingDatasetMapper
from gn_detect.engine.lazy import build_lazy_model
from gn_detect.engine.lazy_config import complete_lazy_config, instantiate_key, load_lazy_config
from gn_detect.modeling import GroupNormFactory, build_detector
from gn_detect.settings import Settings

logger = logging.getLogger(__name__)

_MAPPER = "dataloader.test.mapper"
_REMEDY = "name the config itself with config_file (--config-file)"
# What a lazy config of a file of weights may call: modules and transforms of these rooms ...
_ROOMS = ("detectron2.modeling.", "detectron2.layers.", "detectron2.data.transforms.")
_ROOMS += ("gn_detect.modeling.", "gn_detect.layers.", "torch.nn.")
_KINDS = (nn.Module, T.Augmentation, T.Transform)
# (mmdetection's may load a pickle that an argument names), and these.
_FOREIGN = "detectron2.modeling.mmdet_wrapper"
_OTHERS = (
    *(ResNet.make_default_stages, ResNet.make_stage, ShapeSpec, Matcher, Box2BoxTransform),
    *(GroupNormFactory, build_detector, DatasetMapper, NamingDatasetMapper),
)
_UNUSABLE = (AssertionError, AttributeError, KeyError, RecursionError, TypeError, ValueError)


def find_config(
    weights: Weights, name: str, config_file: str = "", opts: Sequence[str] = ()
) -> CfgNode | DictConfig:
    """The config of ``config_file``, or else the one that ``weights``, of the file ``name``, carry;
    with ``opts``. The number of classes that it leaves open is that of the weights.

    Raises:
        ConfigError: there is none, or it cannot be used.
    """
    opts = list(map(str, opts))
    if config_file:
        load = load_lazy_config if config_file.endswith(".py") else load_config
        cfg = load(config_file, opts)
    else:
        cfg = _saved_config(weights, name, opts)
    run = Settings(cfg)
    for key, count in (("num_classes", num_classes), ("num_keypoints", num_keypoints)):
        if key in run.keys and run[key] is None:
            run[key] = count(weights.shapes)
    return cfg


def build_model(cfg: CfgNode | DictConfig) -> nn.Module:
    """The model of ``cfg``, on its device, its weights at random.

    On a CPU GN runs by PyTorch's operations where ``cfg``, of a run on a GPU, asks for Triton's.

    Raises:
        ConfigError: it cannot be built, as where it names a component that nothing has registered.
    """
    on_cpu = torch.device(Settings(cfg)["device"]).type == "cpu"
    if isinstance(cfg, CfgNode):
        if replaced := on_cpu and cfg.MODEL.GN.KERNEL == "triton":
            cfg.MODEL.GN.KERNEL = "torch"
        try:
            model = build_registered(cfg)
        except ConfigError:
            raise
        except _UNUSABLE as error:
            raise ConfigError(
                f"the model of the config cannot be built ({error.args[0] if error.args else error}"
                "); import what registers a component of your own before (in Python), or change "
                "the key with opts (--opts)"
            ) from error
    else:
        model = build_lazy_model(cfg)
        layers = model.modules() if on_cpu else ()
        replaced = [layer for layer in layers if getattr(layer, "kernel", "") == "triton"]
        for layer in replaced:
            layer.kernel = "torch"
    if replaced:
        logger.info(
            "MODEL.GN.KERNEL (kernel) is 'triton', whose kernels are for CUDA devices; on the CPU "
            "GN runs by PyTorch's operations"
        )
    return model


def build_mapper(cfg: CfgNode | DictConfig) -> DatasetMapper:
    """What turns the images of an evaluation into inputs of the model.

    Raises:
        ConfigError: ``cfg`` does not tell, or the model needs more than an image.
    """
    if isinstance(cfg, CfgNode):
        mapper = NamingDatasetMapper(cfg, is_train=False)
    elif OmegaConf.select(cfg, _MAPPER) is None:
        raise ConfigError(f"the lazy config has no {_MAPPER}, which reads and resizes images")
    else:
        mapper = instantiate_key(cfg, _MAPPER)
    if not isinstance(mapper, DatasetMapper):
        raise ConfigError(
            f"{_MAPPER} is a {type(mapper).__name__}; images are read by a DatasetMapper"
        )
    if mapper.proposal_topk is not None:
        raise ConfigError(
            "MODEL.LOAD_PROPOSALS is True: the model needs proposals from a file, and an image "
            "alone has none; evaluate it with --eval-only"
        )
    return mapper


def _saved_config(weights: Weights, name: str, opts: list[str]) -> CfgNode | DictConfig:
    text = weights.rest.get("config")
    if not text or not isinstance(text, str):
        raise WeightsError(f"{name} does not say what config it was trained with: {_REMEDY}")
    try:
        saved = yaml.load(text, _Loader)
        if isinstance(saved, dict) and isinstance(saved.get("MODEL"), dict):
            return _yaml_config(saved, name, opts)
        if isinstance(saved, dict) and isinstance(saved.get("model"), dict):
            return _lazy_config(saved, name, opts)
    except ConfigError:
        raise
    except (*_UNUSABLE, OmegaConfBaseException, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise WeightsError(f"{name}: its config cannot be used ({reason}): {_REMEDY}") from None
    raise WeightsError(f"{name}: its config is of no known kind: {_REMEDY}")


def _yaml_config(saved: dict, name: str, opts: list[str]) -> CfgNode:
    cfg = load_config()
    unknown = []
    _drop_unknown(saved, cfg, "", unknown)
    if unknown:
        logger.warning(
            f"{name} was trained with keys that this version does not have, and are left out: "
            f"{', '.join(unknown)}"
        )
    cfg.merge_from_other_cfg(CfgNode(saved))
    try:
        cfg.merge_from_list(opts)
    except (AssertionError, KeyError, ValueError) as error:
        raise ConfigError(f"opts (--opts): {error.args[0]}") from None
    return cfg


def _drop_unknown(saved: dict, known: CfgNode, prefix: str, unknown: list[str]) -> None:
    for key in list(saved):
        if key not in known:
            unknown.append(f"{prefix}{key} ({reprlib.repr(saved.pop(key))})")
        elif isinstance(known[key], CfgNode) and isinstance(saved[key], dict):
            _drop_unknown(saved[key], known[key], f"{prefix}{key}.", unknown)


def _lazy_config(saved: dict, name: str, opts: list[str]) -> DictConfig:
    cfg = OmegaConf.create(saved, flags={"allow_objects": True})
    complete_lazy_config(cfg, name, opts)
    for key in ("model", _MAPPER):
        if (node := OmegaConf.select(cfg, key)) is not None:
            # With references resolved, so that none leads elsewhere.
            content = _allowed_calls(OmegaConf.to_container(node, resolve=True), name)
            allowed = OmegaConf.create(content, flags={"allow_objects": True})
            OmegaConf.update(cfg, key, allowed, merge=False)
    return cfg


class _Named(NamedTuple):
    """What PyYAML writes of a function or a class (``!!python/name:``), or of an object."""

    path: str
    arguments: dict | None = None


class _Loader(yaml.SafeLoader):
    """Of plain values, and of names, which stay names."""

    def object(self, path: str, node: yaml.Node) -> _Named:
        return _Named(path, self.construct_mapping(node, deep=True))

    def tuple(self, node: yaml.Node) -> tuple:
        return tuple(self.construct_sequence(node, deep=True))


_PYTHON = "tag:yaml.org,2002:python/"
_Loader.add_multi_constructor(f"{_PYTHON}name:", lambda loader, path, node: _Named(path))
_Loader.add_multi_constructor(f"{_PYTHON}object:", _Loader.object)
_Loader.add_constructor(f"{_PYTHON}tuple", _Loader.tuple)


def _allowed_calls(node: Any, name: str) -> Any:
    """``node``, with what it names in place of the names.

    Raises:
        WeightsError: it names something else than components of detectors.
    """
    if isinstance(node, _Named):
        found = _allowed(node.path, name)[1]
        return found if node.arguments is None else found(**_allowed_calls(node.arguments, name))
    if isinstance(node, dict):
        calls = {"_target_": _allowed(node["_target_"], name)[0]} if "_target_" in node else {}
        return {key: _allowed_calls(value, name) for key, value in node.items()} | calls
    if isinstance(node, (list, tuple)):
        return [_allowed_calls(value, name) for value in node]
    return node


def _allowed(path: Any, name: str) -> tuple[str, Any]:
    """The name, and what it names."""
    path = path.path if isinstance(path, _Named) else str(path)
    plain = path.removeprefix("LabGym.")  # whose copy of Detectron2 this may be
    found = None
    if plain.startswith((*_ROOMS, "gn_detect.data.loader.", "detectron2.data.DatasetMapper")):
        with contextlib.suppress(Exception):  # of the import of anything there
            found = locate(plain)
    if isinstance(found, type) and issubclass(found, _KINDS):
        room = f"{found.__module__.removeprefix('LabGym.')}."
        if room.startswith(_ROOMS) and not room.startswith(_FOREIGN):
            return plain, found
    if found in _OTHERS:
        return plain, found
    raise WeightsError(
        f"{name}: its config calls {path[:100]!r}, which is no component of a detector that is "
        f"known, and may be any code: {_REMEDY}"
    )
