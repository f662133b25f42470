"""Which weights go where in a model, and how much of it they cover."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import torch
from tabulate import tabulate
from torch import nn

from .convert.weights import Weights

BACKBONE = "backbone"
# First match of a parameter's name; the last stage of C4 models is in roi_heads.
_COMPONENTS = {
    r"backbone\.(fpn_|top_block)": "FPN",
    r"(backbone|roi_heads\.res5|stem|res\d)\.": BACKBONE,
    r"proposal_generator\.": "RPN",
    r"roi_heads\.box_": "box head",
    r"roi_heads\.mask_": "mask head",
    r"roi_heads\.keypoint_": "keypoint head",
    r"sem_seg_head\.": "semantic head",
    r"head\.": "RetinaNet head",
}
_STATISTICS = r".*\.(running_mean|running_var|num_batches_tracked)"  # not trained
# Constants that old checkpoints of Detectron2 have; the config gives them.
_CONSTANTS = r"pixel_mean|pixel_std|.*anchor_generator\.cell_anchors.*"


@dataclasses.dataclass
class Coverage:
    """What of a model a file of weights gives.

    Args:
        loaded: parameter or buffer of the model -> its tensor.
        missing: parameters of the model that are not in the file.
        mismatched: parameter of the model -> its shape in the file.
        unexpected: names in the file that the model does not have.
        statistics: means and variances of BN in the model that are not in the file, but for those
            of layers that have them folded into gamma and beta there.
        shapes: of all parameters of the model.
        batch_norms: layers of the model that are BN in the file.
    """

    loaded: dict[str, torch.Tensor]
    missing: list[str]
    mismatched: dict[str, tuple[int, ...]]
    unexpected: list[str]
    statistics: list[str]
    shapes: dict[str, tuple[int, ...]]
    batch_norms: set[str]

    def lacking(self, component: str) -> list[str]:
        """The parameters of ``component`` that are not loaded."""
        names = [*self.missing, *self.mismatched]
        return [name for name in names if component_of(name) == component]

    @property
    def afresh(self) -> list[str]:
        """All that the file does not give: parameters and statistics of the model."""
        return [*(name for name in self.shapes if name not in self.loaded), *self.statistics]

    def describe_afresh(self) -> str:
        """The components that the file gives nothing of, and the layers that others lack."""
        layers = defaultdict(dict)
        for name in self.afresh:
            layers[component_of(name)][name.rpartition(".")[0]] = None
        given = {component_of(name) for name in self.loaded}
        return "; ".join(
            f"{component} ({_shorten(list(names), 4)})" if component in given else component
            for component, names in layers.items()
        )

    def __str__(self) -> str:
        """A table of the components, and the names of what is not loaded."""
        sizes = defaultdict(lambda: np.zeros(5, dtype=np.int64))
        for name, shape in self.shapes.items():
            size, loaded = math.prod(shape), name in self.loaded
            counts = [loaded, name in self.missing, name in self.mismatched]
            sizes[component_of(name)] += [size, size * loaded, *counts]
        rows = [
            # Rounded down: 100 % is all.
            (component, f"{total:,}", f"{10000 * loaded // max(total, 1) / 100:.2f} %", *counts)
            for component, (total, loaded, *counts) in sizes.items()
        ]
        table = tabulate(
            rows,
            ["component", "parameters", "loaded", "tensors", "missing", "other shape"],
            tablefmt="github",
            disable_numparse=True,
            colalign=("left", *["right"] * 5),
        )
        lines = [
            f"other shape: {name}: {list(theirs)} in the file, {list(self.shapes[name])} in the "
            "model"
            for name, theirs in self.mismatched.items()
        ]
        for what, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                lines.append(f"{what}: {_shorten(names)}")
        return "\n".join([table, *lines])


def cover(weights: Weights, model: nn.Module) -> Coverage:
    """Match ``weights`` with the parameters and buffers of ``model``.

    Where ``weights.partial``, a name in the file stands for the one name of the model that ends
    with it; if the model has several (the stages of a cascade), it is left out.
    """
    theirs = {n: t for n, t in weights.state.items() if not re.fullmatch(_CONSTANTS, n)}
    ours = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, torch.Tensor) and not re.fullmatch(_CONSTANTS, name)
    }
    places = {name: name for name in theirs.keys() & ours.keys()}
    if weights.partial:
        candidates = defaultdict(list)
        for name in ours:
            ends = (name[match.end() :] for match in re.finditer(r"^|\.", name))
            if end := next((end for end in ends if end in theirs), None):  # the longest
                candidates[end].append(name)
        places = {end: names[0] for end, names in candidates.items() if len(names) == 1}
    matched = {place: theirs[name] for name, place in places.items()}
    trained = {n: shape for n, shape in ours.items() if not re.fullmatch(_STATISTICS, n)}
    batch_norms = {
        place.rpartition(".")[0]
        for name, place in places.items()
        if name.rpartition(".")[0] in weights.batch_norms
    }
    fits = {name: tuple(matched[name].shape) == ours[name] for name in ours if name in matched}
    loaded = {name: matched[name] for name, fit in fits.items() if fit}
    folded = {layer for layer in batch_norms if f"{layer}.running_mean" not in matched}
    return Coverage(
        loaded=loaded,
        missing=[name for name in trained if name not in matched],
        mismatched={name: tuple(matched[name].shape) for name, fit in fits.items() if not fit},
        unexpected=[name for name in theirs if name not in places],
        statistics=[
            name
            for name in ours
            if name.endswith((".running_mean", ".running_var"))
            and name not in loaded
            and name.rpartition(".")[0] not in folded
        ],
        shapes=trained,
        batch_norms=batch_norms,
    )


def num_classes(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The number of classes of a detector.

    Args:
        shapes: name -> shape, of its parameters. The names may lack their beginning.

    Returns:
        that of its box predictor (the first one of a cascade) or of its RetinaNet head; None where
        it has neither.
    """
    rows = {name: shape[0] for name, shape in shapes.items() if any(shape[:1])}
    for name, count in rows.items():
        if re.search(r"\bbox_predictor\.(\d\.)?cls_score\.weight$", name):
            return count - 1  # the last is the background
        if name == "head.cls_score.weight" and (boxes := rows.get("head.bbox_pred.weight")):
            return 4 * count // boxes  # both for each anchor
    return None


def num_keypoints(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The number of keypoints of a detector with such ``shapes``; None where it has none."""
    heads = (s for n, s in shapes.items() if n.endswith("keypoint_head.score_lowres.weight"))
    return next((shape[1] for shape in heads if len(shape) > 1), None)  # of a transposed conv


def component_of(name: str) -> str:
    """The part of a detector that the parameter ``name`` belongs to."""
    components = (part for pattern, part in _COMPONENTS.items() if re.match(pattern, name))
    return next(components, name.split(".")[0])


def _shorten(names: list[str], count: int = 8) -> str:
    more = f", and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
