"""A pickle run instruction by instruction, over plain values, without trusting it.

Python's own unpicklers let a file name any function, nest until the interpreter's stack ends, and
ask for memory that the file does not fill. This one calls only what a table names, and counts
before it builds anything: instructions, depth, items, what calls copy of items and of bytes, and
the bytes of all arrays and tensors. The instructions are those of Python's ``pickletools``,
protocols 0 to 5, without those that no file of weights has.
"""

from __future__ import annotations

import codecs
import dataclasses
import pickletools
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from .untrusted import Damage, Refusal, Window

# A checkpoint of a detector and its optimizer has some 20,000 instructions, and a depth of 6.
MAX_INSTRUCTIONS = 500_000
MAX_DEPTH = 100
MAX_STACK = 50_000  # Python writes batches of 1000 items
MAX_ITEMS = 10_000_000  # with an item that is referred to twice counted twice
MAX_TUPLE_KEYS = 1000  # hashes of tuples may be chosen to collide
# Bytes of all arrays and tensors, one that is referred to twice counted twice: a few weights are
# tied, and a few are expanded.
MAX_TIES = 4  # times the size of the file
MAX_EXPANDED = 2**24


@dataclasses.dataclass(frozen=True, eq=False)
class Global:
    """Stands for a class or a function that a pickle may name; it is never the thing itself.

    Args:
        name: with its module.
        call: ``call(machine, *arguments)`` makes what calling it makes; None if it is only passed.
        new: whether ``cls.__new__(cls)``, which then is ``call(machine)``, is in order too.
    """

    name: str
    call: Callable | None = None
    new: bool = False


@dataclasses.dataclass(slots=True)
class _Facts:
    value: Any  # keeps the id taken
    depth: int = 1
    items: int = 0
    nbytes: int = 0  # of the arrays and tensors in it
    placed: bool = False
    arguments: bool = False  # holds a Global, as the arguments of a call may


