"""What a forward pass keeps for the backward pass."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from detectron2.modeling import build_backbone
from torch._subclasses.fake_tensor import FakeTensorMode

from gn_detect.engine.step_memory import Allocations, tensors

from .detectors import Settings, variant_config


def saved_bytes(forward: Callable[[], object]) -> int:
    """Bytes of the tensors that the graph of ``forward()`` keeps for its backward pass.

    Counts each storage that was created in ``forward`` and still lives when nothing but the
    graph of its results is held. So it counts what saved_tensors_hooks of the network itself keep
    (those in PyTorch's checkpoint or in ``layers.recompute`` hide it from hooks around them), and
    neither parameters nor what a network gives as its result but does not keep.

    Args:
        forward: gives a tensor, or tensors in lists and dicts. What it reads counts only where it
            creates it, and what it stores elsewhere counts, too.
    """
    with Allocations() as memory:
        results = [tensor.grad_fn for tensor in tensors(forward())]
    gc.collect()
    kept = memory.live
    del results
    return kept


def backbone_bytes(variant: str, settings: Settings) -> int:
    """Bytes that the ResNet of a variant, alone, keeps for its backward pass.

    Its tensors are fake: they have a device, which need not be there, and no memory. What the
    autocast of a device changes, it changes here too.
    """
    cfg = variant_config(variant, settings)
    cfg.MODEL.GN.KERNEL = "auto"
    with FakeTensorMode(), torch.device(settings.device):
        backbone = build_backbone(cfg).bottom_up

        def forward() -> dict[str, torch.Tensor]:
            with settings.autocast():
                return backbone(torch.empty(settings.images, 3, *settings.size))

        return saved_bytes(forward)
