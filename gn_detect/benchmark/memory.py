"""What a forward pass keeps for the backward pass."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
        results = [t.grad_fn for t in tree_leaves(forward()) if isinstance(t, torch.Tensor)]
    gc.collect()
    total = sum(size for ref, size in created.sizes.items() if not ref.expired())
    del results
    return total


class _Storages(TorchDispatchMode):
    """The storages of all tensors that operations return, by weak references."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[StorageWeakRef, int] = {}
        self.inputs: set[StorageWeakRef] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # A view of a parameter has its storage, and so has the result of an in-place operation.
        for tensor in _tensors((args, kwargs)):
            ref = StorageWeakRef(tensor.untyped_storage())
            if ref not in self.sizes:
                self.inputs.add(ref)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            ref = StorageWeakRef(storage)
            if ref not in self.inputs:
                self.sizes[ref] = storage.nbytes()
        return result


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
