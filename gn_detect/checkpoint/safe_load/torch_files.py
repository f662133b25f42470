"""What ``torch.save`` writes, looked through before ``torch.load`` is let at it.

``torch.load(weights_only=True)`` calls only known functions, but with the arguments that the file
gives: it allocates the sizes that the file declares, and nothing compares them with the bytes in
the file. Here the pickle is run with stand-ins for storages and tensors first.
"""

from __future__ import annotations

import dataclasses
import re
import struct
import warnings
from collections import OrderedDict
from typing import Any, BinaryIO

import torch
from torch import nn

from . import pickle_globals
from .pickle_machine import Global, PickleMachine
from .torch_zip import read_directory
from .untrusted import Damage, Refusal, Window

# The first of the five pickles of a file of PyTorch before 1.6, and of today's without zip, after
# the two bytes that tell the protocol: torch.serialization.MAGIC_NUMBER.
LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_MAX_VIEW = 2**20  # elements of an expanded tensor, which may be more than its storage has


@dataclasses.dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    numel: int


@dataclasses.dataclass(eq=False)
class _Tensor:
    """Stands for a tensor that is in order, or for another value of PyTorch's of no bytes."""

    nbytes: int = 0


def load_zip(file: BinaryIO, size: int) -> Any:
    """Content of a file that ``torch.save`` wrote, tensors on the CPU.

    Raises:
        Refusal, Damage: it is no plain file of weights, or not whole; and other errors, from
            PyTorch, for what is damaged in other ways.
    """
    members = read_directory(file, size)
    lengths = {name: end - start for name, (start, end) in members.items()}
    storages: dict[str, _Storage] = {}

    def load_persistent(identity: Any) -> _Storage:
        key, storage = _read_identity(identity, 5, storages)
        nbytes = storage.numel * storage.dtype.itemsize
        if (length := lengths.get(f"data/{key}", 0)) != nbytes:
            raise Damage(f"it declares {nbytes} bytes for the storage {key}, but has {length}")
        return storage

    _run(file, *members["data.pkl"], size, load_persistent)
    return _torch_load(file)


def load_legacy(file: BinaryIO, size: int) -> Any:
    """As :func:`load_zip`, for the format without zip."""
    storages: dict[str, _Storage] = {}
    left = size

    def load_persistent(identity: Any) -> _Storage:
        nonlocal left  # bytes of the file that no storage declares yet
        known = len(storages)
        _, storage = _read_identity(identity, 6, storages)
        if len(storages) > known:
            left -= storage.numel * storage.dtype.itemsize
        if left < 0:
            raise Damage("it ends in the middle of its content")
        if identity[1].name == "torch.storage.UntypedStorage":
            raise Refusal("it has tensors of a type that PyTorch cannot read without zip")
        if identity[5] is not None:
            raise Refusal("it has views of storages as PyTorch before 0.4 wrote them")
        return storage

    position = 0
    for _ in range(3):  # magic number, version, sizes of C's types
        _, position = _run(file, position, size, size)
    _, position = _run(file, position, size, size, load_persistent)
    keys, position = _run(file, position, size, size)
    if type(keys) is not list or sorted(keys) != sorted(storages):
        raise Damage("its list of storages is not that of its tensors")
    for key in keys:
        file.seek(position)
        header = file.read(8)
        if len(header) < 8 or struct.unpack("<q", header)[0] != storages[key].numel:
            raise Damage(f"its storage {key} has another size than it declares")
        position += 8 + storages[key].numel * storages[key].dtype.itemsize
    if position > size:
        raise Damage("it ends in the middle of its content")
    return _torch_load(file)


def _run(file: BinaryIO, start: int, end: int, size: int, load_persistent=None) -> tuple[Any, int]:
    window = Window(file, start, end)
    machine = PickleMachine(window, _TABLE, pickle_globals.BUILDERS, load_persistent, size)
    return machine.run(), window.position


def _torch_load(file: BinaryIO) -> Any:
    file.seek(0)
    taken = torch.serialization.get_safe_globals()  # not to be removed with ours
    ours = [entry for entry in pickle_globals.SAFE_GLOBALS if entry not in taken]
    with torch.serialization.safe_globals(ours), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(file, map_location="cpu", weights_only=True)


def _read_identity(
    identity: Any, length: int, storages: dict[str, _Storage]
) -> tuple[str, _Storage]:
    """("storage", class, key, device, number of elements, ...)"""
    if type(identity) is not tuple or len(identity) != length or identity[0] != "storage":
        raise Refusal("it refers to something other than a storage outside of its pickle")
    _, kind, key, location, numel, *_ = identity
    dtype = _STORAGES.get(kind.name) if isinstance(kind, Global) else None
    if dtype is None or type(location) is not str:
        raise Refusal("it has a storage of an unknown kind")
    if type(key) is not str or not re.fullmatch("[0-9A-Za-z_]+", key):
        raise Refusal("it has a storage with an unusual name")
    if type(numel) is not int or not 0 <= numel < 2**62:
        raise Damage(f"it declares a storage of {numel if type(numel) is int else 'no'} elements")
    storage = _Storage(dtype, numel)
    if storages.setdefault(key, storage) != storage:
        raise Damage(f"it declares the storage {key} in two ways")
    return key, storages[key]


