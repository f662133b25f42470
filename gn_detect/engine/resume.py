"""What a resumed run takes up beside its model and optimizer: its place in the data, and the random
numbers of each process. For both trainers: a hook, whose state is saved with theirs."""

from __future__ import annotations

import contextlib
import logging
import random

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch.optim.lr_scheduler import LRScheduler

from gn_detect.checkpoint import Checkpointer
from gn_detect.config import ConfigError
from gn_detect.data.sampler import ResumableSampler
from gn_detect.settings import Settings

from .train_loop import AccumulatingTrainer

logger = logging.getLogger(__name__)


class Resume(HookBase):
    """Lets a run go on as if it had not stopped.

    On the CPU, in one process without data loading workers, the result is that of an uninterrupted
    run, bit for bit; of RetinaNet but for rounding, as TorchScript adds up its focal loss otherwise
    in the first passes of a process. With data loading workers the order of the images continues
    exactly, but their random augmentation does not.

    A run can be resumed with another number of processes; those that the checkpoint does not know
    draw random numbers of their own. With another number of images per iteration it continues at
    the iteration that has seen as many images (rounded down, so that some may be seen twice). Which
    images of an epoch were seen is exact but for those that had waited for a batch of their
    orientation.

    Args:
        run: its settings.
        loop, checkpointer: of the run.
    """

    def __init__(self, run: Settings, loop: AccumulatingTrainer, checkpointer: Checkpointer):
        self._keys = run.keys
        self._loop = loop
        self._checkpointer = checkpointer
        self._max_iter = run["max_iter"]
        self._batch = {
            "images_per_iteration": run["ims_per_batch"],
            "accumulate_steps": loop.accumulate_steps,
            "processes": comm.get_world_size(),
        }
        sampler = getattr(getattr(loop.data_loader, "dataset", None), "sampler", None)
        self._sampler = sampler if isinstance(sampler, ResumableSampler) else None
        self._others: list[dict] = []  # random states of the other processes
        self._resumed: dict = {}
        self._start_iter = 0

    def state_dict(self) -> dict:
        return {
            "batch": self._batch,
            "random_states": [get_random_state(), *self._others],
            "sampler": self._sampler.state_dict() if self._sampler else None,
        }

    def load_state_dict(self, state: dict) -> None:
        self._resumed = state

    def start(self, iterations: int, scheduler: LRScheduler | None = None) -> int:
        """The iteration at which a run goes on whose checkpoint has been loaded.

        Args:
            iterations: those of the checkpoint.
            scheduler: is set to that iteration, and to the rates of this run's optimizer, where
                it exists already.

        Raises:
            ConfigError: the checkpoint has seen more images than this run will.
        """
        self._start_iter = min(self._same_image(iterations), self._max_iter)
        if scheduler:
            groups = self._loop.optimizer.param_groups
            scheduler.base_lrs = [group["initial_lr"] for group in groups]
            scheduler.last_epoch = self._start_iter
            for group, rate in zip(groups, scheduler.get_lr(), strict=True):
                group["lr"] = rate
        saved = self._resumed.get("sampler")
        if not self._sampler:
            reason = "its loader is not of gn_detect.data.loader, or its data no list of images"
        elif saved:
            reason = self._sampler.load_state_dict(saved)
        else:
            reason = "the checkpoint does not say where it was in the data"
        if reason:
            logger.warning(f"the order of the images is drawn anew: {reason}")
        return self._start_iter

    def _same_image(self, iterations: int) -> int:
        """The iteration of this run that has seen as many images as ``iterations`` of the
        checkpoint's."""
        saved = self._resumed.get("batch", self._batch)
        if saved == self._batch:
            return iterations
        old, new = saved["images_per_iteration"], self._batch["images_per_iteration"]
        if old == new:
            logger.warning(
                f"resuming with {_describe(self._batch)}, where the checkpoint had "
                f"{_describe(saved)}: an iteration still has {new} images, but their order and "
                "augmentation are not those of a run without the change"
            )
            return iterations
        start = iterations * old // new
        if (start - self._max_iter) * new >= old + new:  # more than rounding can make
            raise ConfigError(
                f"the checkpoint's {iterations} iterations of {old} images saw more than the "
                f"{self._max_iter} iterations of {new} images of this run; scale its length with "
                f"the images, or let {self._keys['epochs']} do it"
            )
        logger.warning(
            f"resuming with {new} images per iteration, where the checkpoint had {old}: its "
            f"{iterations} iterations saw {iterations * old} images, so this run continues at "
            f"iteration {start} of {self._max_iter}, after {start * new} images"
        )
        return start

    def before_train(self) -> None:
        if self._start_iter >= self._max_iter > 0:  # finished, but perhaps on a full disk
            self._checkpointer.save_safetensors()
        if self._sampler:
            steps, close = self._loop.accumulate_steps, self._sampler.close
            self._sampler.start = self._start_iter * steps
            if close:
                closed_from = self._max_iter - round(self._max_iter * close)
                self._sampler.closed_from = closed_from * steps
                logger.info(f"from iteration {closed_from} on: no copy-paste, no colour jitter")
        # Creating the iterator draws from torch's generator: first that, then the saved state.
        self._loop._data_loader_iter  # noqa: B018
        states = self._resumed.get("random_states", [])
        if comm.get_rank() < len(states):
            set_random_state(states[comm.get_rank()])

    def gather_random_states(self) -> None:
        """Before a save, in all processes."""
        if comm.get_world_size() > 1:
            self._others = comm.gather(get_random_state())[1:]


def _describe(batch: dict[str, int]) -> str:
    return f"{batch['processes']} process(es) and {batch['accumulate_steps']} accumulation step(s)"


def get_random_state() -> dict:
    """The state of the generators that training draws from, in types that ``torch.load`` with
    ``weights_only`` accepts."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": (name, keys.tolist(), *rest),
        "python": random.getstate(),
    }


def set_random_state(state: dict) -> None:
    """Set what :func:`get_random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


@contextlib.contextmanager
def preserved_random_state():
    """Leave the generators as they were."""
    state = get_random_state()
    try:
        yield
    finally:
        set_random_state(state)
