"""Weights that fit a model by name and shape, and do not fit it; each check has a switch."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping

from detectron2.config import CfgNode
from omegaconf import DictConfig
from torch import nn

from gn_detect.config import ConfigError
from gn_detect.layers.weight_std import variants_in
from gn_detect.settings import Settings

from .convert.weights import Weights
from .coverage import BACKBONE, Coverage
from .origin import Origin, same

logger = logging.getLogger(__name__)

_INPUT = ("input_format", "pixel_mean", "pixel_std")
SWITCHES = (
    *("WEIGHTS_INPUT", "WEIGHTS_STRIDE", "WEIGHTS_NORM", "WEIGHTS_COVERAGE"),
    "BN_WEIGHTS_INTO_GN",
)


@dataclasses.dataclass(frozen=True)
class WeightGuards:
    """What the weights of a run are held to.

    Args:
        ours: what the model of the run is trained with.
        keys: field of ``Origin`` -> the config key that states it; may hold others.
        switches: each of ``SWITCHES`` -> the config key that switches the check off, and whether
            it is on.
    """

    ours: Origin
    keys: Mapping[str, str]
    switches: Mapping[str, tuple[str, bool]]

    @classmethod
    def from_config(cls, cfg: CfgNode | DictConfig) -> WeightGuards:
        """Of a YAML config, or a lazy one."""
        run = Settings(cfg)
        values = {field: run[field] for field in (*_INPUT, "stride_in_1x1")}
        values = {f: v if isinstance(v, (str, bool)) else v and tuple(v) for f, v in values.items()}
        return cls(
            Origin(**values),
            run.keys,
            {name: (run.keys[name], run[name]) for name in SWITCHES},
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

    def check(self, weights: Weights, coverage: Coverage, model: nn.Module, name: str) -> None:
        """Refuse weights that are not what ``model`` needs.

        Where BN weights for GN layers are let pass, their gamma and beta are taken out of
        ``coverage`` in place: they belong to BN's statistics.

        Args:
            weights: as read.
            coverage: of ``model`` by ``weights``.
            name: of the file, for the message.

        Raises:
            ConfigError: names what does not fit, and the switch.
        """
        self.check_origin(weights.origin, name)
        layers = bn_into_gn(coverage, model)
        self._check_batch_norms(layers, name)
        # Of BN weights whose convolutions alone are in the file, on purpose.
        layers += sorted(weights.batch_norms - {n.rpartition(".")[0] for n in weights.state})
        parameters = [f"{layer}.{p}" for layer in layers for p in ("weight", "bias")]
        for parameter in parameters:
            if coverage.loaded.pop(parameter, None) is not None:
                coverage.missing.append(parameter)
        if layers:
            logger.warning(
                f"{name}: gamma and beta of {len(layers)} layers of BN that are GN here are left "
                "out; the convolutions are loaded"
            )
        self._check_statistics(coverage, model, name)
        self._check_norms(weights.origin, coverage, model, name)
        self._check_backbone(coverage, parameters, name)

    def _check_batch_norms(self, layers: list[str], name: str) -> None:
        switch, on = self.switches["BN_WEIGHTS_INTO_GN"]
        if on and layers:
            raise ConfigError(
                f"{name} was trained with BN in {len(layers)} layers that are GN here, such as "
                f"{layers[0]}. The names fit, GN's features do not. Use weights trained "
                "with GN (detectron://R-50-GN, timm://resnet50_gn.a1h_in1k), turn these into such "
                "with tools/bn_to_gn.py (docs/bn_to_gn.md), or set the norm of these layers to BN; "
                f"to load the convolutions alone, set {switch} False"
            )

    def _check_statistics(self, coverage: Coverage, model: nn.Module, name: str) -> None:
        switch, on = self.switches["WEIGHTS_NORM"]
        layers = [
            n
            for n, m in model.named_modules()
            if getattr(m, "running_mean", None) is not None
            and f"{n}.weight" in coverage.loaded
            and n not in coverage.batch_norms
        ]
        if on and layers:
            raise ConfigError(
                f"{name} was trained without BN in {len(layers)} layers that are "
                f"{type(model.get_submodule(layers[0])).__name__} here, such as {layers[0]}: it "
                "has no mean and variance for them. Set the norm of these layers to GN, or use "
                f"weights that were trained with BN; to go on all the same, set {switch} False"
            )

    def _check_norms(self, origin: Origin, coverage: Coverage, model: nn.Module, name: str) -> None:
        switch, on = self.switches["WEIGHTS_NORM"]
        modules = {n: m for n, m in model.named_modules() if f"{n}.weight" in coverage.loaded}
        group_norms = {n: m for n, m in modules.items() if isinstance(m, nn.GroupNorm)}
        if not on or not group_norms:
            return
        ours = variants_in(modules.values())
        theirs = origin.weight_standardization
        if theirs is not None and ours != {theirs}:
            raise ConfigError(
                f"{name} was trained with {_variant(theirs)}, but the model has "
                f"{_variant(*ours)}: set {self.keys['weight_standardization']} to {theirs!r}; to "
                f"go on all the same, set {switch} False"
            )
        for layer, norm in group_norms.items():
            ours = norm.num_groups, norm.num_channels // norm.num_groups
            theirs = origin.num_groups or ours[0], origin.channels_per_group or ours[1]
            if ours != theirs:
                raise ConfigError(
                    f"{layer} has {ours[0]} groups of {ours[1]} channels, but {name} was trained "
                    f"with {_groups(origin)}: set {self.keys['num_groups']} accordingly; to go on "
                    f"all the same, set {switch} False"
                )

    def _check_backbone(self, coverage: Coverage, exempt: list[str], name: str) -> None:
        switch, on = self.switches["WEIGHTS_COVERAGE"]
        lacking = [n for n in coverage.lacking(BACKBONE) if n not in exempt]
        # A deeper network has further blocks in the stages; a classifier at its end is no matter.
        stages = {s for n in coverage.shapes for s in re.findall(r"\bres\d(?=\.)", n)}
        blocks = [re.search(r"\b(res\d)\.\d+\.conv\d\.weight", n) for n in coverage.unexpected]
        further = [match.string for match in blocks if match and match[1] in stages]
        if not on or not (lacking or further):
            return
        how = f"it does not have, or not in this shape, {len(lacking)} of its parameters, such as "
        if not lacking:
            how = f"it has {len(further)} further layers, such as "
        raise ConfigError(
            f"{name} is of another backbone than the model's: {how}{(lacking or further)[0]}. Name "
            "the config of its architecture (MODEL.RESNETS), or other weights; to go on with "
            f"what fits all the same, set {switch} False"
        )


def bn_into_gn(coverage: Coverage, model: nn.Module) -> list[str]:
    """The GN layers of ``model`` that are BN in the weights of ``coverage``."""
    group_norms = [n for n, m in model.named_modules() if isinstance(m, nn.GroupNorm)]
    return [name for name in group_norms if name in coverage.batch_norms]


def norms_of(model: nn.Module) -> dict[str, str | int | None]:
    """The fields of an :class:`Origin` that say what the norms of ``model`` compute."""
    norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    groups = {norm.num_groups for norm in norms}
    channels = {norm.num_channels // norm.num_groups for norm in norms}
    return {
        "weight_standardization": _only(variants_in(model.modules())),
        "num_groups": _only(groups),
        "channels_per_group": _only(channels) if len(groups) > 1 else None,
    }


def _only(values: set):
    """The one value in a set of one; else None."""
    return next(iter(values)) if len(values) == 1 else None


def _variant(*variants: str) -> str:
    named = " and ".join(filter(None, variants))
    return f"Weight Standardization ({named})" if named else "no Weight Standardization"


def _groups(origin: Origin) -> str:
    if origin.num_groups:
        return f"{origin.num_groups} groups"
    return f"{origin.channels_per_group} channels per group"


def _equal(a, b) -> bool:
    """Whether two values of a field agree; None agrees with all."""
    if a is None or b is None:
        return True
    return a == b if isinstance(a, str) else same(a, b)


def _plain(value) -> str:
    return value if isinstance(value, str) else str(list(value))
