"""The tree that a pickle's nodes become: dicts, lists, tuples, atoms, values, and objects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Final

import msgspec

from handfast.audit.extent import Extent
from handfast.audit.inert import NOTHING
from handfast.errors import FormatError
from handfast.store.objects import child

__all__ = ["DEEP", "Object", "inside", "leaves", "values"]

DEEP: Final = 1000
"""Containers in containers that are followed to a leaf."""

PLACES: Final = 1 << 24
"""Places of a tree that are looked at: what is shared a thousand times has a thousand."""


class Object(msgspec.Struct, eq=False):
    """What some class would have made of its arguments and its state.

    ``type`` is the full name of the class, or of the function that was to be called. ``fields`` are
    the attributes by name; ``state`` is what was given in their stead, where that names none.
    ``items`` were appended or added, ``pairs`` set by key.
    """

    type: str
    args: tuple[Any, ...] = ()
    fields: Mapping[Any, Any] = NOTHING
    state: Any = None
    items: Sequence[Any] = ()
    pairs: Mapping[Any, Any] = NOTHING

    def __repr__(self) -> str:
        """Without its parts, which may be of any size."""
        return f"<{self.type}>"


def values(node: Any) -> Extent | None:
    """The values of a node; None where it has none.

    Of a parameter with attributes, or another object made of one tensor, they are that tensor's; of
    a DTensor they are the local ones.
    """
    for _ in range(DEEP):
        if type(node) is not Object:
            break
        local = node.fields.get("_local_tensor")
        node = local if local is not None else node.args[0] if len(node.args) == 1 else None
    return node if type(node) is Extent else None


def leaves(root: Any) -> Iterator[tuple[str, Any]]:
    """Each path and what lies there: atoms, values, classes, and objects before their parts.

    What is reached by several paths is told for each; what contains itself is not entered again.
    Paths are as handfast's own: "optimizer/state/0/step". Raises FormatError for a tree that is too
    deep or has too many places.
    """
    ahead = [iter([("", root)])]
    trail = [0]  # of each container that is open, its id
    open_now = set(trail)
    places = 0
    while ahead:
        found = next(ahead[-1], None)
        if found is None:
            ahead.pop()
            open_now.discard(trail.pop())
            continue
        path, node = found
        places += 1
        if places > PLACES or len(trail) > DEEP:
            raise FormatError(
                f"{path:.200}: a tree of more than {PLACES:,} places or {DEEP:,} levels. What to "
                "do: if you trust its writer, save less structure"
            )
        parts = inside(path, node)
        if parts is None or type(node) is Object:
            yield path, node
        if parts is not None and id(node) not in open_now:
            ahead.append(parts)
            trail.append(id(node))
            open_now.add(id(node))


def inside(path: str, node: Any) -> Iterator[tuple[str, Any]] | None:
    """The parts of a container with their paths; None for what is none."""
    kind = type(node)
    named: Iterable[tuple[Any, Any]] = ()
    listed: Iterable[Any] = ()
    if kind is dict:
        named = node.items()
    elif kind in (list, tuple, set, frozenset):
        listed = node
    elif kind is Object:
        named = chain(node.fields.items(), node.pairs.items())
        listed = chain(node.args, node.items, () if node.state is None else (node.state,))
    else:
        return None
    return ((child(path, key), part) for key, part in chain(named, enumerate(listed)))
