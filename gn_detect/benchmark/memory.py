"""What a forward pass keeps for the backward pass."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from detectron2.modeling import build_backbone
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
    with _Storages() as created:
        results = [tensor.grad_fn for tensor in _tensors(forward())]
    gc.collect()
    total = sum(size for ref, size in created.sizes.items() if not ref.expired())
    del results
    return total


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


class _Storages(TorchDispatchMode):
    """The storages of all tensors that operations return, by weak references."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[StorageWeakRef, int] = {}
        self.inputs: set[StorageWeakRef] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # A view of a parameter has its storage, and so has the result of an in-place operation.
        read = {StorageWeakRef(t.untyped_storage()) for t in _tensors((args, kwargs))}
        self.inputs |= read - self.sizes.keys()
        result = func(*args, **(kwargs or {}))
        storages = [tensor.untyped_storage() for tensor in _tensors(result)]
        created = {StorageWeakRef(storage): storage.nbytes() for storage in storages}
        self.sizes |= {ref: size for ref, size in created.items() if ref not in self.inputs}
        return result


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
