"""Which tensors in boxes of plain values come anew at a restore, and which give way.

A box (a dict, list, deque or tuple of the state) is filled as the training goes: a best copy comes,
a history grows. A fresh one has its tensors still to get, and after a rollback a live one has some
too many. What can't be replaced, a module or a live tensor that is trained, is refused where only
one side has it. The restore itself is :class:`handfast.torch.apply._Merge`, which decides alike.
"""

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

from handfast.store.objects import TensorRef, child
from handfast.torch.capture import Captured
from handfast.torch.names import matches
from handfast.torch.saved import KINDS, Saved
from handfast.torch.tree import Kind, above, entries, in_place, refers

__all__ = ["Changes", "bound", "changes"]


def bound(live: Captured) -> AbstractSet[str]:
    """The paths of boxes that hold a live thing which is no mere value."""
    here: Any = live.objects[KINDS]
    return above(p for p, kind in here.items() if kind != Kind.TENSOR or p in live.trained)


class Changes(NamedTuple):
    """The paths of live tensors that give way, to what else was saved there or as a list's end;
    and of saved tensors for which a box has a place, and no tensor yet.
    """

    gone: AbstractSet[str]
    anew: AbstractSet[str]


def changes(live: Captured, saved: Saved, only: Sequence[str]) -> Changes:
    """What a restore does about tensors in boxes that only one side has."""
    found = [change for change in _changes(live, saved) if matches(change.place, only)]
    gone = frozenset(change.path for change in found if not change.anew)
    return Changes(gone, frozenset(change.path for change in found if change.anew))


class _Change(NamedTuple):
    """A tensor that only one side has, and the path of what is put in, or taken out, for it."""

    path: str
    place: str
    anew: bool


class _Sides(NamedTuple):
    """The kinds of things by path; boxes that hold any, that can't be replaced, or not be made."""

    now: Mapping[str, str]
    was: Mapping[str, str]
    trained: AbstractSet[str]
    alive: AbstractSet[str]
    bound: AbstractSet[str]
    beyond: AbstractSet[str]


def _changes(live: Captured, saved: Saved) -> Iterator[_Change]:
    here: Any = live.objects[KINDS]
    lasting = [path for path, kind in saved.kinds.items() if kind != Kind.TENSOR]
    beyond = above(lasting).union(lasting)
    sides = _Sides(here, saved.kinds, live.trained, above(here), bound(live), beyond)
    for name, tree in saved.objects.items():
        path = child("", name)
        if name in live.objects and name != KINDS and path not in here:
            yield from _inside(live.objects[name], tree, path, sides, placed=False)


def _inside(now: Any, was: Any, path: str, sides: _Sides, *, placed: bool) -> Iterator[_Change]:
    """What changes at a place; ``placed``: what holds it could take another value."""
    free = placed and path not in sides.beyond and path not in sides.bound
    if path in sides.now:
        tensor = sides.now[path] == Kind.TENSOR and path not in sides.trained
        if free and tensor and not isinstance(was, TensorRef):
            yield _Change(path, path, anew=False)
            yield from _under(was, path, path, sides.was, anew=True)
        return
    alive = path in sides.alive
    if not in_place(now, was, placed=placed, alive=alive):
        # tensors on both sides stand in each other's way: that is refused
        if free and not (alive and refers(was)):
            yield from _under(now, path, path, sides.now, anew=False)
            yield from _under(was, path, path, sides.was, anew=True)
        return
    here, before = dict(entries(now)), dict(entries(was))
    for key in {**before, **here}:
        where = child(path, key)
        if key in here and key in before:
            inside = placed or type(now) is not tuple
            yield from _inside(here[key], before[key], where, sides, placed=inside)
        elif key in before:
            if where not in sides.beyond and (placed or type(now) is not tuple):
                yield from _under(before[key], where, where, sides.was, anew=True)
        elif not isinstance(now, Mapping) and (placed or type(now) is not tuple):
            tensors = list(_under(here[key], where, where, sides.now, anew=False))
            if where not in sides.bound and sides.trained.isdisjoint(t.path for t in tensors):
                yield from tensors


def _under(
    tree: Any, path: str, place: str, kinds: Mapping[str, str], *, anew: bool
) -> Iterator[_Change]:
    """The tensors in a tree that stand by themselves."""
    if path in kinds:
        if kinds[path] == Kind.TENSOR:
            yield _Change(path, place, anew)
        return
    for key, item in entries(tree):
        yield from _under(item, child(path, key), place, kinds, anew=anew)
