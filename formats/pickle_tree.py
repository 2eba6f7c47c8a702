"""What a pickle says, as a tree: nothing that it names is imported, made or called.

A pickle is a program for a stack machine, and Python's own machine imports and calls whatever the program names. This one knows
only the instructions that data needs, puts a ``Call`` where Python's would call, and refuses every name it was not told to expect,
as soon as it is read. It reads a file by position; a string of bytes becomes its place in the file, unread, however large it is.

Bounds: steps in proportion to the file's size, and at most ``MAX_STEPS``; strings of at most ``MAX_STRING`` bytes, together
``MAX_TEXT``. Keys of dictionaries are strings, and no value is compared, hashed, copied or walked here: a small program that nests
shared tuples a thousand deep costs a thousand steps, not 2**1000.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import UnreadableError
from .files import ReadableFile

MAX_STEPS = 3_000_000
"""Of one file: a tensor takes about ninety."""
MAX_STRING = 4096
MAX_TEXT = 64 << 20
_WINDOW = 1 << 16


@dataclass(frozen=True, slots=True)
class Name:
    """A name that a pickle would import: ``module.name``."""

    path: str


@dataclass(slots=True)
class Call:
    """What a pickle would call, with what it would call it with; ``state`` is what it would set on the result.

    held    what it would put into an OrderedDict that it made
    """

    name: str
    arguments: tuple[Any, ...]
    state: Any = None
    held: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """A string of bytes: where it lies in the file."""

    begin: int
    length: int


@dataclass(frozen=True, slots=True)
class Reference:
    """A persistent id: whatever the program that wrote the pickle keeps apart."""

    what: Any


class PickleFile:
    """The pickles in a file.

    names    what they may name, as ``module.name``
    """

    def __init__(self, file: ReadableFile, names: frozenset[str]) -> None:
        self._file, self._names = file, names
        self._steps = min(1000 + file.size // 2, MAX_STEPS)
        self._text = MAX_TEXT
        self._window, self._start = b"", 0

    def bytes_at(self, position: int, length: int, end: int) -> bytes:
        """``length`` (at most ``_WINDOW``) bytes from ``position``, all before ``end``."""
        if position + length > end:
            raise self._bad(position, f"needs {length} bytes more, and {max(end - position, 0)} are left; it is truncated: copy it again")
        begin = position - self._start
        if begin < 0 or begin + length > len(self._window):
            self._window, self._start, begin = bytes(self._file.read(position, min(_WINDOW, self._file.size - position))), position, 0
        return self._window[begin : begin + length]

    def _bad(self, position: int, what: str) -> UnreadableError:
        return UnreadableError(f"{self._file.path.name}: the pickle at byte {position} {what}")

    def read(self, begin: int, end: int) -> tuple[Any, int]:
        """The pickle that begins at byte ``begin`` and must stop before ``end``, as a tree, and where it stops.

        The tree is of int, str, bool, None, tuple, list, dict (with str keys), ``Name``, ``Call``, ``Place`` and ``Reference``.
        raises UnreadableError for a damaged pickle, one with other instructions, or one that names what it must not
        """
        return _Machine(self, begin, end).run()

    def spend_step(self, position: int) -> None:
        """Count a step."""
        self._steps -= 1
        if self._steps < 0:
            raise self._bad(position, "takes more steps than tensors of this file's size can need; it is no checkpoint")

    def text(self, position: int, length: int, end: int) -> str:
        """A string; UnreadableError if it is too long to be a name, or no text."""
        self._text -= length
        if length > MAX_STRING or self._text < 0:
            raise self._bad(position, f"has a string of {length} bytes, more than names of tensors need")
        try:
            return self.bytes_at(position, length, end).decode()
        except UnicodeDecodeError:
            raise self._bad(position, "has a string that is not UTF-8; it is damaged") from None

    def line(self, position: int, end: int) -> tuple[str, int]:
        """The text up to the next newline, and the byte after that."""
        part = self.bytes_at(position, min(256, max(end - position, 0)), end)
        length = part.find(b"\n")
        if length < 0:
            raise self._bad(position, "has a name that does not end; it is damaged")
        return self.text(position, length, end), position + length + 1

    def name(self, position: int, module: str, attribute: str) -> Name:
        """``module.attribute``; UnreadableError unless it is expected."""
        path = f"{module}.{attribute}"
        if path not in self._names:
            raise self._bad(position, f"names {path[:120]!r}, which tensors do not need; nothing was run: do not trust this file")
        return Name(path)


_CONSTANTS = {b"N": None, b"\x88": True, b"\x89": False, b")": ()}
_INTEGERS = {b"J": (4, True), b"K": (1, False), b"M": (2, False)}
_STRINGS = {b"X": 4, b"\x8c": 1, b"\x8d": 8}
_BYTES = {b"B": 4, b"C": 1, b"\x8e": 8}
_TUPLES = {b"\x85": 1, b"\x86": 2, b"\x87": 3}
_GET = {b"h": 1, b"j": 4}
_PUT = {b"q": 1, b"r": 4}


@dataclass(slots=True)
class _Machine:
    """One pickle being read. ``_stack`` holds what was pushed since the last mark, ``_marks`` the stacks below."""

    file: PickleFile
    position: int
    end: int
    _stack: list[Any] = field(default_factory=list)
    _marks: list[list[Any]] = field(default_factory=list)
    _memo: dict[int, Any] = field(default_factory=dict)

    def run(self) -> tuple[Any, int]:
        while True:
            at = self.position
            self.file.spend_step(at)
            code = self._take(1)
            if code == b".":
                value = self._pop(1)[0]
                if self._stack or self._marks:
                    raise self._bad(at, "stops with values left over; it is damaged")
                return value, self.position
            self._step(code, at)

    def _step(self, code: bytes, at: int) -> None:  # the instructions of pickle protocols 2 to 4 that data needs
        push = self._stack.append
        if code in _CONSTANTS:
            push(_CONSTANTS[code])
        elif code in _INTEGERS:
            push(int.from_bytes(self._take(_INTEGERS[code][0]), "little", signed=_INTEGERS[code][1]))
        elif code == b"\x8a":  # LONG1
            push(int.from_bytes(self._take(self._number(1)), "little", signed=True))
        elif code in _STRINGS:
            length = self._number(_STRINGS[code])
            push(self.file.text(self.position, length, self.end))
            self.position += length
        elif code in _BYTES:
            length = self._number(_BYTES[code])
            if length > self.end - self.position:
                raise self._bad(
                    at, f"holds {length} bytes of data, and {self.end - self.position} are left; it is truncated: copy it again"
                )
            push(Place(self.position, length))
            self.position += length
        elif code == b"}":
            push({})
        elif code == b"]":
            push([])
        elif code == b"(":
            self._marks.append(self._stack)
            self._stack = []
        elif code == b"t":
            items = tuple(self._to_mark(at))
            self._stack.append(items)
        elif code in _TUPLES:
            push(tuple(self._pop(_TUPLES[code])))
        elif code in {b"s", b"u"}:
            self._set_items(self._pop(2) if code == b"s" else self._to_mark(at), at)
        elif code in {b"a", b"e"}:
            items_ = self._pop(1) if code == b"a" else self._to_mark(at)
            if type(target := self._top(at)) is not list:
                raise self._bad(at, "appends to what is no list; it is damaged")
            target.extend(items_)
        elif code in {b"c", b"\x93"}:
            push(self._name(code, at))
        elif code == b"R":
            function, arguments = self._pop(2)
            if type(function) is not Name or type(arguments) is not tuple:
                raise self._bad(at, "calls what is no function; it is damaged")
            push(Call(function.path, arguments))
        elif code == b"b":
            (state,) = self._pop(1)
            if type(made := self._top(at)) is not Call or made.state is not None:
                raise self._bad(at, "sets the state of what cannot have one; it is damaged")
            made.state = state
        elif code == b"Q":
            push(Reference(self._pop(1)[0]))
        elif code == b"\x94":  # MEMOIZE
            self._memo[len(self._memo)] = self._top(at)
        elif code in _PUT:
            self._memo[self._number(_PUT[code])] = self._top(at)
        elif code in _GET:
            if (number := self._number(_GET[code])) not in self._memo:
                raise self._bad(at, f"asks for its value {number}, which it has not kept; it is damaged")
            push(self._memo[number])
        elif code == b"\x80":  # PROTO
            if (protocol := self._number(1)) > 5:
                raise self._bad(at, f"is of protocol {protocol}, wanted at most 5")
        elif code == b"\x95":  # FRAME: how much to read ahead
            self._take(8)
        else:
            raise self._bad(at, f"has the instruction {code!r}, which tensors do not need; nothing was run: do not trust this file")

    def _bad(self, at: int, what: str) -> UnreadableError:
        return self.file._bad(at, what)

    def _take(self, length: int) -> bytes:
        found = self.file.bytes_at(self.position, length, self.end)
        self.position += length
        return found

    def _number(self, length: int) -> int:
        return int.from_bytes(self._take(length), "little")

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise self._bad(self.position, "takes more values than it has; it is damaged")
        found = self._stack[-count:]
        del self._stack[-count:]
        return found

    def _top(self, at: int) -> Any:
        if not self._stack:
            raise self._bad(at, "takes more values than it has; it is damaged")
        return self._stack[-1]

    def _to_mark(self, at: int) -> list[Any]:
        if not self._marks:
            raise self._bad(at, "goes back to a mark that it has not set; it is damaged")
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _set_items(self, items: Sequence[Any], at: int) -> None:
        target = self._top(at)
        if isinstance(target, Call) and target.name == "collections.OrderedDict" and not target.arguments:
            if target.held is None:
                target.held = {}
            target = target.held
        if type(target) is not dict or len(items) % 2:
            raise self._bad(at, "sets items of what is no dictionary; it is damaged")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str or key in target:
                raise self._bad(at, f"has the key {key[:120]!r} twice" if type(key) is str else "has a key that is no string")
            target[key] = value

    def _name(self, code: bytes, at: int) -> Name:
        if code == b"c":
            module, self.position = self.file.line(self.position, self.end)
            attribute, self.position = self.file.line(self.position, self.end)
        else:
            module, attribute = self._pop(2)
            if type(module) is not str or type(attribute) is not str:
                raise self._bad(at, "names something by what is no string; it is damaged")
        return self.file.name(at, module, attribute)
