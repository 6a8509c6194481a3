"""Pickles as data: a stack machine that finds, calls and changes nothing itself, but asks its caller's rules.

Python's unpickler, even with its `find_class` overridden, lets a file fill the memory (a memo index of 2**31, a
bytearray of any length), crash the process (the hash of a tuple nested a million deep) or set attributes on the classes
that are allowed. So this one knows only what pickles of plain data hold, and takes no length on trust. It is slower,
about 1 us per opcode. Used by dcp_metadata.py and objects.py, which hold the rules.
"""

from __future__ import annotations

import pickle
import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

MAX_NODES = 1000  # of a key of a dict; a guess: DCP's have ten
MAX_DEPTH = 500  # pickle itself nests as deep as Python calls, 1000
MAX_EXPANDED = 10_000_000
"""Values, each counted wherever it stands: fifty lists, each twice in the next, are 2**50 to whoever walks them."""


class Rules(Protocol):
    """What a pickle may ask for. Each raises for what it may not."""

    def find(self, module: str, name: str) -> Any: ...
    def call(self, function: Any, args: tuple[Any, ...]) -> Any:
        """What pickle makes by REDUCE."""
        ...

    def new(self, cls: Any, args: tuple[Any, ...]) -> Any:
        """What pickle makes by NEWOBJ."""
        ...

    def build(self, instance: Any, state: Any) -> None:
        """Give an object its state."""
        ...

    def persistent(self, name: Any) -> Any:
        """What is stored beside the pickle."""
        ...


def unpickle(data: bytes | memoryview, rules: Rules) -> Any:
    """The value; its memory is some multiple of the pickle's own. Raises nearly anything for what is no pickle."""
    return _Machine(bytes(data), rules).run()


def check_keys(keys: Iterable[Any]) -> None:
    """ValueError unless they may be hashed: that takes as long, and as deep a C stack, as they are nested."""
    for key in keys:
        if type(key) is str or type(key) is int:
            continue
        left, todo = MAX_NODES, [key]
        while todo:
            value = todo.pop()
            left -= 1
            if left < 0:
                raise ValueError("a key is nested too deeply")
            todo.extend(value if isinstance(value, tuple) else getattr(value, "__dict__", {}).values())


def check_nesting(value: Any) -> None:
    """ValueError if walking through the value would take very deep calls, or very many."""
    known: dict[int, tuple[int, int]] = {}  # (nodes, depth) by id
    path: list[tuple[Any, Iterator[Any], int, int]] = [(value, _children(value), 1, 1)]
    while path:
        parent, children, nodes, depth = path.pop()
        for child in children:
            if id(child) not in known:
                known[id(child)] = 1, 1  # as long as it is under way: what comes back to itself ends there
                path += (parent, children, nodes, depth), (child, _children(child), 1, 1)
                break
            more, below = known[id(child)]
            nodes, depth = nodes + more, max(depth, below + 1)
        else:
            known[id(parent)] = nodes, depth
            if path:
                above, others, count, deep = path.pop()
                path.append((above, others, count + nodes, max(deep, depth + 1)))
        if nodes > MAX_EXPANDED or depth > MAX_DEPTH or len(path) > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep, or is more than {MAX_EXPANDED:,} values")


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        return iter([*value.keys(), *value.values()])
    return iter(value if isinstance(value, list | tuple | set | frozenset) else ())


