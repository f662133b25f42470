"""The memory of a training step before it is taken: the step runs on fake tensors, which have
shapes, devices and lifetimes, and no memory (``FakeTensorMode`` of PyTorch)."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import build_model, poolers
from detectron2.modeling.roi_heads import roi_heads
from detectron2.solver import build_optimizer
from detectron2.structures import BitMasks, Boxes, ImageList, Instances, Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gn_detect.settings import Settings

from .errors import quiet
from .lazy_config import instantiate_key
from .train_loop import AMP_DTYPES

aten = torch.ops.aten
# At most so many rows has what depends on data: proposals, sampled anchors, matches.
_MOST_ROWS = 4096


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step, at its peak.

    Attributes:
        weights: parameters and buffers.
        optimizer: momentum.
        average: of the weights (EMA).
        maps: what the forward pass keeps for the backward pass.
        backward: what there is besides at the peak: gradients, and what is computed with; of
            several processes also the gradients on their way.
    """

    weights: int
    optimizer: int
    average: int
    maps: int
    backward: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    def __str__(self) -> str:
        parts = dataclasses.asdict(self).items()
        return ", ".join(f"{name} {gib(size)}" for name, size in parts if size) + " GiB"


def gib(size: float) -> str:
    return f"{size / 2**30:.2f}" if size < 2**30 else f"{size / 2**30:.1f}"


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a step is taken on.

    Args:
        images: of a forward pass.
        size: height and width of each, in pixels.
        objects: of each.
        bitmasks: their masks are bitmaps in the size of the image, and no polygons.
    """

    images: int
    size: tuple[int, int]
    objects: int = 20
    bitmasks: bool = False


def estimate_step(run: Settings, batch: Batch, processes: int = 1) -> StepMemory:
    """The memory of a step of the run on ``batch``, on one of its ``processes``.

    The model of the config runs forward and backward, and its optimizer takes a step, as in a run.
    What depends on the values of tensors is as large as it can be: all RoIs of a batch, a quarter
    of them (``POSITIVE_FRACTION``) with masks.

    Raises:
        Exception: of any kind, where the model does what fake tensors cannot.
    """
    device, dtype = torch.device(run["device"]), AMP_DTYPES[run["amp_dtype"]]
    with quiet():  # it is said when the model of the run is built
        memory = Allocations(workspace=device.type == "cpu")
        with FakeTensorMode(), memory, device, _fake_detection():
            model, optimizer = _build(run)
            for group in optimizer.param_groups:
                if device.type == "cuda" and group.get("foreach", True) is None:
                    group["foreach"] = True  # as for parameters that are not fake
            weights = memory.live
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            gradients = memory.live - weights
            optimizer.step()  # makes the momentum
            state = memory.live - weights - gradients
            # With accumulation the gradients are there from the start.
            if (run["accumulate_steps"] or 1) == 1:
                optimizer.zero_grad()
            data = _fake_data(run, model, batch)
            before = memory.peak = memory.live
            autocast = torch.autocast(device.type, dtype=dtype, enabled=False)
            autocast._enabled = bool(run["amp"])  # past the look for the device
            with EventStorage(), autocast:
                losses = model(data)
            maps = memory.live - before
            # In this thread, whose modes it sees.
            with torch.autograd.set_multithreading_enabled(False):
                sum(losses.values()).backward()
            del losses
            optimizer.step()
            average = weights if run["ema"] else 0
            exchanged = gradients if processes > 1 else 0
            return StepMemory(
                weights, state, average, maps, memory.peak - weights - state - maps + exchanged
            )


def _build(run: Settings) -> tuple[nn.Module, torch.optim.Optimizer]:
    # A fake parameter cannot move, and need not: it is made on the device.
    with mock.patch.object(nn.Module, "to", lambda module, *args, **kwargs: module):
        if isinstance(run.cfg, CfgNode):
            model = build_model(run.cfg)
            return model.train(), build_optimizer(run.cfg, model)
        cfg = copy.deepcopy(run.cfg)
        model = instantiate_key(cfg, "model")
        cfg.optimizer.params.model = model
        return model.train(), instantiate_key(cfg, "optimizer")


def _fake_data(run: Settings, model: nn.Module, batch: Batch) -> list[dict]:
    (height, width), data = batch.size, []
    for _ in range(batch.images):
        instances = Instances(batch.size)
        instances.gt_boxes = Boxes(torch.zeros(batch.objects, 4))
        instances.gt_classes = torch.zeros(batch.objects, dtype=torch.int64)
        if run["masks"]:
            bitmaps = torch.zeros(batch.objects, height, width, dtype=torch.bool)
            instances.gt_masks = (
                BitMasks(bitmaps) if batch.bitmasks else _Polygons(instances.gt_classes)
            )
        if run["keypoints"]:
            instances.gt_keypoints = Keypoints(torch.zeros(batch.objects, run["num_keypoints"], 3))
        image = torch.zeros(len(run["pixel_mean"] or "RGB"), height, width, dtype=torch.uint8)
        data.append(dict(image=image, instances=instances, label=0, height=height, width=width))
        if hasattr(model, "sem_seg_head"):
            data[-1]["sem_seg"] = torch.zeros(height, width, dtype=torch.int64)
    return data


class _Polygons(PolygonMasks):
    """Of which the CPU makes the bitmaps of RoIs, one by one."""

    def __init__(self, objects: torch.Tensor):
        self.objects = objects

    def __getitem__(self, item) -> _Polygons:
        return _Polygons(self.objects[item])

    def __len__(self) -> int:
        return len(self.objects)

    def to(self, *args, **kwargs) -> _Polygons:
        return self

    def crop_and_resize(self, boxes: torch.Tensor, mask_size: int) -> torch.Tensor:
        return torch.zeros(len(boxes), mask_size, mask_size, dtype=torch.bool, device=boxes.device)


@contextlib.contextmanager
def _fake_detection() -> Iterator[None]:
    """Within it, Detectron2 takes sizes from shapes, where it takes them from values of tensors."""

    def pad(tensors, size_divisibility=0, pad_value=0.0, padding_constraints=None) -> ImageList:
        divisor = (padding_constraints or {}).get("size_divisibility", size_divisibility) or 1
        sizes = [tuple(tensor.shape[-2:]) for tensor in tensors]
        full = [-(-max(side) // divisor) * divisor for side in zip(*sizes, strict=True)]
        return ImageList(
            tensors[0].new_full((len(tensors), *tensors[0].shape[:-2], *full), pad_value), sizes
        )

    def to_rois(boxes: list[Boxes]) -> torch.Tensor:
        return F.pad(torch.cat([b.tensor for b in boxes]), (1, 0))

    select, heads = roi_heads.select_foreground_proposals, []
    forward = roi_heads.ROIHeads.label_and_sample_proposals

    def sample(self, *args):
        heads[:] = [self]
        return forward(self, *args)

    def foreground(proposals: list[Instances], num_classes: int):
        most = int(heads[0].batch_size_per_image * heads[0].positive_fraction)
        return select([p[:most] for p in proposals], num_classes)

    with (
        mock.patch.object(ImageList, "from_tensors", pad),
        mock.patch.object(poolers, "convert_boxes_to_pooler_format", to_rois),
        mock.patch.object(roi_heads.ROIHeads, "label_and_sample_proposals", sample),
        mock.patch.object(roi_heads, "select_foreground_proposals", foreground),
    ):
        yield


class Allocations(TorchDispatchMode):
    """The bytes of the storages that operations make, while they live.

    Operations on fake tensors whose result depends on values get one as large as is likely.

    Args:
        workspace: take PyTorch's convolutions of the CPU to need, while they run, copies of all
            that they read and write, in the layouts of oneDNN.

    Attributes:
        live, peak: bytes now, and the most so far; may be set.
    """

    def __init__(self, workspace: bool = False):
        super().__init__()
        self.live = self.peak = 0
        self._workspace = workspace
        self._seen: dict[int, tuple[int, weakref.ref]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # A view of a parameter has its storage, and so has the result of an in-place operation.
        self._see((args, kwargs), new=False)
        rule = _OF_VALUES.get(func) if any(issubclass(t, FakeTensor) for t in types) else None
        result = rule(*args, **kwargs) if rule else NotImplemented
        if result is NotImplemented:
            result = func(*args, **kwargs)
        self._see(result, new=True)
        copies = 0
        if self._workspace and func in _CONVOLUTIONS:
            copies = sum(tensor.nbytes for tensor in tensors((args, result)))
        self.peak = max(self.peak, self.live + copies)
        return result

    def _see(self, tree, new: bool) -> None:
        for tensor in tensors(tree):
            storage = tensor.untyped_storage()
            if (key := storage._cdata) not in self._seen:
                size = storage.nbytes() if new else 0
                self._seen[key] = size, weakref.ref(storage, lambda _, key=key: self._free(key))
                self.live += size

    def _free(self, key: int) -> None:
        self.live -= self._seen.pop(key)[0]


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _nonzero(x: torch.Tensor) -> torch.Tensor:
    return x.new_zeros(min(x.numel(), _MOST_ROWS), x.dim(), dtype=torch.int64)


def _index(x: torch.Tensor, indices: list[torch.Tensor | None]) -> torch.Tensor:
    if not any(i is not None and i.dtype == torch.bool for i in indices):
        return NotImplemented
    positions = []
    for i in indices:
        mask = i is not None and i.dtype == torch.bool
        positions += _nonzero(i).unbind(1) if mask else [slice(None) if i is None else i]
    return x[tuple(positions)]


_CONVOLUTIONS = (aten.convolution.default, aten.convolution_backward.default)
# Conditions hold, and there is one of what is counted.
_OF_VALUES: dict[object, Callable] = {
    aten._local_scalar_dense.default: lambda x: x.dtype == torch.bool or 1,
    aten.nonzero.default: _nonzero,
    aten.index.Tensor: _index,
    aten._unique2.default: lambda x, *_, **__: (
        x.new_zeros(1),
        x.new_zeros(1, dtype=torch.int64),
        x.new_zeros(1, dtype=torch.int64),
    ),  # fmt: skip
    torch.ops.torchvision.nms.default: lambda boxes, *_: boxes.new_zeros(
        len(boxes), dtype=torch.int64
    ),
}
