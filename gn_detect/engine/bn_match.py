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
from gn_detect.settings import is_retinanet

from .prepare import classes_from_weights

_GN_KINDS = ("GN", "LN", "IN")


@dataclasses.dataclass(frozen=True)
class _Part:
    """A part of a detector, which is converted as a whole or starts afresh as a whole.

    Args:
        keys: of its norms.
        calibrated: whether each of its norms is called once per image or RoI. RPN, RetinaNet's
            head and the semantic head share one norm among levels, or are not run here.
        of_rois: whether it is calibrated on what FPN and RPN give it.
    """

    keys: tuple[str, ...]
    calibrated: bool = True
    of_rois: bool = False


# By their names in coverage.component_of.
_PARTS = {
    "FPN": _Part(("MODEL.FPN.NORM",)),
    BACKBONE: _Part(("MODEL.RESNETS.NORM",)),
    "RPN": _Part(("MODEL.RPN.NORM",), calibrated=False),
    "box head": _Part(("MODEL.ROI_BOX_HEAD.NORM",), of_rois=True),
    "mask head": _Part(
        ("MODEL.ROI_MASK_HEAD.NORM", "MODEL.ROI_MASK_HEAD.DECONV_NORM"), of_rois=True
    ),
    "keypoint head": _Part(("MODEL.ROI_KEYPOINT_HEAD.NORM",), of_rois=True),
    "RetinaNet head": _Part(("MODEL.RETINANET.NORM",), calibrated=False),
    "semantic head": _Part(("MODEL.SEM_SEG_HEAD.NORM",), calibrated=False),
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
    _check_config(cfg)
    cfg = cfg.clone()
    loaded = read_weights(weights)
    if variant := loaded.origin.weight_standardization:
        raise ConfigError(
            f"{weights} was trained with Weight Standardization ({variant}), without which its "
            "convolutions compute something else; give weights that were trained without it"
        )
    classes_from_weights(cfg, loaded)
    target = build_model(cfg).eval()
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


def _norm_keys(cfg: CfgNode) -> list[str]:
    """The keys of the norms that the model of ``cfg`` has."""
    model, retinanet = cfg.MODEL, is_retinanet(cfg)
    present = {
        "MODEL.RESNETS.NORM": True,
        "MODEL.FPN.NORM": bool(model.FPN.IN_FEATURES),
        "MODEL.RETINANET.NORM": retinanet,
        "MODEL.RPN.NORM": not retinanet,
        "MODEL.ROI_BOX_HEAD.NORM": not retinanet and model.ROI_BOX_HEAD.NUM_CONV > 0,
        "MODEL.ROI_MASK_HEAD.NORM": model.MASK_ON and model.ROI_MASK_HEAD.NUM_CONV > 0,
        "MODEL.ROI_MASK_HEAD.DECONV_NORM": model.MASK_ON,
        "MODEL.ROI_KEYPOINT_HEAD.NORM": model.KEYPOINT_ON,
        "MODEL.SEM_SEG_HEAD.NORM": model.META_ARCHITECTURE == "PanopticFPN",
    }
    return [key for key, there in present.items() if there]


def _gn_keys(cfg: CfgNode) -> list[str]:
    places = {key: locate(cfg, key) for key in _norm_keys(cfg)}
    return [key for key, (node, name) in places.items() if node[name] in _GN_KINDS]


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
        layers = {layer for layer in _group_norms(target) if component_of(layer) == name}
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
    for name, part in _PARTS.items():
        todo = [
            layer
            for layer in _group_norms(target)
            if component_of(layer) == name and not isinstance(modules.get(layer), nn.GroupNorm)
        ]
        added = [layer for layer in todo if layer not in modules]
        convs = [modules.get(layer.removesuffix(".norm")) for layer in added]
        needed = {name, "FPN", "RPN"} if part.of_rois else {name}
        if not todo:
            continue
        if (
            not part.calibrated
            or needed & lacking
            or any(getattr(conv, "norm", "") is not None for conv in convs)
        ):
            fresh.append(name)
            continue
        for conv in convs:
            conv.norm = nn.Identity()
        layers += todo
    return layers, fresh
