"""The order of the training data, which a resumed run can continue."""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class ResumableSampler(Sampler[int]):
    """A sampler of Detectron2, one batch after the other, from any batch on.

    Detectron2 groups images by orientation after they are loaded, so where its stream stands
    depends on images that wait in its buckets. Grouping the indices gives the same batches, and
    skips ``start`` of them without loading an image.

    Args:
        sampler: an endless stream of indices that follows from the seeds it has drawn.
        groups: one group for each image; the images of a batch are of one group.
        batch_size: images per process.
    """

    def __init__(self, sampler: Sampler[int], groups: list[int], batch_size: int):
        self.sampler = sampler
        self.groups = groups
        self.batch_size = batch_size
        self.start = 0  # batches to skip; may be set
        self.close = 0.0  # the share of a run, at its end, without more augmentation
        self.closed_from = math.inf  # the batch from which ``~i`` is yielded for ``i``; may be set

    def __iter__(self) -> Iterator[int]:
        batches = itertools.islice(self._batches(), self.start, None)
        for number, batch in enumerate(batches, self.start):
            yield from (batch if number < self.closed_from else [~i for i in batch])

    def _batches(self) -> Iterator[list[int]]:
        buckets = collections.defaultdict(list)
        for index in self.sampler:
            group = self.groups[index]
            buckets[group].append(index)
            if len(buckets[group]) == self.batch_size:
                yield buckets.pop(group)

    def state_dict(self) -> dict:
        """What decides the order: the kind of the sampler, the number of images, and what it has
        drawn, which are its seeds and its tables of indices."""
        drawn = {
            name: value
            for name, value in vars(self.sampler).items()
            if ("seed" in name and isinstance(value, int))
            or (isinstance(value, torch.Tensor) and not value.is_floating_point())
        }
        kind = type(self.sampler).__name__
        return {"sampler": kind, "num_images": len(self.groups), "drawn": drawn}

    def load_state_dict(self, state: dict) -> str:
        """Take the order of an earlier run. Returns why that cannot be; "" if it can."""
        ours = self.state_dict()
        if not ours["drawn"]:
            return f"{ours['sampler']} keeps no seed"
        for what in ("sampler", "num_images"):
            if state[what] != ours[what]:
                return f"its {what} is {ours[what]}, the checkpoint's {state[what]}"
        vars(self.sampler).update(state["drawn"])
        return ""
