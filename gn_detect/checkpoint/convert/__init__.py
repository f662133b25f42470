"""Weights of any source in Detectron2's names; one file for each foreign format.

The format is told by the names in a file, not by its name.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch

from ..origin import Origin
from ..safe_load import WeightsError, check_finite, load_file
from ..sources import locate
from . import detectron, maskrcnn_benchmark, mmdetection, resnetv2, tensorpack, torchvision
from .weights import Weights

__all__ = ["Weights", "convert", "read_weights"]

logger = logging.getLogger(__name__)

# maskrcnn-benchmark before torchvision, whose detectors have the same names for the stages.
_LAYOUTS = mmdetection, maskrcnn_benchmark, torchvision, detectron, resnetv2, tensorpack
_DETECTORS = ("backbone.", "proposal_generator.", "roi_heads.")
_WRAPPERS = ("module.", "_orig_mod.", "model.")  # of DDP, torch.compile, Lightning's users
# What only Detectron2 and this project save beside a model.
_CHECKPOINT = ("__author__", "iteration", "matching_heuristics", "origin", "trainer")
# What is beside the model in a .pth, and in the metadata of a safetensors file.
_AS_JSON = ("origin", "matching_heuristics", "batch_norms", "classes", "keypoints")
_AS_JSON += ("iteration", "metrics")


def read_weights(name: str, model_names: Collection[str] = ()) -> Weights:
    """Weights by a name that ``sources.locate`` knows.

    Args:
        model_names: of the parameters that they are for. Weights of a layout that is not known are
            taken as they are where one of their names is among these.

    Raises:
        WeightsError: they cannot be found, read, trusted or recognized.
    """
    source = locate(name)
    weights = convert(load_file(source.path), name, model_names, source.matching_heuristics)
    check_finite(weights.state, name)
    if source.origin and weights.format != "Detectron2":  # whose file states its origin
        weights.origin = source.origin.completed_by(weights.origin)
    else:
        weights.origin = weights.origin.completed_by(source.origin)
    return weights


def convert(
    content: Any, name: str, model_names: Collection[str] = (), partial: bool = False
) -> Weights:
    """Weights from the content of the file ``name``.

    Args:
        content: a mapping of names to tensors or arrays, or one that has it under ``model``,
            ``model_state``, ``state_dict`` or ``blobs``.
        model_names: of :func:`read_weights`.
        partial: of :class:`Weights`, as far as it is known already.

    Raises:
        WeightsError: no network of a known layout is in it.
    """
    state, rest, ours = _state(content, name, model_names)
    names = state.keys()
    more = {mmdetection: [rest.get("meta")], torchvision: ["linear.weight" in model_names]}
    layout = next((layout for layout in _LAYOUTS if layout.recognizes(names)), None)
    if layout and not ours:
        stated = _pop_origin(rest, name)
        try:
            weights = layout.convert(state, *more.get(layout, ()))
            weights.origin = stated.completed_by(weights.origin)
            rpn = any("rpn_head" in n for n in weights.state)
            if rpn and layout in (detectron, maskrcnn_benchmark):
                logger.info(f"{name}: its anchors and RoIAlign are those of configs/Detectron")
            return weights
        except WeightsError as error:
            reason = str(error)
        except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            reason = (
                f"by some names it is of {layout.__name__.rpartition('.')[2]}, but others or their "
                f"shapes are not ({type(error).__name__}: {error}). Use the file as it was written"
            )
        raise WeightsError(f"{name}: {reason}")
    backbone = "stem.conv1.weight" in names
    detector = backbone or any(n.startswith(_DETECTORS) for n in names)
    checkpoint = partial or any(key in rest for key in _CHECKPOINT)
    if detector or checkpoint or not names.isdisjoint(model_names):
        partial |= backbone or bool(rest.pop("matching_heuristics", False))
        batch_norms = rest.pop("batch_norms", None)
        batch_norms = set(map(str, batch_norms)) if isinstance(batch_norms, list) else set()
        origin = _pop_origin(rest, name)
        return Weights("Detectron2", state, partial, origin, batch_norms, rest=rest)
    raise WeightsError(
        f"{name}: its names ({', '.join(list(names)[:3])}, ...) are not those of a ResNet or an "
        "R-CNN of Detectron2, Detectron, maskrcnn-benchmark, mmdetection, tensorpack, torchvision "
        "or timm"
    )


def _state(
    content: Any, name: str, model_names: Collection[str]
) -> tuple[dict[str, torch.Tensor], dict[str, Any], bool]:
    """The names and tensors in the content of a file, the rest of it, and whether it is a
    checkpoint of ours with the names of its model, whatever they are."""
    rest = {}
    for key in ("model", "model_state", "state_dict", "blobs"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            rest = {k: v for k, v in content.items() if k != key}
            if key == "model_state":  # of pycls, whose names Detectron2 matches by their ends
                rest["matching_heuristics"] = True
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{name}: there are no weights in it: no mapping of names to tensors")
    # Where it is that of safetensors.
    metadata = rest.get("metadata")
    for key in _AS_JSON:
        if isinstance(metadata, Mapping) and f"gn_detect.{key}" in metadata:
            try:
                rest[key] = json.loads(metadata[f"gn_detect.{key}"])
            except (TypeError, ValueError, RecursionError):
                raise WeightsError(f"{name}: gn_detect.{key} in its metadata is no JSON") from None
    if isinstance(metadata, Mapping) and "gn_detect.config" in metadata:
        rest["config"] = metadata["gn_detect.config"]
    # For a model that has none of its names, it is what they say.
    ours = "origin" in rest and not (model_names and content.keys().isdisjoint(model_names))
    prefix, wrappers = "", () if ours else _WRAPPERS
    while wrapper := [w for w in wrappers if all(str(n).startswith(prefix + w) for n in content)]:
        prefix += wrapper[0]
    if prefix:
        logger.info(f"{name}: the prefix {prefix!r} of all its names is left out")
    state = {}
    for key, value in content.items():
        kind = f"a {type(value).__name__}, not a tensor" if isinstance(key, str) else "no name"
        if isinstance(value, np.ndarray):
            kind = f"an array of {value.dtype!r}, a type PyTorch does not have: save it as float32"
            with contextlib.suppress(TypeError, ValueError):
                value = torch.from_numpy(value)
        if str(key).endswith("_extra_state"):  # of a module that saves more than tensors
            logger.warning(f"{name}: {key} is no tensor, and is left out")
            continue
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise WeightsError(
                f"{name}: {key!r} in it is {kind}; weights are a mapping of names to tensors, "
                "alone or under model, model_state, state_dict or blobs"
            )
        state[key.removeprefix(prefix)] = value
    return state, rest, ours


def _pop_origin(rest: dict[str, Any], name: str) -> Origin:
    """What Checkpointer has saved of the origin."""
    origin = rest.pop("origin", None)
    try:
        return Origin.from_dict(origin) if isinstance(origin, Mapping) else Origin()
    except ValueError as error:
        raise WeightsError(
            f"{name}: what it says of the origin of its weights is wrong ({error}); leave that out"
        ) from None
