"""Weights that fit a model by name and shape, and do not fit it; each check has a switch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names
from detectron2.config import CfgNode
from torch import nn

from gn_detect.config import ConfigError

from .origin import Origin

_INPUT = ("input_format", "pixel_mean", "pixel_std")


@dataclasses.dataclass(frozen=True)
class WeightGuards:
    """What the weights of a run are held to.

    Args:
        ours: what the model of the run is trained with.
        keys: field of ``Origin`` -> the config key that states it.
        switches: ``"WEIGHTS_INPUT"``, ``"WEIGHTS_STRIDE"`` and ``"BN_WEIGHTS_INTO_GN"`` -> the
            config key that switches the check off, and whether it is on.
    """

    ours: Origin
    keys: Mapping[str, str]
    switches: Mapping[str, tuple[str, bool]]

    @classmethod
    def from_config(cls, cfg: CfgNode) -> WeightGuards:
        bottleneck = cfg.MODEL.RESNETS.DEPTH >= 50
        names = ("WEIGHTS_INPUT", "WEIGHTS_STRIDE", "BN_WEIGHTS_INTO_GN")
        return cls(
            Origin(
                cfg.INPUT.FORMAT,
                tuple(cfg.MODEL.PIXEL_MEAN),
                tuple(cfg.MODEL.PIXEL_STD),
                cfg.MODEL.RESNETS.STRIDE_IN_1X1 if bottleneck else None,
            ),
            {
                "input_format": "INPUT.FORMAT",
                "pixel_mean": "MODEL.PIXEL_MEAN",
                "pixel_std": "MODEL.PIXEL_STD",
                "stride_in_1x1": "MODEL.RESNETS.STRIDE_IN_1X1",
            },
            {name: (f"GUARDS.{name}", cfg.GUARDS[name]) for name in names},
        )

    def check_origin(self, origin: Origin, weights: str) -> None:
        """Refuse weights that were trained with another input, or other strides, than ours.

        Args:
            origin: of the weights.
            weights: their name, for the message.

        Raises:
            ConfigError: names each key, its value, the weights' value, and the switch.
        """
        switch, on = self.switches["WEIGHTS_INPUT"]
        wrong = [
            f"{self.keys[field]} is {_plain(ours)}, the weights' is {_plain(theirs)}"
            for field in _INPUT
            if not _equal(ours := getattr(self.ours, field), theirs := getattr(origin, field))
        ]
        if on and wrong:
            raise ConfigError(
                f"{weights} was trained with another input: {'; '.join(wrong)}. Give the keys the "
                f"weights' values; to go on with another input all the same, set {switch} False"
            )
        switch, on = self.switches["WEIGHTS_STRIDE"]
        ours, theirs = self.ours.stride_in_1x1, origin.stride_in_1x1
        if on and None not in (ours, theirs) and ours != theirs:
            raise ConfigError(
                f"{self.keys['stride_in_1x1']} is {ours}, but {weights} was trained with {theirs}: "
                f"the shapes are the same, the features are not. Set it to {theirs}; to go on all "
                f"the same, set {switch} False"
            )

    def check_norms(self, names: Iterable[str], model: nn.Module, weights: str) -> None:
        """Refuse weights of BN for layers of GN.

        Args:
            names: of the parameters and buffers in the file.
            model: that is to load them.
            weights: the name of the file, for the message.

        Raises:
            ConfigError: names the number of layers, one of them, and the switch.
        """
        switch, on = self.switches["BN_WEIGHTS_INTO_GN"]
        if on and (layers := bn_into_gn(names, model)):
            raise ConfigError(
                f"{weights} was trained with BN in {len(layers)} layers that are GN here, such as "
                f"{layers[0]}. BN's convolutions are useless with GN's statistics, though all "
                "names fit. Use weights trained with GN "
                "(catalog://ImageNetPretrained/FAIR/R-50-GN), or a norm of BN in these layers; to "
                f"load them all the same, set {switch} False"
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


def _equal(a, b) -> bool:
    """Whether two values of a field agree; None agrees with all."""
    if a is None or b is None:
        return True
    if isinstance(a, str) or len(a) != len(b):
        return a == b
    return all(abs(x - y) <= 0.01 * abs(y) for x, y in zip(a, b, strict=True))


def _plain(value) -> str:
    return value if isinstance(value, str) else str(list(value))
