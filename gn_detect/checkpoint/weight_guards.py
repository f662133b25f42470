"""Weights that fit a model by name and shape, and do not fit it; each check has a switch."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Sequence

from detectron2.config import CfgNode
from omegaconf import DictConfig
from torch import nn

from gn_detect.config import ConfigError
from gn_detect.layers.weight_std import variants_in
from gn_detect.settings import Settings

from .convert.weights import Weights
from .coverage import BACKBONE, Coverage
from .origin import Origin, only, same
from .outputs import describe_exchange, is_predictor

logger = logging.getLogger(__name__)

_INPUT = ("input_format", "pixel_mean", "pixel_std")


@dataclasses.dataclass(frozen=True)
class WeightGuards:
    """What the weights of a run are held to.

    Args:
        ours: what the model of the run is trained with.
        run: has the keys of these values, and the switches of the checks.
    """

    ours: Origin
    run: Settings

    @classmethod
    def from_config(cls, cfg: CfgNode | DictConfig) -> WeightGuards:
        """Of a YAML config, or a lazy one."""
        run = Settings(cfg)
        values = {field: run[field] for field in (*_INPUT, "stride_in_1x1")}
        values = {f: v if isinstance(v, (str, bool)) else v and tuple(v) for f, v in values.items()}
        return cls(Origin(**values), run)

    def _refuse(self, switch: str, reason: str, otherwise: str = "to go on all the same") -> None:
        """Raise a ConfigError, unless this check is switched off."""
        if self.run[switch]:
            raise ConfigError(f"{reason}; {otherwise}, set {self.run.keys[switch]} False")

    def check_origin(self, origin: Origin, weights: str) -> None:
        """Refuse weights of this name that were trained with another input, or other strides.

        Raises:
            ConfigError: names each key, its value, the weights' value, and the switch.
        """
        wrong = [
            f"{self.run.keys[field]} is {_plain(ours)}, the weights' is {_plain(theirs)}"
            for field in _INPUT
            if not _equal(ours := getattr(self.ours, field), theirs := getattr(origin, field))
        ]
        if wrong:
            self._refuse(
                "WEIGHTS_INPUT",
                f"{weights} was trained with another input: {'; '.join(wrong)}. Give the keys the "
                "weights' values",
            )
        ours, theirs = self.ours.stride_in_1x1, origin.stride_in_1x1
        if None not in (ours, theirs) and ours != theirs:
            self._refuse(
                "WEIGHTS_STRIDE",
                f"{self.run.keys['stride_in_1x1']} is {ours}, but {weights} was trained with "
                f"{theirs}: the shapes are the same, the features are not. Set it to {theirs}",
            )

    def check(self, weights: Weights, coverage: Coverage, model: nn.Module, name: str) -> None:
        """Refuse weights that are not what ``model`` needs.

        Where BN weights for GN layers are let pass, their gamma and beta are taken out of
        ``coverage`` in place: they belong to BN's statistics.

        Args:
            weights: of the file ``name``.
            coverage: of ``model`` by ``weights``.

        Raises:
            ConfigError: names what does not fit, and the switch.
        """
        self.check_origin(weights.origin, name)
        layers, norm = bn_into_gn(coverage, model), "GN"
        if layers:
            norm = "LN2d" if isinstance(model.get_submodule(layers[0]), nn.LayerNorm) else "GN"
            self._refuse(
                "BN_WEIGHTS_INTO_GN",
                f"{name} was trained with BN in {len(layers)} layers that are {norm} here, such as "
                f"{layers[0]}. The names fit, the features do not. Use weights trained "
                "with GN (detectron://R-50-GN, timm://resnet50_gn.a1h_in1k), turn these into such "
                "with tools/bn_to_gn.py (docs/bn_to_gn.md), or set the norm of these layers to BN",
                "to load the convolutions alone",
            )
        # Of BN weights whose convolutions alone are in the file, on purpose.
        layers += sorted(weights.batch_norms - {n.rpartition(".")[0] for n in weights.state})
        parameters = [f"{layer}.{p}" for layer in layers for p in ("weight", "bias")]
        coverage.missing += [p for p in parameters if coverage.loaded.pop(p, None) is not None]
        if layers:
            logger.warning(
                f"{name}: gamma and beta of {len(layers)} layers of BN that are {norm} here are "
                "left out; the convolutions are loaded"
            )
        modules = {n: m for n, m in model.named_modules() if f"{n}.weight" in coverage.loaded}
        batch_norms = {
            layer: module
            for layer, module in modules.items()
            if getattr(module, "running_mean", None) is not None
        }
        if layers := [layer for layer in batch_norms if layer not in coverage.batch_norms]:
            self._refuse(
                "WEIGHTS_NORM",
                f"{name} was trained without BN in {len(layers)} layers that are "
                f"{type(modules[layers[0]]).__name__} here, such as {layers[0]}: it has no mean "
                "and variance for them. Set the norm of these layers to GN, or use weights that "
                "were trained with BN",
            )
        self._check_biases(coverage, name)
        self._check_group_norms(weights, modules, name)
        self._check_backbone(coverage, parameters, name)

    def check_outputs(
        self,
        weights: Weights,
        coverage: Coverage,
        name: str,
        kind: str,
        ours: Sequence[str],
        evaluation: bool,
    ) -> None:
        """Refuse to evaluate weights of as many other classes or keypoints as the data's, or of
        these in another order. For training, their predictors are taken out of ``coverage`` in
        place.

        Args:
            weights, coverage, name: of :meth:`check`.
            kind: of ``outputs.KINDS``.
            ours: names of those of the data, in order; empty if not known.

        Raises:
            ConfigError: names the first that differs, and the switch.
        """
        difference = describe_exchange(kind, weights.names(kind), ours)
        if not difference or not self.run["WEIGHTS_CLASSES"]:
            return
        text = f"{name} was trained on other {kind} than the data's: {difference}"
        if evaluation:
            order = "of the ids " if kind == "classes" else ""
            self._refuse(
                "WEIGHTS_CLASSES",
                f"{text}. The order is that {order}in 'categories': give the data the weights' "
                f"names and order, or evaluate weights of these {kind}",
                "if the names differ in spelling alone",
            )
        predictors = [parameter for parameter in coverage.loaded if is_predictor(parameter, kind)]
        coverage.missing += predictors
        for parameter in predictors:
            del coverage.loaded[parameter]
        logger.warning(
            f"{text}: its predictors are left out; to keep them, set "
            f"{self.run.keys['WEIGHTS_CLASSES']} False"
        )

    def _check_biases(self, coverage: Coverage, name: str) -> None:
        def biased(names: list[str]) -> list[str]:
            """The layers of the biases among ``names`` of which weight and norm are loaded."""
            layers = [n.removesuffix(".bias") for n in names if n.endswith(".bias")]
            loaded = coverage.loaded.keys()
            return [n for n in layers if {f"{n}.weight", f"{n}.norm.weight"} <= loaded]

        if layers := biased(coverage.unexpected):
            self._refuse(
                "WEIGHTS_NORM",
                f"{name} was trained with a bias in front of the norm in {len(layers)} layers that "
                f"have none here, such as {layers[0]}. Name a config of configs/tensorpack, or "
                "other weights",
            )
        if layers := biased(coverage.missing):
            self._refuse(
                "WEIGHTS_NORM",
                f"{name} was trained without a bias in front of the norm in {len(layers)} layers "
                f"that have one here, such as {layers[0]}, and with ReLU behind it. Name a config "
                "that is not of configs/tensorpack, or other weights",
            )

    def _check_group_norms(
        self, weights: Weights, modules: dict[str, nn.Module], name: str
    ) -> None:
        group_norms = {n: m for n, m in modules.items() if isinstance(m, nn.GroupNorm)}
        if not group_norms:
            return
        origin, ours = weights.origin, variants_in(modules.values())
        theirs = origin.weight_standardization
        if theirs is None and (ours != {""} or weights.format != "Detectron2"):
            logger.warning(
                f"{name} does not tell whether its convolutions were standardized. The model has "
                f"{_variant(*ours)}: set {self.run.keys['weight_standardization']} to what they "
                "were trained with"
            )
        if theirs is not None and ours != {theirs}:
            self._refuse(
                "WEIGHTS_NORM",
                f"{name} was trained with {_variant(theirs)}, but the model has "
                f"{_variant(*ours)}: set {self.run.keys['weight_standardization']} to {theirs!r}",
            )
        for layer, norm in group_norms.items():
            ours = norm.num_groups, norm.num_channels // norm.num_groups
            if ours != (origin.num_groups or ours[0], origin.channels_per_group or ours[1]):
                theirs = f"{origin.num_groups} groups"
                if not origin.num_groups:
                    theirs = f"{origin.channels_per_group} channels per group"
                self._refuse(
                    "WEIGHTS_NORM",
                    f"{layer} has {ours[0]} groups of {ours[1]} channels, but {name} was trained "
                    f"with {theirs}: set {self.run.keys['num_groups']} accordingly",
                )

    def _check_backbone(self, coverage: Coverage, exempt: list[str], name: str) -> None:
        lacking = [n for n in coverage.lacking(BACKBONE) if n not in exempt]
        # A deeper network has further blocks in the stages; a classifier at its end is no matter.
        stages = {s for n in coverage.shapes for s in re.findall(r"\bres\d(?=\.)", n)}
        blocks = [re.search(r"\b(res\d)\.\d+\.conv\d\.weight", n) for n in coverage.unexpected]
        further = [match.string for match in blocks if match and match[1] in stages]
        if not lacking and not further:
            return
        how = f"it does not have, or not in this shape, {len(lacking)} of its parameters, such as "
        if not lacking:
            how = f"it has {len(further)} further layers, such as "
        self._refuse(
            "WEIGHTS_COVERAGE",
            f"{name} is of another backbone than the model's: {how}{(lacking or further)[0]}. Name "
            "the config of its architecture (MODEL.RESNETS), or other weights",
            "to go on with what fits",
        )


def bn_into_gn(coverage: Coverage, model: nn.Module) -> list[str]:
    """The layers of ``model`` that are GN, or LN2d, and BN in the weights of ``coverage``."""
    ours = nn.GroupNorm, nn.LayerNorm
    modules = model.named_modules()
    return [n for n, m in modules if isinstance(m, ours) and n in coverage.batch_norms]


def norms_of(model: nn.Module) -> dict[str, str | int | None]:
    """The fields of an :class:`Origin` that say what the norms of ``model`` compute."""
    norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    groups = {norm.num_groups for norm in norms}
    channels = {norm.num_channels // norm.num_groups for norm in norms}
    return {
        "weight_standardization": only(variants_in(model.modules())),
        "num_groups": only(groups),
        "channels_per_group": only(channels) if len(groups) > 1 else None,
    }


def _variant(*variants: str) -> str:
    named = " and ".join(filter(None, variants))
    return f"Weight Standardization ({named})" if named else "no Weight Standardization"


def _equal(a, b) -> bool:
    """Whether two values of a field agree; None agrees with all."""
    return None in (a, b) or (a == b if isinstance(a, str) else same(a, b))


def _plain(value) -> str:
    return value if isinstance(value, str) else str(list(value))