class PickleMachine:
    """Runs the pickle at the position of ``window``, and leaves it after the pickle's end.

    Args:
        window: part of a file.
        table: full name -> what a pickle gets that asks for it: a :class:`Global`, or a value.
        builders: class -> ``build(machine, instance, state)``, for instances that get a state.
        load_persistent: makes the value of a persistent id; None if there may be none.
        file_size: of all of the file in bytes; None if the window is all of it.
    """

    def __init__(
        self,
        window: Window,
        table: Mapping[str, Any],
        builders: Mapping[type, Callable],
        load_persistent: Callable[[Any], Any] | None = None,
        file_size: int | None = None,
    ):
        self._window, self._table, self._builders = window, table, builders
        self._load_persistent = load_persistent
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks below the marks
        self._memo: dict[int, Any] = {}
        self._facts: dict[int, _Facts] = {}
        self._unbuilt: dict[int, Any] = {}
        size = window.end - window.position
        self._bytes_left = 2 * size  # protocol 2 copies arrays and bytearrays twice
        self._items_left = min(size, MAX_INSTRUCTIONS)  # an item takes a byte and an instruction
        self._tuple_keys_left = MAX_TUPLE_KEYS
        self._max_nbytes = MAX_TIES * (size if file_size is None else file_size) + MAX_EXPANDED

    def run(self) -> Any:
        """
        Raises:
            Refusal, Damage: see there; and other errors, from the readers of ``pickletools``, for
                damaged pickles.
        """
        read, readers, actions = self._window.read, _READERS, _ACTIONS
        for _ in range(MAX_INSTRUCTIONS):
            code = read(1)
            if code == b".":
                value = self._stack.pop()
                if self._stack or self._below:
                    raise Refusal("it makes values that are no part of its content")
                if isinstance(value, Global) or self._is_arguments(value):
                    raise Refusal("it holds a function or a class instead of weights")
                return value
            action = actions.get(code)
            if action is None:
                raise _unknown(code, self._window)
            reader = readers[code]
            if reader is None:
                action(self)
            else:
                action(self, reader(self._window))
        raise Refusal(f"it has more than {MAX_INSTRUCTIONS:,} pickle instructions")

    def spend(self, size: int) -> None:
        """Account for a copy of bytes; a pickle that makes more than it has repeats itself."""
        self._bytes_left -= size
        if self._bytes_left < 0:
            raise Refusal("it makes many copies of the same bytes")

    def spend_items(self, count: int) -> None:
        """Account for items that a call gets or copies; an honest one makes them for it."""
        self._items_left -= count
        if self._items_left < 0:
            raise Refusal("it makes many copies of the same items")

    def weigh(self, value: Any, nbytes: int) -> Any:
        """Say how large an array or a tensor is, before it is part of another thing."""
        self._facts[id(value)] = _Facts(value, nbytes=nbytes)
        return value

    def await_state(self, value: Any) -> Any:
        """Let ``value`` have a state, once, until it is used."""
        self._unbuilt[id(value)] = value
        return value

    def take_unbuilt(self, value: Any) -> bool:
        """Whether ``value`` awaited a state; from now on it does not."""
        return self._unbuilt.pop(id(value), None) is not None

    def hold(self, parent: Any, items: Iterable[Any]) -> None:
        """Account for ``items`` becoming part of ``parent``.

        What is part of another thing does not change any more, so depths and counts are final, and
        nothing is part of itself.
        """
        facts = self._facts.get(id(parent))
        if facts is None:
            if len(self._stack) > MAX_STACK:
                raise Refusal(f"it is nested, or has more than {MAX_STACK:,} items at once")
            facts = self._facts[id(parent)] = _Facts(parent)
        if facts.placed:
            raise Refusal("it changes a list or a mapping that is in use, or holds itself")
        for item in items:
            facts.items += 1
            if isinstance(item, Global):
                if type(parent) is not tuple:
                    raise Refusal(f"it holds {item.name}, which is no part of weights")
                facts.arguments = True
            elif id(item) in self._unbuilt:
                raise Refusal("it has an array in use before it is made")
            elif (inner := self._facts.get(id(item))) is not None:
                if inner.arguments:
                    raise Refusal("it holds a function or a class, which is no part of weights")
                if inner is facts:
                    raise Refusal("it holds itself")
                inner.placed = True
                facts.items += inner.items
                facts.nbytes += inner.nbytes
                facts.depth = max(facts.depth, inner.depth + 1)
        if facts.depth > MAX_DEPTH:
            raise Refusal(f"it is nested deeper than {MAX_DEPTH} levels")
        if facts.items > MAX_ITEMS:
            raise Refusal(f"it has more than {MAX_ITEMS:,} items")
        if facts.nbytes > self._max_nbytes:
            raise Refusal(f"its tensors refer to the same data more than {MAX_TIES} times")

    def fill(self, mapping: dict, pairs: Collection[tuple[Any, Any]]) -> None:
        """Put pairs of key and value into ``mapping``."""
        self.spend_items(len(pairs))
        self.hold(mapping, [value for _, value in pairs])
        for key, value in pairs:
            mapping[self._plain_key(key)] = value

    def add(self, target: set, items: Collection[Any]) -> None:
        """Put items into a set."""
        self.spend_items(len(items))
        self.hold(target, items)
        target.update([self._plain_key(item) for item in items])

    def find(self, module: str, name: str) -> Any:
        """
        Raises:
            Refusal: the table does not have it.
        """
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        full = f"{module}.{name}"
        full = _PYTHON_2.get(full, full)
        try:
            return self._table[full]
        except KeyError:
            raise Refusal(f"it asks for {full[:100]!r}, which is no part of weights") from None

    def _is_arguments(self, value: Any) -> bool:
        facts = self._facts.get(id(value))
        return facts is not None and facts.arguments

    def _plain_key(self, key: Any) -> Any:
        """A key whose hash takes no time, and which is not chosen to collide with many others."""
        if type(key) is tuple:
            self._tuple_keys_left -= 1
            if self._tuple_keys_left < 0:
                raise Refusal(f"it has more than {MAX_TUPLE_KEYS:,} keys that are tuples")
            if len(key) <= 16 and all(_is_plain(item) for item in key):
                return key
        elif _is_plain(key):
            return key
        raise Refusal(f"it has a mapping or a set with a key of type {type(key).__name__}")

    # What the instructions do.

    def _push(self, value: Any) -> None:
        if type(value) is int and value.bit_length() > 128:
            raise Refusal("it has an integer of more than 128 bits")
        self._stack.append(value)

    def _mark(self) -> None:
        if len(self._below) >= MAX_DEPTH:
            raise Refusal(f"it is nested deeper than {MAX_DEPTH} levels")
        self._below.append(self._stack)
        self._stack = []

    def _pop_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _make_tuple(self, items: list[Any]) -> None:
        value = tuple(items)
        if items:  # the empty tuple is one object
            self.hold(value, items)
        self._stack.append(value)

    def _make_short_tuple(self, size: int) -> None:
        if len(self._stack) < size:
            raise Damage("its pickle is inconsistent")
        items = self._stack[-size:]
        del self._stack[-size:]
        self._make_tuple(items)

    def _make_list(self, items: list[Any]) -> None:
        self._stack.append([])
        self._extend(items)

    def _make_dict(self, items: list[Any]) -> None:
        self._stack.append({})
        self._set_items(items)

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise Refusal(f"it appends to a {type(target).__name__}")
        self.hold(target, items)
        target.extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) not in (dict, OrderedDict, Counter):
            raise Refusal(f"it sets items of a {type(target).__name__}")
        self.fill(target, list(zip(items[::2], items[1::2], strict=True)))

    def _set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items([key, value])

    def _add_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not set:
            raise Refusal(f"it adds items to a {type(target).__name__}")
        self.add(target, items)

    def _make_set(self) -> None:
        self._stack.append(set())
        self._add_items([])

    def _make_frozenset(self) -> None:
        items = self._pop_mark()
        self._stack.append(self.freeze(items))

    def freeze(self, items: Collection[Any]) -> frozenset:
        """A frozenset of ``items``."""
        content: set = set()
        self.add(content, items)
        result = frozenset(content)
        if result:  # the empty one is one object
            self.hold(result, [content])
        return result

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, Global) or function.call is None:
            name = function.name if isinstance(function, Global) else type(function).__name__
            raise Refusal(f"it calls {name}")
        if type(arguments) is not tuple:
            raise Damage("its pickle is inconsistent")
        self.spend_items(len(arguments))
        self._stack.append(function.call(self, *arguments))

    def _new(self) -> None:
        arguments, cls = self._stack.pop(), self._stack.pop()
        if not isinstance(cls, Global) or not cls.new or arguments != ():
            raise Refusal(f"it makes an instance of {getattr(cls, 'name', type(cls).__name__)}")
        self._stack.append(cls.call(self))

    def _build(self) -> None:
        state = self._stack.pop()
        instance = self._stack[-1]
        if (build := self._builders.get(type(instance))) is None:
            raise Refusal(f"it gives a state to a {type(instance).__name__}")
        build(self, instance, state)

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            raise Refusal("it asks for a function whose name is no text")
        self._stack.append(self.find(module, name))

    def _find(self, argument: str) -> None:
        self._stack.append(self.find(*argument.split(" ", 1)))

    def _find_and_refuse(self, argument: str) -> None:
        self._find(argument)
        raise Refusal(f"it makes an instance of {argument}")

    def _load(self) -> None:
        if self._load_persistent is None:
            raise Refusal("it refers to objects outside of itself")
        self._stack.append(self._load_persistent(self._stack.pop()))


