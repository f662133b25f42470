"""Weights of Detectron (Caffe2): ImageNet backbones such as ``R-50-GN.pkl``, and detectors."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from detectron2.checkpoint.c2_model_loading import (
    convert_basic_c2_names,
    convert_c2_detectron_names,
)

from ..origin import DETECTRON, Origin
from .weights import Weights

_CLASSIFIER = ("linear.", "fc1000.")
# Detectron2's renaming leaves the box predictor's layers at the beginning of their names.
_BOX_PREDICTOR = r"^(?=(cls_score|bbox_pred)\.)"


def recognizes(names: Collection[str]) -> bool:
    return "res2_0_branch2a_w" in names


def convert(state: Mapping[str, torch.Tensor]) -> Weights:
    """Detectron2's renaming, which also puts the background class last, in place of first.

    Left out are the momentum of the optimizer and the classifier.
    """
    kept = {name: tensor for name, tensor in state.items() if not name.endswith("_momentum")}
    renamed, originals = (
        {re.sub(_BOX_PREDICTOR, "box_predictor.", name): value for name, value in names.items()}
        for names in convert_c2_detectron_names(kept)
    )
    # BN is folded into a scale and a bias in most files, and then has the names of GN.
    folded = convert_basic_c2_names([name for name in kept if "_bn_" in name])
    group_norm = any(name.endswith("_gn_s") for name in kept)
    # Detectron folds the statistics of BN. Where they are, others have trained with Caffe2, whose
    # pixels may be divided (Detectron2's ImageNetPretrained/FAIR/X-101-32x8d.pkl).
    others = any(".norm.running_mean" in name for name in folded)
    return Weights(
        "Detectron",
        {name: t for name, t in renamed.items() if not name.startswith(_CLASSIFIER)},
        origin=Origin(
            **{**DETECTRON, "pixel_std": None if others else DETECTRON["pixel_std"]},
            # MSRA's networks stride in the 1x1 convolution; those that Detectron trained with
            # GN do not (its configs/04_2018_gn_baselines).
            stride_in_1x1=False if group_norm else None,
            # It leaves no trace in a file, and its authors have published one in this format.
            weight_standardization=None if group_norm else "",
            num_groups=32 if group_norm else None,
        ),
        batch_norms={name.rpartition(".")[0] for name in folded},
        left_out=sorted(set(state) - set(kept))
        + [originals[name] for name in renamed if name.startswith(_CLASSIFIER)],
    )
