"""What backward rebuilds instead of storing (Chen et al., https://arxiv.org/abs/1604.06174).

A convolution keeps its input for the gradient of its weights. Where the input is the output of a
GroupNorm, it can be computed again from the input of the GroupNorm, which is kept for its own
gradient anyway: one pass over the map, and half of the maps are gone.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import weakref
from collections.abc import Callable, Iterator

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from . import padding

# "fast": keep everything. "balanced": rebuild the outputs of GroupNorm. "lean": also what
# ``rerun`` says. "checkpoint": keep the inputs of blocks alone, and run them twice.
MODES = ("fast", "balanced", "lean", "checkpoint")


def run_block(memory: str, block: Callable, *inputs: torch.Tensor) -> torch.Tensor:
    """``block(*inputs)``, whose backward pass has the memory of the mode ``memory``.

    Gradients are those of ``"fast"``, bit for bit: the same operations see the same numbers.

    Args:
        memory: one of ``MODES``.
        block: a part of a network whose result does not depend on random numbers, and which
            changes none of its inputs and no input of a GroupNorm in place.

    Raises:
        RuntimeError: in the backward pass, if what it needs was changed in place since. (As that of
            ``torch.utils.checkpoint``, the backward pass of ``"checkpoint"`` does not notice.)
    """
    if memory == "fast" or not torch.is_grad_enabled():
        return block(*inputs)
    if memory == "checkpoint":
        # It runs again when the batch is gone.
        if not torch.compiler.is_compiling() and (extents := padding.current()):
            block = padding.images_in_batch(extents)(block)
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    if torch.compiler.is_compiling():  # whose partitioner decides what to keep
        return block(*inputs)
    with rebuild_norms():
        return block(*inputs)


@contextlib.contextmanager
def rebuild_norms() -> Iterator[None]:
    """Within this context, outputs of ``group_norm_act`` without a residual are not kept for the
    backward pass, by whatever operation reads them, but rebuilt.

    An outer ``saved_tensors_hooks`` (``torch.utils.checkpoint``, ``save_on_cpu``) does not see what
    is saved in here: PyTorch applies the innermost alone. ``torch.func`` knows no such hooks.
    """
    rebuildable: _Rebuildable = {}
    token = _active.set(rebuildable)
    try:
        with saved_tensors_hooks(functools.partial(_pack, rebuildable), _unpack):
            yield
    finally:
        _active.reset(token)
        # PyTorch keeps the hooks while anything that was saved in here lives, and they the maps.
        rebuildable.clear()


def offer(y: torch.Tensor, rebuild: Callable, inputs: tuple, in_place_operations: int = 0) -> None:
    """Inside :func:`rebuild_norms`: let the backward pass have ``rebuild(*inputs)`` for ``y``.

    Args:
        y: what operations from now on would keep.
        rebuild: gives the very values and strides of ``y``.
        inputs: its arguments, tensors or None. They are kept, or rebuilt themselves.
        in_place_operations: on ``y``, still to come, which ``rebuild`` includes.
    """
    if torch.compiler.is_compiling():  # see run_block; PyTorch 2.11 cannot trace a ContextVar
        return
    rebuildable = _active.get()
    if rebuildable is not None and y.requires_grad:
        packed = [t if t is None else _pack(rebuildable, t) for t in inputs]
        version = y._version + in_place_operations
        rebuildable[_storage(y)] = weakref.ref(y), version, _Rebuilt(rebuild, packed)


def rerun(function: Callable, *inputs: torch.Tensor | None) -> torch.Tensor:
    """``function(*inputs)``, of which the backward pass has to keep nothing for a GroupNorm behind
    it: inside :func:`rebuild_norms` it runs ``function`` again.

    Args:
        function: depends on ``inputs`` alone.
    """
    y = function(*inputs)
    device = inputs[0].device.type
    if device == "meta":  # of which torch knows no autocast
        return y
    autocast = {
        "device_type": device,
        "dtype": torch.get_autocast_dtype(device),
        "enabled": torch.is_autocast_enabled(device),
    }

    def again(*inputs):
        with torch.autocast(**autocast):
            return function(*inputs)

    offer(y, again, inputs)
    return y


class _Rebuilt:
    """A tensor that is computed when first asked for, and held until all who saved it had it."""

    def __init__(self, rebuild: Callable, inputs: list):
        self.rebuild, self.inputs = rebuild, inputs
        self.users = self.to_come = 0
        self.value: torch.Tensor | None = None

    def get(self) -> torch.Tensor:
        if self.value is None:
            with torch.no_grad():
                self.value = self.rebuild(*map(_unpack, self.inputs))
            self.to_come = self.users
        value = self.value
        self.to_come -= 1
        if self.to_come <= 0:
            self.value = None
        return value


# The tensors that can be rebuilt, while they live: by storage, with their versions.
_Rebuildable = dict[int, tuple[weakref.ref, int, _Rebuilt]]
_active: contextvars.ContextVar[_Rebuildable | None] = contextvars.ContextVar(
    "active", default=None
)


def _pack(rebuildable: _Rebuildable, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """What is kept of a tensor: all, or what it takes to rebuild it."""
    ref, version, rebuilt = rebuildable.get(_storage(tensor), (None, None, None))
    y = ref and ref()
    # Another tensor may have got the memory of one that is gone.
    if y is None or tensor._version != version or tensor.dtype != y.dtype:
        return _kept(tensor)
    rebuilt.users += 1
    view = tensor.size(), tensor.stride(), tensor.storage_offset()
    return lambda: rebuilt.get().as_strided(*view)


def _kept(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A tensor as it is. Where there are hooks, PyTorch does not look whether it was changed, and
    an output that holds its own graph would never be freed."""
    tensor, version = tensor.detach(), tensor._version

    def get() -> torch.Tensor:
        if tensor._version != version:
            raise RuntimeError(
                "a tensor that the backward pass needs was changed in place since the forward "
                f"pass; it has the shape {list(tensor.shape)}. Change it after the backward "
                "pass, or change a copy"
            )
        return tensor

    return get


def _unpack(packed: Callable[[], torch.Tensor] | None) -> torch.Tensor | None:
    return None if packed is None else packed()


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
