"""Stored objects as lines to be read by people: nothing is unpickled, and no object is made.

The nodes are those of ``docs/format.md``, Objects: whatever is no plain value is an array of a tag
and parts. Types that only some program has registered are shown by name, with what stands for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

from handfast.errors import FormatError
from handfast.store.objects import VERSION, child

__all__ = ["Line", "outline"]

LIST, TUPLE, DICT, ORDERED, COUNTER, DEFAULTDICT = range(6)
DEQUE, TENSOR, BIG_INT, WILD_STR, REGISTERED, PICKLE = 8, 20, 21, 22, 30, 31
NAMES: Final = {
    LIST: "list", TUPLE: "tuple", DICT: "dict", ORDERED: "OrderedDict", COUNTER: "Counter",
    DEFAULTDICT: "defaultdict", 6: "set", 7: "frozenset", DEQUE: "deque", 9: "complex",
    10: "slice", 11: "range", 12: "Path", 13: "PurePosixPath", 14: "PureWindowsPath", 15: "date",
    16: "time", 17: "datetime", 18: "timedelta", 19: "timezone", TENSOR: "tensor", BIG_INT: "int",
    WILD_STR: "str", 24: "numpy.dtype", 25: "numpy scalar", 26: "numpy.ndarray",
}  # fmt: skip
MAPPINGS: Final = (DICT, ORDERED, COUNTER, DEFAULTDICT)
BOXES: Final = (LIST, TUPLE, DEQUE)
WIDTH: Final = 60  # characters of a value that are shown


class Line(msgspec.Struct, frozen=True):
    """One value of the tree: its path, its type, and what it is, shortened."""

    path: str
    type: str
    text: str


def outline(data: bytes, where: str = "") -> tuple[Line, ...]:
    """List the values of encoded objects, one line each; boxes of plain values are one line.

    Raises FormatError, naming ``where``, for bytes that are no encoded objects of this version.
    """
    try:
        root = msgspec.msgpack.decode(data)
        if type(root) is not list or root[:1] != [VERSION] or len(root) != 2:
            raise ValueError(f"no objects of format {VERSION}")
        whole, *lines = _lines(root[1], "")
        return tuple(lines or [whole])
    except (ValueError, TypeError, IndexError, RecursionError) as error:
        raise FormatError(f"{where}: its objects can't be shown: {error}") from error


def _lines(node: Any, path: str) -> Iterator[Line]:
    if not _compound(node):
        yield Line(path, type(node).__name__, _short(repr(node)))
        return
    tag, parts = node[0], node[1:]
    if tag == REGISTERED:
        name, stands = parts
        own, *rest = _lines(stands, path)
        yield Line(path, str(name), own.text)
        yield from rest
    elif tag == PICKLE:
        yield Line(path, "pickle", f"{len(parts[1])} bytes, not read")
    elif tag in (*MAPPINGS, *BOXES) and not _flat(node):
        inside = list(_entries(tag, parts, path))
        yield Line(path, NAMES[tag], f"{len(inside)} entries")
        for where, item in inside:
            yield from _lines(item, where)
    else:
        yield Line(path, NAMES.get(tag, f"tag {tag}"), _inline(node))


def _entries(tag: int, parts: Sequence[Any], path: str) -> Iterator[tuple[str, Any]]:
    if tag in MAPPINGS:
        pairs = parts[1:] if tag == DEFAULTDICT else parts
        for key, item in zip(pairs[::2], pairs[1::2], strict=True):
            yield (child(path, key) if type(key) is str else f"{path}[{_inline(key)}]"), item
    else:
        for index, item in enumerate(parts[1:] if tag == DEQUE else parts):
            yield f"{path}[{index}]", item


def _compound(node: Any) -> bool:
    if type(node) is not list:
        return False
    if not node or type(node[0]) is not int:
        raise ValueError("a node without a tag")
    return True


def _flat(node: Any) -> bool:
    """Say whether a value fits one line: nothing inside it has parts that deserve their own."""
    if not _compound(node):
        return True
    if node[0] in (*MAPPINGS, REGISTERED, PICKLE, TENSOR):
        return node[0] in MAPPINGS and len(node) == 1
    return not any(_compound(part) and not _flat(part) for part in node[1:])


def _inline(node: Any) -> str:
    """A value in one line."""
    if not _compound(node):
        return _short(repr(node))
    tag, parts = node[0], node[1:]
    if tag == TENSOR:
        return f"at {parts[0]}"
    if tag == BIG_INT:
        value = int.from_bytes(parts[0], "big", signed=True)
        return _short(str(value) if value.bit_length() < 256 else hex(value))
    if tag == WILD_STR:
        return _short(ascii(str(parts[0], "utf-8", "surrogatepass")))
    if tag == 26:
        return f"{_inline(parts[0])} {_inline(parts[1])}"
    inner = ", ".join(_inline(part) for part in parts[:12]) + (", ..." * (len(parts) > 12))
    return _short(f"({inner})" if tag != 24 or len(parts) > 1 else inner)


def _short(text: str) -> str:
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 3]}..."
