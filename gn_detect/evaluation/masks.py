"""Masks that are pasted into the image one at a time, as an evaluation encodes them.

Detectron2's models return those of an image as one tensor (objects, height, width): 2.4 GB for 100
objects in a photo of 6000 x 4000 pixels.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import torch
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    COCOEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
)
from detectron2.layers import paste_masks_in_image
from detectron2.modeling import GeneralizedRCNN, GeneralizedRCNNWithTTA
from detectron2.structures import Boxes, ROIMasks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# Those that look at ``pred_masks`` item by item, or not at all.
_ITEM_BY_ITEM = (COCOEvaluator, LVISEvaluator, CityscapesInstanceEvaluator)


def takes_items(evaluator: DatasetEvaluator) -> bool:
    """Whether ``evaluator`` needs of ``pred_masks`` that they are a sequence, not a tensor."""
    return getattr(type(evaluator), "process", None) in [kind.process for kind in _ITEM_BY_ITEM]


@contextlib.contextmanager
def masks_one_by_one(model: nn.Module, when: bool = True) -> Iterator[None]:
    """Within it, ``pred_masks`` of the results of ``model`` are :class:`PastedMasks`, if it is a
    ``GeneralizedRCNN``, or of a subclass with the same inference, or Detectron2's of augmented
    images. Others are left as they are."""
    rcnn = model.module if isinstance(model, DistributedDataParallel) else model
    methods = [getattr(type(rcnn), name, len) for name in ("forward", "inference")]
    if type(rcnn) is GeneralizedRCNNWithTTA:
        name, method = "_reduce_pred_masks", _mean_masks
    elif [*map(inspect.unwrap, methods)] == [GeneralizedRCNN.forward, GeneralizedRCNN.inference]:
        name, method = "inference", _inference
    else:
        when = False
    if not when:
        yield
        return
    setattr(rcnn, name, functools.partial(method, rcnn))  # which its forward calls
    try:
        yield
    finally:
        delattr(rcnn, name)


def _inference(model: GeneralizedRCNN, batched_inputs: list[dict]) -> list[dict]:
    results = GeneralizedRCNN.inference(model, batched_inputs, do_postprocess=False)
    for result in results:
        if result.has("pred_masks"):
            masks = result.pred_masks
            masks = masks.tensor if isinstance(masks, ROIMasks) else masks[:, 0]
            result.pred_masks = _UnpastedMasks(masks)
    sizes = [result.image_size for result in results]
    return GeneralizedRCNN._postprocess(results, batched_inputs, sizes)


def _mean_masks(model: GeneralizedRCNNWithTTA, *outputs_and_transforms) -> _UnpastedMasks:
    masks = GeneralizedRCNNWithTTA._reduce_pred_masks(model, *outputs_and_transforms)
    return _UnpastedMasks(masks[:, 0])


class _UnpastedMasks(ROIMasks):
    """What Detectron2's postprocessing filters, and then asks for masks of the image's size."""

    def __getitem__(self, item) -> _UnpastedMasks:
        return _UnpastedMasks(super().__getitem__(item).tensor)

    def to_bitmasks(
        self, boxes: Boxes, height: int, width: int, threshold: float = 0.5
    ) -> SimpleNamespace:
        masks = PastedMasks(self.tensor, boxes.tensor, (height, width), threshold)
        return SimpleNamespace(tensor=masks)


class PastedMasks(Sequence):
    """Masks of the size of the image, each made when it is asked for: the items of the tensor that
    Detectron2 returns, equal to it.

    Args:
        masks: probabilities in the boxes, (N, M, M).
        boxes: in the image, (N, 4).
        image_size: height, width.
        threshold: of the probability.
    """

    def __init__(
        self,
        masks: torch.Tensor,
        boxes: torch.Tensor,
        image_size: tuple[int, int],
        threshold: float,
    ):
        self._arguments = masks, boxes, image_size, threshold
        self._device = masks.device  # of the items; they are pasted where the model runs

    def to(self, device: torch.device) -> PastedMasks:
        moved = PastedMasks(*self._arguments)
        moved._device = device
        return moved

    def __len__(self) -> int:
        return len(self._arguments[0])

    def __getitem__(self, index: int) -> torch.Tensor:
        """(height, width) bool, column after column in memory, as RLE counts them: to encode a
        mask of 6000 x 4000 pixels takes a quarter of the time so.

        Raises:
            IndexError: there is no such mask.
        """
        masks, boxes, image_size, threshold = self._arguments
        start = range(len(self))[index]
        one = slice(start, start + 1)
        mask = paste_masks_in_image(masks[one], boxes[one], image_size, threshold)[0]
        return mask.T.contiguous().T.to(self._device)
