"""The BN network that weights belong to, beside the GN network of a config: what fits what."""

from __future__ import annotations

import dataclasses
import re

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from gn_detect.checkpoint import WeightGuards, Weights, read_weights
from gn_detect.checkpoint.coverage import Coverage, cover
from gn_detect.checkpoint.weight_guards import bn_into_gn
from gn_detect.config import ConfigError, locate
from gn_detect.modeling.norm import weight_standardization_from_config

from .guards import norm_keys
from .prepare import classes_from_weights

_GN_KINDS = ("GN", "LN", "IN")


@dataclasses.dataclass(frozen=True)
class _Part:
    """A part of a detector, which is converted as a whole or starts afresh as a whole.

    Args:
        names: a pattern of how the names of its parameters begin.
        keys: of its norms.
        calibrated: whether each of its norms is called once per image or RoI. RPN, RetinaNet's
            head and the semantic head share one norm among levels, or are not run here.
    """

    names: str
    keys: tuple[str, ...]
    calibrated: bool = True


# A parameter is of the first that matches its name.
_PARTS = {
    "FPN": _Part(r"backbone\.(fpn_|top_block\.)", ("MODEL.FPN.NORM",)),
    "ResNet": _Part(r"backbone\.|roi_heads\.res5\.", ("MODEL.RESNETS.NORM",)),
    "RPN": _Part(r"proposal_generator\.", ("MODEL.RPN.NORM",), calibrated=False),
    "box head": _Part(r"roi_heads\.box_", ("MODEL.ROI_BOX_HEAD.NORM",)),
    "mask head": _Part(
        r"roi_heads\.mask_", ("MODEL.ROI_MASK_HEAD.NORM", "MODEL.ROI_MASK_HEAD.DECONV_NORM")
    ),
    "keypoint head": _Part(r"roi_heads\.keypoint_", ("MODEL.ROI_KEYPOINT_HEAD.NORM",)),
    "RetinaNet head": _Part(r"head\.", ("MODEL.RETINANET.NORM",), calibrated=False),
    "semantic head": _Part(r"sem_seg_head\.", ("MODEL.SEM_SEG_HEAD.NORM",), calibrated=False),
}


@dataclasses.dataclass
class Pair:
    """Two networks in evaluation mode, and what they share.

    Attributes:
        source: with BN where the weights have it, and with the weights. Where it has no norm and
            ``target`` has GN, an identity stands in its place.
        target: with GN, and with the weights of everything else.
        layers: the names of the GN layers, in ``target``, that are BN or an identity in
            ``source``.
        kept: name -> tensor, what ``target`` has from the weights.
        fresh: the parts with GN layers that start afresh: not in the weights, or not of a kind
            that can be calibrated.
    """

    source: nn.Module
    target: nn.Module
    layers: list[str]
    kept: dict[str, Tensor]
    fresh: list[str]


def load_pair(cfg: CfgNode, weights: str) -> Pair:
    """Build both networks, and load the weights into both.

    The BN network is that of ``cfg`` with BN, part by part, wherever the weights have it, and no
    norm where they have none.

    Args:
        cfg: of the GN network; ``NUM_CLASSES`` may be None and then follows the weights.
        weights: any name of weights that ``sources.locate`` knows.

    Raises:
        ConfigError: the weights are not of this network with BN, or the config is not of GN.
    """
    _check_config(cfg)
    cfg = cfg.clone()
    loaded = read_weights(weights)
    classes_from_weights(cfg, loaded)
    target = build_model(cfg).eval()
    source_cfg = _source_config(cfg, target, loaded, weights)
    WeightGuards.from_config(source_cfg).check_origin(loaded.origin, weights)
    source = build_model(source_cfg).eval()
    coverage = cover(loaded, source)
    absent = _absent(coverage, weights)
    source.load_state_dict(coverage.loaded, strict=False)
    layers, fresh = _match(source, target, absent)
    known, norms = source.state_dict(), set(layers)
    kept = {
        name: known[name]
        for name in target.state_dict()
        if name in known
        and name not in absent
        and name.rpartition(".")[0] not in norms
        and _part_of(name) not in fresh
    }
    target.load_state_dict(kept, strict=False)
    return Pair(source, target, layers, kept, fresh)


