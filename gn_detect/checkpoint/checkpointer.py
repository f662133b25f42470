"""Detectron2's checkpointer, for weights of any source, which it reads without trust."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from gn_detect.config import ConfigError
from gn_detect.distributed import from_first_process

from .convert import Weights, read_weights
from .coverage import Coverage, cover, num_classes
from .newest import POINTER, newest_checkpoint
from .origin import Origin
from .resumed import check_resumed
from .saving import (
    PERIODIC,
    metrics_of,
    periodic_checkpoints,
    remove_checkpoints,
    remove_partial_files,
    to_safetensors,
    write_atomically,
)
from .weight_guards import WeightGuards, norms_of

logger = logging.getLogger(__name__)


class Checkpointer(DetectionCheckpointer):
    """Saves the :class:`Origin` of the weights with them, and looks at what it loads.

    A run that is killed, or whose disk is full, while it saves still has its last checkpoint
    (``saving.py``), where ``save_dir`` is a local directory.

    Args:
        model: also wrapped for distributed training.
        keep: how many periodic checkpoints to keep of this run and of what it resumes, 0 for all.
        config: of the run, as YAML, saved with the weights.
        names: of the ``"classes"`` and, where the model has them, the ``"keypoints"`` of the data,
            in order, saved with the weights.
        averaged: the model with the average of the weights (EMA), saved at the end.
        evaluation: the model is only evaluated, so that all of it must be in the weights. Otherwise
            what is not starts afresh, with a warning.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        guards: WeightGuards,
        keep: int = 0,
        config: str = "",
        names: Mapping[str, Sequence[str]] | None = None,
        averaged: nn.Module | None = None,
        evaluation: bool = False,
        **checkpointables,
    ):
        super().__init__(model, save_dir, **checkpointables)
        self._guards = guards
        self._keep = keep
        self._last: str | None = None  # of get_checkpoint_file
        self._saved: list[str] = []  # periodic checkpoints of this run, oldest first
        self._config = config
        self._names = {kind: list(found) for kind, found in (names or {}).items()}
        self._averaged = averaged
        self._evaluation = evaluation
        self._progress: dict[str, Any] = {}  # iteration and metrics of what was saved or loaded

    @property
    def origin(self) -> Origin:
        """Of the weights of this model."""
        return dataclasses.replace(self._guards.ours, **norms_of(self.model))

    def save(
        self,
        name: str,
        *,
        iteration: int | None = None,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save ``<name>.pth``, and ``model_final`` also as ``.safetensors``.

        Args:
            iteration: the last one that was done, from 0.
            metrics: of these weights, by their flat names (``bbox/AP``), as far as they were
                evaluated; those that are nan are left out.

        Raises:
            CheckpointError: the disk is full, or not writable.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        self._progress = {"iteration": iteration, "metrics": _finite(metrics or {})}
        data = {
            "model": self.model.state_dict(),
            **{key: obj.state_dict() for key, obj in self.checkpointables.items()},
            **kwargs,
            **self._known(self._progress),
            "config": self._config,
        }
        basename = f"{name}.pth"
        # Fewer are to be kept than before, perhaps because there is no room for another one.
        self._remove_old()
        logger.info(f"Saving checkpoint to {os.path.join(self.save_dir, basename)}")
        remove_partial_files(self.save_dir)
        self._write(basename, lambda f: torch.save(data, f))
        self.tag_last_checkpoint(basename)
        if PERIODIC.fullmatch(basename):
            self._saved = [*(n for n in self._saved if n != basename), basename]
            self._remove_old()
        if name == "model_final":
            self.save_safetensors()

    def _remove_old(self) -> None:
        if self._keep:
            old, self._saved = self._saved[: -self._keep], self._saved[-self._keep :]
            remove_checkpoints(self.path_manager, self.save_dir, old)

    def _write(self, basename: str, write: Callable[[IO[bytes]], object]) -> None:
        """Write a file in ``save_dir``: atomically, or by the path manager's handler of ``s3://``
        and the like."""
        path = os.path.join(self.save_dir, basename)
        if "://" not in path:
            return write_atomically(path, write)
        with self.path_manager.open(path, "wb") as f:
            write(f)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        self._write(POINTER, lambda f: f.write(last_filename_basename.encode()))
        self._last = os.path.join(self.save_dir, last_filename_basename)

    def get_checkpoint_file(self) -> str:
        """The path of the newest intact checkpoint in ``save_dir`` (``newest.py``); "" for none. It
        is decided once, and by each save; in several processes, by :meth:`resume_or_load` of the
        first for all.

        Raises:
            CheckpointError: there are checkpoints, but none is intact.
        """
        if self._last is None:
            self._last = newest_checkpoint(self.save_dir, self.path_manager)
        return self._last

    def has_checkpoint(self) -> bool:
        return bool(self.get_checkpoint_file())

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """As Detectron2's. To be called by all processes, of which the first looks for the
        checkpoint."""
        if resume:
            find = functools.partial(newest_checkpoint, self.save_dir, self.path_manager)
            self._last = from_first_process(find)
        return super().resume_or_load(path, resume=resume)

    def _known(self, progress: Mapping[str, Any]) -> dict[str, Any]:
        origin = dataclasses.asdict(self.origin)
        return {"origin": origin, **self._names, **progress}

    def save_safetensors(self) -> None:
        """Save the weights alone, readable without pickle, as ``model_final.safetensors`` beside
        ``model_final.pth``, and their average as ``model_final_ema.safetensors``; nothing where
        that is not the last checkpoint.

        Raises:
            CheckpointError: the disk is full, or not writable.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        if os.path.basename(self.get_checkpoint_file()) != "model_final.pth":
            return
        self.save_weights("model_final", ema=False, pth=False, **self._progress)
        ema = "model_final_ema"
        if self._averaged is not None:
            self.save_weights(ema, ema=True, pth=False, **self._progress)
        elif self.path_manager.exists(path := os.path.join(self.save_dir, f"{ema}.safetensors")):
            logger.warning(f"{path} is not of this run, which has no average of its weights (EMA)")

    def save_weights(
        self, name: str, *, ema: bool, iteration: int, metrics: Mapping[str, float], pth: bool
    ) -> None:
        """Save the weights alone, or their average, and what is known of them, as
        ``<name>.safetensors`` and, if asked to, ``.pth``. The last checkpoint stays what it is.

        Raises:
            CheckpointError: the disk is full, or not writable.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        state = (self._averaged if ema else self.model).state_dict()
        metrics = _finite(metrics_of(metrics, ema=ema))
        known = self._known({"iteration": iteration, "metrics": metrics})
        if pth:
            content = {"model": state, **known, "config": self._config}
            self._write(f"{name}.pth", lambda f: torch.save(content, f))
        tensors = to_safetensors(state, known, config=self._config)
        self._write(f"{name}.safetensors", lambda f: f.write(tensors))

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load weights, and from a checkpoint of this project also the state of the training.

        To be called by all processes: the first reads the file, which need not be there for the
        others, and all have what it has read.

        Args:
            path: any name of weights that ``sources.locate`` knows; "" for none.
            checkpointables: which of the other states to load, if they are there; None for all.

        Returns:
            the rest of the file.

        Raises:
            ConfigError: the weights cannot be found, read or trusted, or are not what the model
                needs. Nothing of them is applied then.
        """
        if not path:
            return super().load(path, checkpointables)
        if origin := Origin.of_name(path):
            self._guards.check_origin(origin, path)  # before a download
        logger.info(f"Loading weights from {path}")
        weights = from_first_process(lambda: read_weights(path, self.model.state_dict()))
        resumes = checkpointables is None and self.save_dir and not self._evaluation
        resumes = resumes and path == from_first_process(self.get_checkpoint_file)
        if resumes:
            coverage = cover(weights, self.model)
            check_resumed(weights, coverage, path, self._names, self._config)
        self.model.load_state_dict(self.check(weights, path).loaded, strict=False)
        if resumes:
            last = weights.rest.get("iteration", -1)
            self._saved = periodic_checkpoints(self.path_manager, self.save_dir, last)
            self._progress = {"iteration": last, "metrics": {}, **weights.progress}
        for key in self.checkpointables if checkpointables is None else checkpointables:
            if key in weights.rest:
                self.checkpointables[key].load_state_dict(weights.rest.pop(key))
        return weights.rest

    def check(self, weights: Weights, name: str) -> Coverage:
        """Log what weights of the file ``name`` give to the model, and hold them to the guards of
        the run. Nothing of them is applied.

        Raises:
            ConfigError: they are not what the model needs.
        """
        coverage = cover(weights, self.model)
        try:
            self._guards.check(weights, coverage, self.model, name)
            for kind, ours in self._names.items():
                arguments = (weights, coverage, name, kind, ours, self._evaluation)
                self._guards.check_outputs(*arguments)
        finally:
            count = len(weights.left_out)
            others = f" ({count} of no detector left out)" if count else ""
            logger.info(f"{name} has the names of {weights.format}{others}; it gives\n{coverage}")
        known = [k for k, v in dataclasses.asdict(self.origin).items() if v not in (None, "")]
        if unknown := [field for field in known if getattr(weights.origin, field) is None]:
            logger.warning(
                f"{name} does not say with which {', '.join(unknown)} it was trained; what the "
                "config says is taken to be right"
            )
        if not coverage.afresh:
            return coverage
        lacking = f"{name} does not give, or not in the shape of this model: "
        lacking += coverage.describe_afresh()
        theirs, ours = num_classes(weights.shapes), num_classes(coverage.shapes)
        if None not in (theirs, ours) and theirs != ours:
            lacking += f". It has {theirs} classes, the model has {ours}"
        if self._evaluation:
            raise ConfigError(
                f"{lacking}. These layers would be random, and so would be the result: evaluate "
                "weights that were trained with this config on these classes, or train first"
            )
        logger.warning(f"{lacking}. These layers start afresh")
        return coverage


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
