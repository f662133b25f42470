"""Python's own values that pickles make by calling their classes."""

from __future__ import annotations

from typing import Any

from .pickle_machine import PickleMachine
from .untrusted import Refusal


def _encode(machine: PickleMachine, text: Any, encoding: Any) -> bytes:
    """By which protocol 2 pickles bytes."""
    if type(text) is not str or encoding != "latin1":
        raise Refusal("it encodes something other than bytes")
    machine.spend(len(text))
    return text.encode("latin1")


def _new_bytes(machine: PickleMachine) -> bytes:
    """Empty ones are not encoded by protocols 0 to 2."""
    return b""


def _new_bytearray(machine: PickleMachine, content: Any = b"", encoding: Any = None) -> bytearray:
    """Of bytes, or of text by its own ``__reduce_ex__``; a number would be a size to allocate."""
    if type(content) is str and encoding == "latin-1":
        machine.spend(len(content))
        return bytearray(content, "latin-1")
    if type(content) is not bytes or encoding is not None:
        raise Refusal("it makes a bytearray of something other than bytes")
    machine.spend(len(content))
    return bytearray(content)


def _new_complex(machine: PickleMachine, real: Any, imaginary: Any) -> complex:
    if type(real) is not float or type(imaginary) is not float:
        raise Refusal("it makes a complex number of something other than two numbers")
    return complex(real, imaginary)


def _new_set(machine: PickleMachine, items: Any = ()) -> set:
    result: set = set()
    machine.add(result, _items_of(items))
    return result


def _new_frozenset(machine: PickleMachine, items: Any = ()) -> frozenset:
    return machine.freeze(_items_of(items))


def _items_of(items: Any) -> Any:
    if type(items) not in (list, tuple):
        raise Refusal("it makes a set of something other than a list")
    return items


CALLS = {
    "_codecs.encode": _encode,
    "builtins.bytes": _new_bytes,
    "builtins.bytearray": _new_bytearray,
    "builtins.complex": _new_complex,
    "builtins.set": _new_set,
    "builtins.frozenset": _new_frozenset,
}