def _check_config(cfg: CfgNode) -> None:
    if variant := weight_standardization_from_config(cfg):
        raise ConfigError(
            f"MODEL.GN.WEIGHT_STANDARDIZATION is {variant!r}: it changes every convolution, and "
            "those of a BN network were not trained so; set it to '' and convert again"
        )
    if not _gn_keys(cfg):
        raise ConfigError(
            "no norm of the config is GN, LN or IN, so there is nothing to convert to; set "
            "MODEL.RESNETS.NORM GN"
        )


def _part_of(name: str) -> str:
    return next((part for part, p in _PARTS.items() if re.match(p.names, name)), "")


def _gn_keys(cfg: CfgNode) -> list[str]:
    return [key for key in norm_keys(cfg) if _value(cfg, key) in _GN_KINDS]


def _value(cfg: CfgNode, key: str) -> str:
    node, name = locate(cfg, key)
    return node[name]


def _source_config(cfg: CfgNode, target: nn.Module, weights: Weights, file: str) -> CfgNode:
    """``cfg`` with the norms that the weights have, part by part."""
    bn = set(bn_into_gn(cover(weights, target), target))
    gammas = [name for name, tensor in weights.state.items() if tensor.dim() == 1]
    gn = {
        layer
        for layer in _group_norms(target)
        if layer not in bn and any(f".{layer}.weight".endswith(f".{name}") for name in gammas)
    }
    if not bn:
        raise ConfigError(
            f"{file} has GN already: load it with MODEL.WEIGHTS of tools/train_net.py"
            if gn
            else f"{file} has no BN in any layer that is GN here: there is nothing to convert"
        )
    # BN that was frozen while training does not count its batches.
    tracked = any(name.endswith("num_batches_tracked") for name in weights.state)
    source = cfg.clone()
    for name, part in _PARTS.items():
        layers = {layer for layer in _group_norms(target) if _part_of(layer) == name}
        for key in set(part.keys) & set(_gn_keys(cfg)):
            node, last = locate(source, key)
            if layers & bn:
                node[last] = "BN" if tracked else "FrozenBN"
            elif not layers & gn:
                node[last] = ""
    return source


def _group_norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.GroupNorm)]


def _absent(coverage: Coverage, weights: str) -> list[str]:
    """The parameters of the BN network that the weights lack.

    Raises:
        ConfigError: the weights are of another network.
    """
    for name, theirs in coverage.mismatched.items():
        if _part_of(name) != "RetinaNet head":  # which starts afresh
            raise ConfigError(
                f"{name} has the shape {list(theirs)} in {weights}, {list(coverage.shapes[name])} "
                "in the config's network. Give the config the sizes of the weights; leave "
                "NUM_CLASSES out, and it follows them"
            )
    if backbone := [name for name in coverage.missing if _part_of(name) == "ResNet"]:
        raise ConfigError(
            f"{weights} lacks {len(backbone)} tensors of the backbone, such as {backbone[0]}: it "
            "is of another network than the config's (MODEL.RESNETS)"
        )
    return [*coverage.missing, *coverage.mismatched]


def _match(source: nn.Module, target: nn.Module, absent: list[str]) -> tuple[list[str], list[str]]:
    """Find the GN layers to calibrate, and the parts that start afresh.

    Where the BN network has no norm, an identity takes its place, in ``source``.
    """
    modules = dict(source.named_modules())
    lacking = {_part_of(name) for name in absent}
    layers, fresh = [], []
    for name, part in _PARTS.items():
        todo = [
            layer
            for layer in _group_norms(target)
            if _part_of(layer) == name and not isinstance(modules.get(layer), nn.GroupNorm)
        ]
        added = [layer for layer in todo if layer not in modules]
        convs = [modules.get(layer.removesuffix(".norm")) for layer in added]
        # RoI heads are calibrated on what FPN and RPN give them.
        needed = {name, "FPN", "RPN"} if part.names.startswith("roi_heads") else {name}
        if not todo:
            continue
        if (
            not part.calibrated
            or needed & {*lacking, *fresh}
            or any(getattr(conv, "norm", "") is not None for conv in convs)
        ):
            fresh.append(name)
            continue
        for conv in convs:
            conv.norm = nn.Identity()
        layers += todo
    return layers, fresh