class _Machine:
    def __init__(self, data: bytes, rules: Rules) -> None:
        self.data, self.at, self.rules = data, 0, rules
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        data, operations = self.data, _OPERATIONS
        while True:
            code = data[self.at]
            self.at += 1
            if code == _STOP:
                return self.stack.pop()
            operation = operations.get(code)
            if operation is None:
                raise ValueError(f"byte {self.at - 1} is opcode {code:#04x}, which pickles of plain data do not have")
            operation(self)

    def take(self, count: int) -> bytes:
        taken = self.data[self.at : self.at + count]
        if len(taken) != count:
            raise ValueError(f"it ends at byte {len(self.data)}, {count} were to come behind byte {self.at}")
        self.at += count
        return taken

    def number(self, form: struct.Struct) -> Any:
        return form.unpack(self.take(form.size))[0]

    def line(self) -> str:
        end = self.data.index(b"\n", self.at)
        text, self.at = self.data[self.at : end].decode(), end + 1
        return text

    def since_mark(self) -> list[Any]:
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, OrderedDict, Counter) or len(values) % 2:
            raise ValueError(f"items are set on a {type(target).__name__}")
        check_keys(values[::2])
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[key] = value

    def extend(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError(f"values are appended to a {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(values)

    def add(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not set:
            raise ValueError(f"values are added to a {type(self.stack[-1]).__name__}")
        check_keys(values)
        self.stack[-1].update(values)

    def find(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise ValueError("the name of a global is none")
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        self.stack.append(self.rules.find(module, name))

    def make(self, by: Callable[[Any, tuple[Any, ...]], Any]) -> None:
        args, what = self.stack.pop(), self.stack.pop()
        if type(args) is not tuple:
            raise ValueError("arguments are no tuple")
        self.stack.append(by(what, args))

    def build(self) -> None:
        state = self.stack.pop()
        self.rules.build(self.stack[-1], state)

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise ValueError("a tuple lacks values")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def global_of_stack(self) -> None:
        name = self.stack.pop()
        self.find(self.stack.pop(), name)

    def put(self, number: int) -> None:
        self.memo[number] = self.stack[-1]

    def text(self, form: struct.Struct) -> None:
        self.stack.append(str(self.take(self.number(form)), "utf-8", "surrogatepass"))


_STOP = pickle.STOP[0]
_U1, _U2, _U4, _U8, _I4, _F8 = map(struct.Struct, ("<B", "<H", "<I", "<Q", "<i", ">d"))
_OPERATIONS: dict[int, Callable[[_Machine], Any]] = {
    code[0]: operation
    for code, operation in {
        pickle.PROTO: lambda m: m.take(1),
        pickle.FRAME: lambda m: m.take(8),
        pickle.MARK: lambda m: m.marks.append(len(m.stack)),
        pickle.POP: lambda m: m.stack.pop(),
        pickle.NONE: lambda m: m.stack.append(None),
        pickle.NEWTRUE: lambda m: m.stack.append(True),
        pickle.NEWFALSE: lambda m: m.stack.append(False),
        pickle.BININT: lambda m: m.stack.append(m.number(_I4)),
        pickle.BININT1: lambda m: m.stack.append(m.number(_U1)),
        pickle.BININT2: lambda m: m.stack.append(m.number(_U2)),
        pickle.LONG1: lambda m: m.stack.append(pickle.decode_long(m.take(m.number(_U1)))),
        pickle.LONG4: lambda m: m.stack.append(pickle.decode_long(m.take(m.number(_U4)))),
        pickle.BINFLOAT: lambda m: m.stack.append(m.number(_F8)),
        pickle.SHORT_BINUNICODE: lambda m: m.text(_U1),
        pickle.BINUNICODE: lambda m: m.text(_U4),
        pickle.BINUNICODE8: lambda m: m.text(_U8),
        pickle.SHORT_BINBYTES: lambda m: m.stack.append(m.take(m.number(_U1))),
        pickle.BINBYTES: lambda m: m.stack.append(m.take(m.number(_U4))),
        pickle.BINBYTES8: lambda m: m.stack.append(m.take(m.number(_U8))),
        pickle.EMPTY_TUPLE: lambda m: m.stack.append(()),
        pickle.TUPLE1: lambda m: m.tuple_of(1),
        pickle.TUPLE2: lambda m: m.tuple_of(2),
        pickle.TUPLE3: lambda m: m.tuple_of(3),
        pickle.TUPLE: lambda m: m.stack.append(tuple(m.since_mark())),
        pickle.EMPTY_LIST: lambda m: m.stack.append([]),
        pickle.APPEND: lambda m: m.extend([m.stack.pop()]),
        pickle.APPENDS: lambda m: m.extend(m.since_mark()),
        pickle.EMPTY_DICT: lambda m: m.stack.append({}),
        pickle.SETITEM: lambda m: m.set_items([m.stack.pop(), m.stack.pop()][::-1]),
        pickle.SETITEMS: lambda m: m.set_items(m.since_mark()),
        pickle.EMPTY_SET: lambda m: m.stack.append(set()),
        pickle.ADDITEMS: lambda m: m.add(m.since_mark()),
        pickle.BINPUT: lambda m: m.put(m.number(_U1)),
        pickle.LONG_BINPUT: lambda m: m.put(m.number(_U4)),
        pickle.MEMOIZE: lambda m: m.put(len(m.memo)),
        pickle.BINGET: lambda m: m.stack.append(m.memo[m.number(_U1)]),
        pickle.LONG_BINGET: lambda m: m.stack.append(m.memo[m.number(_U4)]),
        pickle.GLOBAL: lambda m: m.find(m.line(), m.line()),
        pickle.STACK_GLOBAL: lambda m: m.global_of_stack(),
        pickle.REDUCE: lambda m: m.make(m.rules.call),
        pickle.NEWOBJ: lambda m: m.make(m.rules.new),
        pickle.BUILD: lambda m: m.build(),
        pickle.BINPERSID: lambda m: m.stack.append(m.rules.persistent(m.stack.pop())),
    }.items()
}