# As Python 3 writes and reads its names in protocols 0 to 2.
_PYTHON_2 = {"builtins.long": "builtins.int", "builtins.unicode": "builtins.str"}


def _is_plain(key: Any) -> bool:
    """Hashes of numbers are modulo 2**61 - 1, and at most some 200 floats share one."""
    if type(key) is int:
        return key.bit_length() < 61
    return type(key) in (str, bytes, bool, float) or key is None


def _unknown(code: bytes, window: Window) -> Exception:
    known = pickletools.code2op.get(code.decode("latin1"))
    if known is None:
        return Damage(f"its pickle has a byte that is no instruction at {window.position - 1}")
    return Refusal(f"its pickle has the instruction {known.name}, which weights do not need")


def _read_quoted(window: Window) -> str:
    """A string of protocol 0, whose bytes may be any (pickletools takes ASCII only)."""
    line = window.readline().rstrip(b"\r\n")
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise Damage("its pickle has a string without quotes")
    return codecs.escape_decode(line[1:-1])[0].decode("latin1")


_M = PickleMachine
_BY_NAME: dict[str, Callable] = {
    **dict.fromkeys(
        [
            *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT"),
            *("BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE"),
            *("SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
            "BYTEARRAY8",
        ],
        _M._push,
    ),
    "PROTO": lambda m, version: None,
    "FRAME": lambda m, size: None,
    "NONE": lambda m: m._stack.append(None),
    "NEWTRUE": lambda m: m._stack.append(True),
    "NEWFALSE": lambda m: m._stack.append(False),
    "EMPTY_TUPLE": lambda m: m._stack.append(()),
    "EMPTY_LIST": lambda m: m._make_list([]),
    "EMPTY_DICT": lambda m: m._make_dict([]),
    "EMPTY_SET": _M._make_set,
    "ADDITEMS": lambda m: m._add_items(m._pop_mark()),
    "FROZENSET": _M._make_frozenset,
    "MARK": _M._mark,
    "TUPLE": lambda m: m._make_tuple(m._pop_mark()),
    "TUPLE1": lambda m: m._make_short_tuple(1),
    "TUPLE2": lambda m: m._make_short_tuple(2),
    "TUPLE3": lambda m: m._make_short_tuple(3),
    "LIST": lambda m: m._make_list(m._pop_mark()),
    "DICT": lambda m: m._make_dict(m._pop_mark()),
    "APPEND": lambda m: m._extend([m._stack.pop()]),
    "APPENDS": lambda m: m._extend(m._pop_mark()),
    "SETITEM": _M._set_item,
    "SETITEMS": lambda m: m._set_items(m._pop_mark()),
    **dict.fromkeys(["PUT", "BINPUT", "LONG_BINPUT"], _M._put),
    "MEMOIZE": lambda m: m._put(len(m._memo)),
    **dict.fromkeys(
        ["GET", "BINGET", "LONG_BINGET"], lambda m, index: m._stack.append(m._memo[index])
    ),
    "GLOBAL": _M._find,
    "STACK_GLOBAL": _M._stack_global,
    "INST": _M._find_and_refuse,
    "REDUCE": _M._reduce,
    "NEWOBJ": _M._new,
    "BUILD": _M._build,
    "BINPERSID": _M._load,
}
_OPCODES = {op.name: op for op in pickletools.opcodes}
_ACTIONS = {_OPCODES[name].code.encode("latin1"): action for name, action in _BY_NAME.items()}
_READERS = {
    op.code.encode("latin1"): op.arg.reader if op.arg else None for op in pickletools.opcodes
}
_READERS[b"S"] = _read_quoted
