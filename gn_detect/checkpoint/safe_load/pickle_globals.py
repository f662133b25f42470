"""The classes and functions that a file of weights may name, and what each of them gets.

Containers, numpy's plain arrays, and as opaque data what OpenMMLab's checkpoints carry besides
weights.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter, OrderedDict
from typing import Any

import numpy as np

from . import pickle_plain
from .pickle_machine import Global, PickleMachine
from .untrusted import Damage, Refusal


class Opaque:
    """Data of a class that is not loaded: its state is kept, and nothing of the class runs."""

    def __init__(self, *arguments: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.__dict__["state"] = state


def opaque_attribute(cls: Any, name: str) -> Opaque:
    """In the place of ``getattr``, by which Python 3 pickles a method of a class."""
    return Opaque()


def make_dict(content: Any = ()) -> dict:
    """In the place of dict and its subclasses."""
    return dict(content)


def make_default_dict(factory: Any = None) -> dict:
    """In the place of ``collections.defaultdict``, whose factory is not kept."""
    return {}


# numpy moved them in 2.0; what it calls them when it pickles is what it finds when it loads.
_RECONSTRUCT = np.zeros(1).__reduce__()[0]
_SCALAR = np.float32(0).__reduce__()[0]
_FROMBUFFER = np.zeros(1).__reduce_ex__(5)[0]
_NUMPY = {
    f"{core}.{name}": function
    for core in ("numpy.core", "numpy._core")
    for name, function in [
        ("multiarray._reconstruct", _RECONSTRUCT),
        ("multiarray.scalar", _SCALAR),
        ("numeric._frombuffer", _FROMBUFFER),
    ]
}
_PLAIN = "?bBhHiIlLqQefdgFDG"
_PLAIN_DTYPES = list({type(np.dtype(code)) for code in _PLAIN})

_OPAQUE = [
    "mmengine.logging.history_buffer.HistoryBuffer",
    "mmengine.logging.message_hub.MessageHub",
]
_FACTORIES = ["list", "int", "float", "str", "bool", "tuple"]  # of a defaultdict
_DICTS = ["mmengine.config.config.ConfigDict"]  # which pickles itself as a call with a dict

# What torch.load gets beyond its own list, as torch.serialization.safe_globals takes it.
SAFE_GLOBALS = [
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    *_PLAIN_DTYPES,
    *((function, name) for name, function in _NUMPY.items()),
    *((Opaque, name) for name in _OPAQUE),
    *((make_dict, name) for name in [*_DICTS, "builtins.dict"]),
    (make_default_dict, "collections.defaultdict"),
    (opaque_attribute, "builtins.getattr"),
    (bytes, "builtins.bytes"),
    frozenset,
    *((Opaque, f"builtins.{name}") for name in _FACTORIES),
]


def _new_ordered_dict(machine: PickleMachine, pairs: Any = ()) -> OrderedDict:
    """From a list of pairs where Python 2 wrote it."""
    result = OrderedDict()
    if type(pairs) not in (tuple, list) or any(
        type(pair) not in (tuple, list) or len(pair) != 2 for pair in pairs
    ):
        raise Refusal("it makes an OrderedDict of something other than pairs")
    machine.fill(result, pairs)
    return result


def _new_dict(machine: PickleMachine, content: Any = ()) -> dict:
    result: dict = {}
    machine.fill(result, _pairs_of(content))
    return result


def _new_counter(machine: PickleMachine, content: Any = ()) -> Counter:
    result = Counter()
    machine.fill(result, _pairs_of(content))
    return result


def _pairs_of(content: Any) -> Any:
    if content == ():
        return ()
    if not isinstance(content, dict):
        raise Refusal("it makes a mapping of something other than a mapping")
    return content.items()


def _new_default_dict(machine: PickleMachine, factory: Any = None) -> dict:
    if factory is not None and not isinstance(factory, Global):
        raise Refusal("it makes a defaultdict of something other than a class")
    return _new_dict(machine)


def _new_namespace(machine: PickleMachine) -> argparse.Namespace:
    result = argparse.Namespace()
    machine.hold(result, ())  # so that it is known to be in use when it is
    return result


def _new_opaque(machine: PickleMachine, *arguments: Any) -> Opaque:
    result = Opaque()
    machine.hold(result, ())
    return result


def _opaque_attribute(machine: PickleMachine, owner: Any, name: Any) -> Opaque:
    if not isinstance(owner, Global) or owner.name not in _OPAQUE or type(name) is not str:
        raise Refusal("it asks for 'builtins.getattr', which is no part of weights")
    return Opaque()


def _new_dtype(machine: PickleMachine, code: Any, *flags: Any) -> np.dtype:
    if flags != (False, True):  # a type of its own, as numpy asks for
        raise Refusal("it has an array of a type that is not plain numbers")
    if type(code) is not str or not re.fullmatch(r"[<>=|]?([biufc](1|2|4|8|16)|\?)", code):
        raise Refusal(f"it has an array of type {str(code)[:40]!r}, not of numbers")
    return machine.await_state(np.dtype(code, False, True))


def _build_dtype(machine: PickleMachine, dtype: np.dtype, state: Any) -> None:
    """(3, byte order, no sub-array, no names, no fields, size, alignment, flags)"""
    order = state[1] if type(state) is tuple and len(state) == 8 else None
    order = order.decode("latin1") if isinstance(order, bytes) else order
    if order not in ("<", ">", "=", "|") or tuple(state[2:]) != (None, None, None, -1, -1, 0):
        raise Refusal("it has an array of a type that is not plain numbers")
    if not machine.take_unbuilt(dtype):
        raise Refusal("it changes the type of an array")
    dtype.__setstate__(tuple(state))


def _check_dtype(machine: PickleMachine, dtype: Any) -> np.dtype:
    if not isinstance(dtype, np.dtype):
        raise Refusal("it has an array of a type that is not plain numbers")
    machine.take_unbuilt(dtype)
    return dtype


def _check_shape(shape: Any, dtype: np.dtype, size: int) -> None:
    if type(shape) is not tuple or len(shape) > 64:  # as many as numpy has
        raise Damage("it has an array whose shape is not a tuple of sizes")
    if any(type(n) is not int or n < 0 for n in shape):
        raise Damage("it has an array whose shape is not a tuple of sizes")
    if math.prod(shape) * dtype.itemsize != size:
        raise Damage(
            f"it has an array of shape {str(shape)[:100]} and type {dtype}, but {size} bytes for it"
        )


def _new_array(machine: PickleMachine, cls: Any, shape: Any, code: Any) -> np.ndarray:
    if cls is not _NDARRAY or shape != (0,) or code not in ("b", b"b"):
        raise Refusal("it makes an array in another way than numpy does")
    return machine.await_state(_RECONSTRUCT(np.ndarray, (0,), b"b"))


def _build_array(machine: PickleMachine, array: np.ndarray, state: Any) -> None:
    """(1, shape, dtype, whether in Fortran's order, bytes)"""
    if type(state) is not tuple or len(state) != 5 or not machine.take_unbuilt(array):
        raise Refusal("it makes an array in another way than numpy does")
    version, shape, dtype, fortran, data = state
    dtype = _check_dtype(machine, dtype)
    if type(data) not in (bytes, bytearray, str) or type(fortran) not in (bool, int):
        raise Refusal("it has an array of something other than numbers")
    if isinstance(data, str):  # of Python 2
        data = data.encode("latin1")
    _check_shape(shape, dtype, len(data))
    machine.spend(len(data))
    array.__setstate__((1, shape, dtype, bool(fortran), bytes(data)))
    machine.weigh(array, len(data))


def _array_of_buffer(
    machine: PickleMachine, data: Any, dtype: Any, shape: Any, order: Any
) -> np.ndarray:
    dtype = _check_dtype(machine, dtype)
    if type(data) not in (bytes, bytearray) or order not in ("C", "F"):
        raise Refusal("it has an array of something other than numbers")
    _check_shape(shape, dtype, len(data))
    return machine.weigh(_FROMBUFFER(data, dtype, shape, order), len(data))


def _new_scalar(machine: PickleMachine, dtype: Any, data: Any) -> np.generic:
    dtype = _check_dtype(machine, dtype)
    data = data.encode("latin1") if isinstance(data, str) else data
    if type(data) is not bytes:
        raise Refusal("it has a number of numpy of something other than bytes")
    _check_shape((), dtype, len(data))
    return _SCALAR(dtype, data)


def _build_ordered_dict(machine: PickleMachine, instance: OrderedDict, state: Any) -> None:
    """A module's ``state_dict`` has the versions of its layers as an attribute."""
    versions = state.get("_metadata") if type(state) is dict and len(state) == 1 else None
    if not isinstance(versions, dict):
        raise Refusal("it sets attributes of an OrderedDict")
    machine.hold(instance, [state])
    instance._metadata = versions


def _build_namespace(machine: PickleMachine, instance: argparse.Namespace, state: Any) -> None:
    if type(state) is not dict or any(type(k) is not str or k.startswith("__") for k in state):
        raise Refusal("it sets attributes of a Namespace that are not arguments")
    machine.spend_items(len(state))
    machine.hold(instance, [state])
    instance.__dict__.update(state)


def _build_opaque(machine: PickleMachine, instance: Opaque, state: Any) -> None:
    machine.hold(instance, [state])
    instance.__setstate__(state)


_NDARRAY = Global("numpy.ndarray")
_CALLS = {
    "numpy.core.multiarray._reconstruct": _new_array,
    "numpy.core.multiarray.scalar": _new_scalar,
    "numpy.core.numeric._frombuffer": _array_of_buffer,
}

# Full name -> what a pickle gets; the values are those that the real classes would make.
TABLE: dict[str, Any] = {
    "collections.OrderedDict": Global("collections.OrderedDict", _new_ordered_dict, new=True),
    "collections.Counter": Global("collections.Counter", _new_counter),
    "collections.defaultdict": Global("collections.defaultdict", _new_default_dict),
    "argparse.Namespace": Global("argparse.Namespace", _new_namespace, new=True),
    **{name: Global(name, call) for name, call in pickle_plain.CALLS.items()},
    "builtins.getattr": Global("builtins.getattr", _opaque_attribute),
    "builtins.dict": Global("builtins.dict", _new_dict),
    **{f"builtins.{name}": Global(f"builtins.{name}") for name in _FACTORIES},
    "numpy.ndarray": _NDARRAY,
    "numpy.dtype": Global("numpy.dtype", _new_dtype),
    **{n: Global(n, _CALLS[n.replace("numpy._core", "numpy.core")]) for n in _NUMPY},
    **{name: Global(name, _new_opaque, new=True) for name in _OPAQUE},
    **{name: Global(name, _new_dict) for name in _DICTS},
}
BUILDERS = {
    np.ndarray: _build_array,
    **dict.fromkeys(_PLAIN_DTYPES, _build_dtype),
    OrderedDict: _build_ordered_dict,
    argparse.Namespace: _build_namespace,
    Opaque: _build_opaque,
}
