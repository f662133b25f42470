"""What a forward pass keeps for the backward pass, and what a training step needs."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from detectron2.modeling import build_backbone
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import get_gradient_edge

from gn_detect.engine.free_memory import numbers, spare_the_heap
from gn_detect.engine.step_memory import Allocations, Batch, StepMemory, estimate_step, tensors
from gn_detect.settings import Settings as Run

from .detectors import Detector, Settings, variant_config


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
        # The grad_fn of a function in Python does not keep what comes before it in PyTorch 2.11.
        results = [get_gradient_edge(t) for t in tensors(forward()) if t.requires_grad]
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


def estimated_step(variant: str, settings: Settings) -> StepMemory:
    """The estimate of what :func:`measured_step` measures."""
    cfg = variant_config(variant, settings)
    if settings.amp != "none":
        cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE = True, settings.amp
    batch = Batch(settings.images, settings.size, max(1, settings.rois // 4))
    return estimate_step(Run(cfg), batch)


def measured_step(variant: str, settings: Settings) -> dict[str, int]:
    """Bytes that a detector takes, from before it is built, at the peak of its training steps.

    Returns:
        on a CPU ``"peak"``: what the resident memory of a process grows by, one that does nothing
        else, and gives back what is freed. On CUDA ``"peak"``, of what is allocated; ``"reserved"``
        of it by PyTorch; and ``"device"``, what the GPU lacks afterwards.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    if settings.device == "cpu":
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, spawn) as process:
            return process.submit(_resident, variant, settings, torch.get_num_threads()).result()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    free = torch.cuda.mem_get_info()[0]
    _train(variant, settings)
    return {
        "peak": torch.cuda.max_memory_allocated() - before,
        "reserved": torch.cuda.max_memory_reserved() - reserved,
        "device": free - torch.cuda.mem_get_info()[0],
    }


def _resident(variant: str, settings: Settings, threads: int) -> dict[str, int]:
    torch.set_num_threads(threads)
    spare_the_heap()
    before = numbers("/proc/self/status")["VmRSS"]
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    _train(variant, settings)
    return {"peak": (numbers("/proc/self/status")["VmHWM"] - before) * 1024}


def _train(variant: str, settings: Settings, steps: int = 3) -> None:
    detector = Detector(variant, settings)
    for _ in range(steps):
        detector.step()