def _rebuild(
    machine: PickleMachine,
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any = False,
    hooks: Any = None,
    dtype: torch.dtype | None = None,
    metadata: Any = None,
) -> _Tensor:
    if not isinstance(storage, _Storage) or type(requires_grad) is not bool:
        raise Refusal("it makes a tensor in another way than torch.save does")
    _check_hooks(hooks)
    if metadata:
        raise Refusal("it has a tensor with a conjugate or a negative view")
    for numbers in (size, stride, (offset,)):
        if type(numbers) is not tuple or any(
            type(n) is not int or not 0 <= n < 2**62 for n in numbers
        ):
            raise Damage("it has a tensor whose sizes, strides or offset are no sizes")
    if len(size) != len(stride) or len(size) > 64:
        raise Damage("it has a tensor with more sizes than strides, or the other way round")
    itemsize = (dtype or storage.dtype).itemsize
    capacity = storage.numel * storage.dtype.itemsize // itemsize
    numel = 1
    for n in size:
        numel *= n
    last = sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if numel else -1
    if offset + last + 1 > capacity:
        raise Damage(
            f"it has a tensor of shape {size[:8]} that reaches beyond its storage of {capacity}"
        )
    if numel > max(capacity, _MAX_VIEW):
        raise Refusal(f"it has a tensor of shape {size[:8]}, on a storage of only {capacity}")
    nbytes = numel * itemsize
    return machine.weigh(_Tensor(nbytes), nbytes)


def _rebuild_v2(machine, storage, offset, size, stride, grad, hooks, metadata=None) -> _Tensor:
    return _rebuild(machine, storage, offset, size, stride, grad, hooks, None, metadata)


def _rebuild_v3(
    machine, storage, offset, size, stride, grad, hooks, dtype, metadata=None
) -> _Tensor:
    if not isinstance(dtype, torch.dtype):
        raise Refusal("it makes a tensor in another way than torch.save does")
    return _rebuild(machine, storage, offset, size, stride, grad, hooks, dtype, metadata)


def _rebuild_parameter(machine, data: Any, requires_grad: Any, hooks: Any) -> _Tensor:
    if not isinstance(data, _Tensor) or type(requires_grad) is not bool:
        raise Refusal("it makes a parameter in another way than torch.save does")
    _check_hooks(hooks)
    return machine.weigh(_Tensor(data.nbytes), data.nbytes)


def _rebuild_parameter_with_state(
    machine, data: Any, requires_grad: Any, hooks: Any, state: Any
) -> _Tensor:
    tensor = _rebuild_parameter(machine, data, requires_grad, hooks)
    return _set_attributes(machine, tensor, state)


def _rebuild_from_type(machine, function: Any, cls: Any, arguments: Any, state: Any) -> _Tensor:
    """A tensor with attributes: what makes the tensor, its class, arguments, attributes."""
    name = function.name if isinstance(function, Global) else None
    if name not in _REBUILDS or type(arguments) is not tuple or cls not in _TENSOR_CLASSES:
        raise Refusal("it makes a tensor in another way than torch.save does")
    return _set_attributes(machine, _REBUILDS[name](machine, *arguments), state)


def _set_attributes(machine, tensor: _Tensor, state: Any) -> _Tensor:
    """PyTorch sets them one by one; what tensors themselves have is not to be replaced."""
    if type(state) is not dict or not all(
        type(key) is str and key.isidentifier() and not hasattr(nn.Parameter, key) for key in state
    ):
        raise Refusal("it sets attributes that a tensor has of its own")
    machine.spend_items(len(state))
    machine.hold(tensor, [state])
    return tensor


def _check_hooks(hooks: Any) -> None:
    if hooks is not None and not (type(hooks) is OrderedDict and not hooks and not vars(hooks)):
        raise Refusal("it has a tensor with hooks, which are code")


def _size(machine: PickleMachine, numbers: Any = ()) -> tuple[int, ...]:
    if type(numbers) is not tuple or len(numbers) > 64:
        raise Damage("it has a torch.Size of something other than sizes")
    if any(type(n) is not int for n in numbers):
        raise Damage("it has a torch.Size of something other than sizes")
    return numbers


def _device(machine: PickleMachine, kind: Any, index: Any = None) -> _Tensor:
    if type(kind) is not str or not (index is None or type(index) is int):
        raise Refusal("it has a device of an unknown kind")
    return _Tensor()


def _layout(machine: PickleMachine, name: Any) -> _Tensor:
    if name != "torch.strided":
        raise Refusal("it has a layout of sparse tensors")
    return _Tensor()


_STORAGES = {
    f"torch.{module}{kind}Storage": dtype
    for module in ("", "cuda.")
    for kind, dtype in {
        **{"Float": torch.float32, "Double": torch.float64, "Half": torch.float16},
        **{"BFloat16": torch.bfloat16, "Long": torch.int64, "Int": torch.int32},
        **{"Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool},
        **{"ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128},
    }.items()
} | {"torch.storage.UntypedStorage": torch.uint8}
_REBUILDS = {
    "torch._utils._rebuild_tensor": _rebuild,
    "torch._utils._rebuild_tensor_v2": _rebuild_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_v3,
}
_TENSOR_CLASSES = [Global("torch.Tensor"), Global("torch.nn.parameter.Parameter")]
_CALLS = {
    **_REBUILDS,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter_with_state,
    "torch.serialization._get_layout": _layout,
    "torch.Size": _size,
    "torch.device": _device,
}
_DTYPES = "float32 float64 float16 bfloat16 int64 int32 int16 int8 uint8 uint16 uint32 uint64 bool"
_DTYPES += " complex64 complex128 float8_e4m3fn float8_e5m2"
_DTYPES += " float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"
_TABLE = {
    **pickle_globals.TABLE,
    **{name: Global(name) for name in _STORAGES},
    **{name: Global(name, call) for name, call in _CALLS.items()},
    **{cls.name: cls for cls in _TENSOR_CLASSES},
    **{f"torch.{name}": getattr(torch, name) for name in _DTYPES.split()},
}
