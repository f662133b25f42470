"""What a file of weights is, and which config takes it."""

from __future__ import annotations

import re

import torch
from detectron2.modeling import build_model

from gn_detect.checkpoint import WeightGuards, Weights
from gn_detect.checkpoint.coverage import BACKBONE, cover, num_classes
from gn_detect.checkpoint.public import PUBLIC
from gn_detect.config import ConfigError, get_config_file, load_config

from .follow_data import outputs_from_weights

# Blocks of the stages, and convolutions of a block -> depth
_DEPTHS = {((2, 2, 2, 2), 2): 18, ((3, 4, 6, 3), 2): 34, ((3, 4, 6, 3), 3): 50}
_DEPTHS |= {((3, 4, 23, 3), 3): 101, ((3, 8, 36, 3), 3): 152}
# maskrcnn-benchmark has published none.
_BENCHMARK = "R_50_FPN_gn", "R_101_FPN_gn", "R_50_FPN_gn_ws", "R_101_FPN_gn_ws"
_BENCHMARK += "X_50_32x4d_FPN_gn_ws", "X_101_32x4d_FPN_gn_ws"


def describe(weights: Weights) -> dict[str, str]:
    """What is known of it: name of a fact -> the fact."""
    origin, shapes = weights.origin, weights.shapes
    norms = {n.rpartition(".")[0] for n in shapes if re.search(r"\bnorm\d?\.weight$", n)}
    groups = f"{origin.num_groups or 'an unknown number of'} groups"
    if origin.channels_per_group:
        groups = f"{origin.channels_per_group} channels per group"
    mean, std = (
        ", ".join(f"{value:g}" for value in values) if values else "not known"
        for values in (origin.pixel_mean, origin.pixel_std)
    )
    standardized = {None: "not known", "": "none"}
    variant = origin.weight_standardization
    return {
        "names of": weights.format,
        "what": _kind(weights),
        "backbone": architecture(weights),
        "norms": f"{len(norms - weights.batch_norms)} GN of {groups}, "
        f"{len(norms & weights.batch_norms)} BN",
        "Weight Standardization": standardized.get(variant, variant),
        "classes": str(num_classes(shapes) or "none"),
        "input": f"{origin.input_format or 'order not known'}, mean {mean}, deviation {std}",
    }


def _kind(weights: Weights) -> str:
    names = " ".join(weights.state)
    if num_classes(weights.shapes) is None:
        return "no detector"
    if "box_predictor." not in names:
        return "RetinaNet"
    cascade = "Cascade " if "box_predictor.0." in names else ""
    heads = {"mask_head.": "Mask", "keypoint_head.": "Keypoint"}
    return f"{cascade}{next((heads[h] for h in heads if h in names), 'Faster')} R-CNN"


def architecture(weights: Weights) -> str:
    """Such as "ResNeXt-50 32x4d"; "none" for what is no ResNet."""
    shapes = {re.sub(r"^backbone\.(bottom_up\.)?", "", n): s for n, s in weights.shapes.items()}
    names = [m for m in (re.match(r"res(\d)\.(\d+)\.conv(\d)\.weight", n) for n in shapes) if m]
    channels, of_group = (*shapes.get("res2.0.conv2.weight", ()), 0, 0)[:2]
    if not names or not of_group:
        return "none"
    blocks = tuple(len({m[2] for m in names if m[1] == stage}) for stage in "2345")
    depth = _DEPTHS.get((blocks, max(int(m[3]) for m in names)), f"of {blocks} blocks")
    if channels != of_group:
        return f"ResNeXt-{depth} {channels // of_group}x{of_group}d"
    width = f" of {channels / 64:g} times the width" if channels != 64 else ""
    return f"{'pre-activation ' * ('res2.0.norm1.weight' in shapes)}ResNet-{depth}{width}"


def fitting_configs(weights: Weights, name: str) -> tuple[list[tuple], str]:
    """The configs of public weights of this format that take all of ``weights``, of the file
    ``name``.

    Returns:
        the (config, changes) of ``PublicWeights``, and why one that has all their layers does not
        fit.
    """
    detector = num_classes(weights.shapes) is not None
    benchmark = weights.format == "maskrcnn-benchmark"
    rows = [(f"Detectron/mask_rcnn_{n}_2x.yaml", ()) for n in _BENCHMARK if benchmark]
    rows += [
        (r.config, r.changes)
        for r in PUBLIC.values()
        # A backbone's config may take a detector whole, and compute another one.
        if r.layout == weights.format and r.is_detector() >= detector
    ]
    reason = f"no config of public weights with {weights.format}'s names has just these layers"
    found = []
    masks = not detector or any("mask_head." in n for n in weights.state)
    backbone = architecture(weights)
    for config, changes in dict.fromkeys(rows):
        opts = [*changes, "MODEL.DEVICE", "meta", "MODEL.WEIGHTS", ""]
        cfg = load_config(get_config_file(config), opts)
        if f"-{cfg.MODEL.RESNETS.DEPTH}" not in backbone:
            continue  # without building it
        if cfg.MODEL.MASK_ON and not masks:
            cfg.MODEL.MASK_ON, changes = False, (*changes, "MODEL.MASK_ON", False)
        outputs_from_weights(cfg, weights)
        with torch.device("meta"):
            model = build_model(cfg)
        coverage = cover(weights, model)
        lacking = coverage.afresh if detector else coverage.lacking(BACKBONE)
        if lacking or coverage.unexpected:
            continue
        try:
            WeightGuards.from_config(cfg).check(weights, coverage, model, name)
            found.append((config, changes))
        except ConfigError as error:
            reason = str(error)
    return found, reason
