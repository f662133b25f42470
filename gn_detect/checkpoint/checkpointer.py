"""Detectron2's checkpointer, which knows what weights were trained with."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names
from detectron2.config import CfgNode
from torch import nn

from gn_detect.config import ConfigError

from .origin import Origin, check_origin


class Checkpointer(DetectionCheckpointer):
    """Saves the :class:`Origin` of the weights with them, and looks at what it loads.

    Args:
        model: also wrapped for distributed training.
        save_dir: of the checkpoints.
        cfg: of the model.
        **checkpointables: of DetectionCheckpointer.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", *, cfg: CfgNode, **checkpointables):
        super().__init__(model, save_dir, **checkpointables)
        self._cfg = cfg
        self._loading = ""

    def save(self, name: str, **kwargs: Any) -> None:
        super().save(name, origin=dataclasses.asdict(Origin.of_config(self._cfg)), **kwargs)

    def load(self, path: str, *args, **kwargs) -> dict[str, Any]:
        """
        Raises:
            ConfigError: the weights were trained with another input or other strides than the
                config's, or with BN where the model has GN.
        """
        self._loading = path
        if path and (origin := Origin.of_name(path)):
            check_origin(origin, self._cfg, path)
        return super().load(path, *args, **kwargs)

    def _load_model(self, checkpoint: dict[str, Any]):
        if origin := checkpoint.pop("origin", None):
            known = {field.name for field in dataclasses.fields(Origin)}
            origin = Origin(**{k: v for k, v in origin.items() if k in known})
            check_origin(origin, self._cfg, self._loading)
        if self._cfg.GUARDS.BN_WEIGHTS_INTO_GN:
            self._refuse_bn(checkpoint["model"])
        return super()._load_model(checkpoint)

    def _refuse_bn(self, names: Iterable[str]) -> None:
        layers = bn_into_gn(names, self.model)
        if layers:
            raise ConfigError(
                f"{self._loading} was trained with BN in {len(layers)} layers that "
                f"are GN here, such as {layers[0]}. BN's convolutions are useless with GN's "
                "statistics, though all names fit. Use weights trained with GN "
                "(catalog://ImageNetPretrained/FAIR/R-50-GN), or a norm of BN in these layers; to "
                "load them all the same, set GUARDS.BN_WEIGHTS_INTO_GN False"
            )


def bn_into_gn(names: Iterable[str], model: nn.Module) -> list[str]:
    """The GN layers of ``model`` to which weights of the given names have BN parameters.

    Args:
        names: of the weights, in Detectron2's form, with or without a prefix, or in Caffe2's, in
            which BN is also folded into a scale and a bias (``res2_0_branch2a_bn_s``).
    """
    names = [name.removeprefix("module.") for name in names]  # of a wrapper for training
    caffe2 = [name for name in names if re.search(r"_bn_(s|b|rm|riv)$", name)]
    bn_layers = {name.removesuffix(".weight") for name in convert_basic_c2_names(caffe2)}
    bn_layers |= {n.removesuffix(".running_mean") for n in names if n.endswith(".running_mean")}
    group_norms = [n for n, m in model.named_modules() if isinstance(m, nn.GroupNorm)]
    return [n for n in group_norms if any(f".{n}".endswith(f".{bn}") for bn in bn_layers)]
