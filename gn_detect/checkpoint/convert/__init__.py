"""Weights of any source in Detectron2's names; one file for each foreign format.

The format is told by the names in a file, not by its name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..origin import Origin
from ..safe_load import WeightsError, check_finite, load_file
from ..sources import locate
from . import detectron, mmdetection, resnetv2, torchvision
from .weights import Weights

__all__ = ["Weights", "convert", "read_weights"]

_DETECTORS = ("backbone.", "proposal_generator.", "roi_heads.", "head.", "sem_seg_head.")


def read_weights(name: str) -> Weights:
    """Weights by a name that ``sources.locate`` knows.

    Raises:
        WeightsError: they cannot be found, read, trusted or recognized.
    """
    source = locate(name)
    weights = convert(load_file(source.path), name)
    check_finite(weights.state, name)
    weights.origin = weights.origin.completed_by(source.origin)
    weights.partial |= source.matching_heuristics
    return weights


def convert(content: Any, name: str) -> Weights:
    """Weights from the content of a file.

    Args:
        content: a mapping of names to tensors or arrays, or one that has it under ``model``,
            ``state_dict`` or ``blobs``.
        name: of the file, for messages.

    Raises:
        WeightsError: no network of a known layout is in it.
    """
    state, rest = _state(content, name)
    names = state.keys()
    if detectron.recognizes(names):
        return detectron.convert(state)
    if mmdetection.recognizes(names):
        return mmdetection.convert(state, rest.get("meta") or {})
    if torchvision.recognizes(names):
        return torchvision.convert(state)
    if resnetv2.recognizes(names):
        return resnetv2.convert(state)
    backbone = "stem.conv1.weight" in names
    if backbone or any(n.startswith(_DETECTORS) for n in names):
        known = _known(rest, name)
        partial = backbone or bool(known["matching_heuristics"])
        return Weights("Detectron2", state, partial, Origin.from_dict(known["origin"]), rest=rest)
    raise WeightsError(
        f"{name}: its names ({', '.join(list(names)[:3])}, ...) are not those of a ResNet or an "
        "R-CNN of Detectron2, Detectron, mmdetection, torchvision or timm"
    )


def _state(content: Any, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The names and tensors in the content of a file, and the rest of it."""
    rest = {}
    for key in ("model", "state_dict", "blobs"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            rest = {k: v for k, v in content.items() if k != key}
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{name}: there are no weights in it: no mapping of names to tensors")
    wrapped = all(str(key).startswith("module.") for key in content)  # for training
    state = {}
    for key, value in content.items():
        value = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise WeightsError(
                f"{name}: {key!r} in it is a {type(value).__name__}, not a tensor; weights are a "
                "mapping of names to tensors, alone or under model, state_dict or blobs"
            )
        state[key.removeprefix("module.") if wrapped else key] = value
    return state, rest


def _known(rest: dict[str, Any], name: str) -> dict[str, Any]:
    """What is saved with weights of Detectron2's names: beside them, or in the metadata of
    safetensors, as JSON."""
    known = {"origin": {}, "matching_heuristics": False}
    known |= {key: rest.pop(key) for key in known if rest.get(key)}
    metadata = rest.pop("metadata", {})
    try:
        known |= {
            k: json.loads(metadata[f"gn_detect.{k}"]) for k in known if f"gn_detect.{k}" in metadata
        }
        Origin.from_dict(known["origin"])
    except (AttributeError, TypeError, ValueError) as error:
        raise WeightsError(f"{name}: the origin of its weights cannot be read ({error})") from None
    return known
