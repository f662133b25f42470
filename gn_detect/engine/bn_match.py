"""The BN network that weights belong to, beside the GN network of a config: what fits what."""

from __future__ import annotations

import dataclasses

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from gn_detect.checkpoint import WeightGuards, Weights, read_weights
from gn_detect.checkpoint.coverage import BACKBONE, Coverage, component_of, cover
from gn_detect.checkpoint.weight_guards import bn_into_gn
from gn_detect.config import ConfigError, locate
from gn_detect.modeling.norm import weight_standardization_from_config

from .follow_data import outputs_from_weights

_GN_KINDS = ("GN", "LN", "IN")
# The parts of a detector, by their names in coverage.component_of, and the keys of their norms. A
# part is converted as a whole or starts afresh as a whole.
_PARTS = {
    "FPN": ["MODEL.FPN.NORM"],
    BACKBONE: ["MODEL.RESNETS.NORM"],
    "RPN": ["MODEL.RPN.NORM"],
    "box head": ["MODEL.ROI_BOX_HEAD.NORM"],
    "mask head": ["MODEL.ROI_MASK_HEAD.NORM", "MODEL.ROI_MASK_HEAD.DECONV_NORM"],
    "keypoint head": ["MODEL.ROI_KEYPOINT_HEAD.NORM"],
    "RetinaNet head": ["MODEL.RETINANET.NORM"],
    "semantic head": ["MODEL.SEM_SEG_HEAD.NORM"],
}
# Not calibrated: these share one norm among levels, or are not run here.
_AFRESH = ("RPN", "RetinaNet head", "semantic head")
# Calibrated on what these give them.
_NEEDED = dict.fromkeys(("box head", "mask head", "keypoint head"), {"FPN", "RPN"})


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
        lacking: the parts that the weights do not hold, or not all of: random in ``source``.
    """

    source: nn.Module
    target: nn.Module
    layers: list[str]
    kept: dict[str, Tensor]
    fresh: list[str]
    lacking: set[str]


def load_pair(cfg: CfgNode, weights: str) -> Pair:
    """Build both networks, and load the weights into both.

    The BN network is that of ``cfg`` with BN, part by part, wherever the weights have it, and no
    norm where they have none.

    Args:
        cfg: of the GN network; ``NUM_CLASSES`` may be None and then follows the weights.
        weights: any name of weights that ``sources.locate`` knows.

    Raises:
        ConfigError: the weights are not of this network with BN, or were trained with Weight
            Standardization; GN that they have is of other groups; or the config is not of GN.
    """
    if variant := weight_standardization_from_config(cfg):
        raise ConfigError(
            f"MODEL.GN.WEIGHT_STANDARDIZATION is {variant!r}: it changes every convolution, and "
            "those of a BN network were not trained so; set it to '' and convert again"
        )
    cfg = cfg.clone()
    loaded = read_weights(weights)
    if variant := loaded.origin.weight_standardization:
        raise ConfigError(
            f"{weights} was trained with Weight Standardization ({variant}), without which its "
            "convolutions compute something else; give weights that were trained without it"
        )
    outputs_from_weights(cfg, loaded)
    target = build_model(cfg).eval()
    if not _group_norms(target):
        raise ConfigError(
            "no norm of the config is GN, LN or IN, so there is nothing to convert to; set "
            "MODEL.RESNETS.NORM GN"
        )
    source_cfg = _source_config(cfg, target, loaded, weights)
    source = build_model(source_cfg).eval()
    coverage = cover(loaded, source)
    absent = _absent(coverage, weights)
    WeightGuards.from_config(source_cfg).check(loaded, coverage, source, weights)
    source.load_state_dict(coverage.loaded, strict=False)
    lacking = {component_of(name) for name in absent}
    layers, fresh = _match(source, target, lacking)
    known, norms = source.state_dict(), set(layers)
    kept = {
        name: known[name]
        for name in target.state_dict()
        if name in known
        and name not in absent
        and name.rpartition(".")[0] not in norms
        and component_of(name) not in fresh
    }
    target.load_state_dict(kept, strict=False)
    return Pair(source, target, layers, kept, fresh, lacking)


def _source_config(cfg: CfgNode, target: nn.Module, weights: Weights, file: str) -> CfgNode:
    """``cfg`` with the norms that the weights have, part by part."""
    coverage = cover(weights, target)
    bn = set(bn_into_gn(coverage, target))
    # A RetinaNet's head without norms has convolutions by the names of norms.
    gammas = {name for name, shape in coverage.mismatched.items() if len(shape) == 1}
    gammas |= coverage.loaded.keys()
    gn = {layer for layer in _group_norms(target) if f"{layer}.weight" in gammas} - bn
    if not bn:
        raise ConfigError(
            f"{file} has GN already: load it with MODEL.WEIGHTS of tools/train_net.py"
            if gn
            else f"{file} has no BN in any layer that is GN here: there is nothing to convert"
        )
    # BN that was frozen while training does not count its batches.
    tracked = any(name.endswith("num_batches_tracked") for name in weights.state)
    source = cfg.clone()
    for part, keys in _PARTS.items():
        layers = set(_group_norms(target, part))
        for node, last in (locate(source, key) for key in keys):
            if node[last] not in _GN_KINDS:
                continue
            if layers & bn:
                node[last] = "BN" if tracked else "FrozenBN"
            elif not layers & gn:
                node[last] = ""
    return source


def _group_norms(model: nn.Module, part: str = "") -> list[str]:
    """The names of GN layers: of a part, or all."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.GroupNorm)]
    return [name for name in names if part in ("", component_of(name))]


def _absent(coverage: Coverage, weights: str) -> list[str]:
    """The parameters of the BN network that the weights lack.

    Raises:
        ConfigError: the weights are of another network.
    """
    for name, theirs in coverage.mismatched.items():
        if component_of(name) != "RetinaNet head":  # which starts afresh
            raise ConfigError(
                f"{name} has the shape {list(theirs)} in {weights}, {list(coverage.shapes[name])} "
                "in the config's network. Give the config the sizes of the weights; leave "
                "NUM_CLASSES out, and it follows them"
            )
    if backbone := [name for name in coverage.missing if component_of(name) == BACKBONE]:
        raise ConfigError(
            f"{weights} lacks {len(backbone)} tensors of the backbone, such as {backbone[0]}: it "
            "is of another network than the config's (MODEL.RESNETS)"
        )
    return [*coverage.missing, *coverage.mismatched]


def _match(source: nn.Module, target: nn.Module, lacking: set[str]) -> tuple[list[str], list[str]]:
    """Find the GN layers to calibrate, and the parts that start afresh.

    Where the BN network has no norm, an identity takes its place, in ``source``.
    """
    modules = dict(source.named_modules())
    layers, fresh = [], []
    for part in _PARTS:
        todo = _group_norms(target, part)
        todo = [name for name in todo if not isinstance(modules.get(name), nn.GroupNorm)]
        added = [name for name in todo if name not in modules]
        convs = [modules.get(name.removesuffix(".norm")) for name in added]
        needed = {part} | _NEEDED.get(part, set())
        if not todo:
            continue
        if (
            part in _AFRESH
            or needed & lacking
            or any(getattr(conv, "norm", "") is not None for conv in convs)
        ):
            fresh.append(part)
            continue
        for conv in convs:
            conv.norm = nn.Identity()
        layers += todo
    return layers, fresh
