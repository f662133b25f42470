"""Weights of any source, in Detectron2's names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from ..origin import Origin


@dataclasses.dataclass
class Weights:
    """Weights in Detectron2's names.

    Args:
        format: whose names the file had: ``"Detectron2"``, ``"Detectron"``, ``"torchvision"``,
            ``"maskrcnn-benchmark"``, ``"mmdetection"``, ``"tensorpack"`` or ``"timm"``.
        state: name -> tensor.
        partial: the names lack the beginning that they have in a detector, such as
            ``backbone.bottom_up.`` of ``stem.conv1.weight``.
        origin: what is known of the network that they were trained in.
        batch_norms: names of the layers that are BN.
        left_out: names in the file of what no detector has, such as a classifier.
        rest: the other content of a training checkpoint: ``iteration``, ``trainer``, ...
    """

    format: str
    state: dict[str, torch.Tensor]
    partial: bool = True
    origin: Origin = Origin()
    batch_norms: set[str] = dataclasses.field(default_factory=set)
    left_out: list[str] = dataclasses.field(default_factory=list)
    rest: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        layers = (name.rpartition(".") for name in self.state)
        self.batch_norms |= {layer for layer, _, name in layers if name == "running_mean"}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.state.items()}

    def names(self, kind: str) -> list[str]:
        """Of the ``"classes"`` or the ``"keypoints"`` that they were trained on, in order; empty if
        not known."""
        names = self.rest.get(kind)
        return [str(name) for name in names] if isinstance(names, (list, tuple)) else []

    @property
    def progress(self) -> dict[str, Any]:
        """The last ``iteration`` of their training, from 0, and the ``metrics`` of their evaluation
        (``bbox/AP`` -> float), as far as they are known."""
        iteration, metrics = self.rest.get("iteration"), self.rest.get("metrics")
        known: dict[str, Any] = {"iteration": iteration} if isinstance(iteration, int) else {}
        if isinstance(metrics, Mapping):
            numbers = {str(k): v for k, v in metrics.items() if isinstance(v, (int, float))}
            known["metrics"] = numbers
        return known
