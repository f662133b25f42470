"""Detectron2's checkpointer, which knows what weights were trained with."""

from __future__ import annotations

import dataclasses
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from .origin import Origin
from .weight_guards import WeightGuards


class Checkpointer(DetectionCheckpointer):
    """Saves the :class:`Origin` of the weights with them, and looks at what it loads.

    Args:
        model: also wrapped for distributed training.
        save_dir: of the checkpoints.
        guards: of the run.
        **checkpointables: of DetectionCheckpointer.
    """

    def __init__(
        self, model: nn.Module, save_dir: str = "", *, guards: WeightGuards, **checkpointables
    ):
        super().__init__(model, save_dir, **checkpointables)
        self._guards = guards
        self._loading = ""

    def save(self, name: str, **kwargs: Any) -> None:
        super().save(name, origin=dataclasses.asdict(self._guards.ours), **kwargs)

    def load(self, path: str, *args, **kwargs) -> dict[str, Any]:
        """
        Raises:
            ConfigError: the weights were trained with another input or other strides than the
                run's, or with BN where the model has GN.
        """
        self._loading = path
        if path and (origin := Origin.of_name(path)):
            self._guards.check_origin(origin, path)
        return super().load(path, *args, **kwargs)

    def _load_model(self, checkpoint: dict[str, Any]):
        if origin := checkpoint.pop("origin", None):
            self._guards.check_origin(Origin.from_dict(origin), self._loading)
        self._guards.check_norms(checkpoint["model"], self.model, self._loading)
        return super()._load_model(checkpoint)
