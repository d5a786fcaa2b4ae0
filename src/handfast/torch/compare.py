"""What a saved state and a live one differ in, found before anything is changed."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Final, NamedTuple

from torch import Tensor

from handfast.checkpoint.spelling import some
from handfast.core.verdict import Verdict
from handfast.errors import Refused
from handfast.store.image import TensorSpec
from handfast.store.manifest import Manifest
from handfast.store.objects import TensorRef, child
from handfast.torch import memory
from handfast.torch.boxes import bound, changes
from handfast.torch.capture import Captured
from handfast.torch.names import matches
from handfast.torch.saved import EXTRA, GRADS, KINDS, RNG, UNSYNCED, Saved, Source
from handfast.torch.tensors import local
from handfast.torch.tree import Kind, above, entries, holder, in_place, refers

__all__ = [
    "RESTORE",
    "Difference",
    "Ways",
    "check_components",
    "check_patterns",
    "differences",
    "homeless",
    "lacking",
    "refuse",
    "refuse_homeless",
    "refuse_lacking",
    "torn",
]


class Difference(NamedTuple):
    """One thing that a restore would get wrong: where, in what respect, and both sides of it."""

    path: str
    what: str
    saved: str
    live: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}: saved {self.saved}, live {self.live}"


class Ways(NamedTuple):
    """What else the caller may ask for, as remedies say it: a restore, if nothing else is said."""

    part: str = "restore a part of them with only= or strict=False"
    rest: str = "restore the rest with only="


RESTORE: Final = Ways()
ABSENT = "nothing"
NONE: Final[AbstractSet[str]] = frozenset()
_OURS = (KINDS, EXTRA, RNG, GRADS)


def differences(
    live: Captured, saved: Saved, *, only: Sequence[str] = ("**",), strict: bool = True
) -> list[Difference]:
    """Everything that a restore of ``saved`` into ``live`` would get wrong, by path.

    Compared are the live things and their kinds; the boxes that hold them, and those that can't be
    replaced; the tensors of modules and plain ones, by path, dtype, local and global shape, offset
    and ties; which extra state modules have; optimizers by the names in their groups; scalers by
    whether they are enabled. Their state is not: it is made as it was saved. With ``strict=False``
    what only one side has is none.
    """
    here: Any = live.objects[KINDS]
    found = [*_things(live, saved), *_components(live, saved), *_tensors(live, saved, only)]
    for path, now, was in _paired(live.objects, saved.objects, "", here):
        if here[path] == saved.kinds.get(path) and here[path] in _HELD_APART:
            found += _HELD_APART[here[path]](path, now, was)
    return sorted(
        difference
        for difference in found
        if matches(difference.path, only)
        and (strict or ABSENT not in (difference.saved, difference.live))
    )


def torn(
    live: Mapping[str, Tensor], source: Source, only: Sequence[str], gone: AbstractSet[str] = NONE
) -> list[Difference]:
    """Live tensors that overlap, where what they are to be can't lie in the same bytes.

    What is not restored is to stay as it is, but for what is ``gone`` by then.
    """
    parts = {path: local(tensor) for path, tensor in live.items() if path not in gone}

    def value(path: str) -> Tensor:
        asked = matches(path, only) and source.saved.spec(path)
        return source.view(path) if asked else parts[path]

    return [
        Difference(path, "memory", "values of its own", f"bytes that {whose} has, too")
        for path, other in sorted(memory.torn(parts, value))
        for whose in [other if other != path else "another element"]
    ]


def refuse(found: Sequence[Difference], shard: str, ways: Ways = RESTORE) -> None:
    """Raise Refused if there are differences: counts of each kind, and the first ten."""
    if not found:
        return
    counts = Counter(difference.what for difference in found)
    kinds = ", ".join(f"{count} of {what}" for what, count in counts.items())
    shown = "".join(f"\n  {difference}" for difference in found[:10])
    count = "1 difference" if len(found) == 1 else f"{len(found)} differences"
    more = f"\n  and {len(found) - 10} more" if len(found) > 10 else ""
    raise Refused(
        f"the live state has another structure than the saved one, {count} "
        f"({kinds}):{shown}{more}\n",
        verdict=Verdict.FOREIGN,
        shards=(shard,),
        remedy=f"build the model and optimizers as they were at the save, or {ways.part}",
    )


def lacking(live: Captured, saved: Saved, *, only: Sequence[str] = ("**",)) -> list[str]:
    """The paths that a restore would ask for and that none of the shards stores.

    Modules' tensors are found by ``differences``, all else here.
    """
    asked = {*_asked_in_place(live, saved, only), *_asked_of_trees(live, saved, only)}
    asked |= {ref.path for ref in _references(saved.objects.get(EXTRA))}
    for path, tree in saved.objects.get(GRADS, {}).items():
        asked |= {ref.path for ref in _references(tree) if matches(path, only)}
    paths = {ref.path if isinstance(ref, TensorRef) else ref for ref in asked}
    return sorted(path for path in paths if saved.spec(path) is None)


def homeless(live: Captured, source: Source, *, only: Sequence[str] = ("**",)) -> list[str]:
    """The paths of DTensors that a restore would make, and knows no mesh of the live state for."""
    asked = _asked_of_trees(live, source.saved, only)
    refs = [ref for ref in asked if isinstance(ref, TensorRef)]
    return sorted({ref.path for ref in refs if source.place(ref) is None})


def refuse_homeless(paths: Sequence[str], shard: str, ways: Ways = RESTORE) -> None:
    """Raise Refused if DTensors would have no mesh, naming the first ten."""
    if not paths:
        return
    raise Refused(
        f"{len(paths)} tensors were parts of DTensors, and it can't be told on which mesh of the "
        f"live state they belong: {some(paths, 10)}",
        verdict=Verdict.FOREIGN,
        shards=(shard,),
        remedy="let the live state have them first, as DTensors of that shape on the mesh that "
        f"they were on; or {ways.rest}",
    )


def refuse_lacking(paths: Sequence[str], shards: Sequence[str], ways: Ways = RESTORE) -> None:
    """Raise Refused if a restore would ask for what is not there, naming the first ten."""
    if not paths:
        return
    raise Refused(
        f"{len(paths)} tensors that {shards[0]} refers to are in none of the shards that hold this "
        f"rank's state: {some(paths, 10)}",
        verdict=Verdict.MISSING,
        shards=shards,
        remedy=f"{ways.rest}, or choose another epoch with step=",
    )


def refuse_unlike(own: Manifest, first: Manifest, only: Sequence[str]) -> None:
    """Raise Refused where a rank left to the first of its node what that one holds otherwise.

    No vote is cast on such an epoch, so the directories are not those that were written together.
    """
    unlike = [path for path in own.apart(first) if matches(path, only)]
    if not unlike:
        return
    raise Refused(
        f"{some(unlike, 10)}: shard {own.stamp.shard} left them to shard "
        f"{first.stamp.shard}, whose copy is not what it was",
        verdict=Verdict.MIXED,
        shards=(first.stamp.domain,),
        remedy="put the directories back that were written together, or choose another epoch with "
        "step=",
    )


def _asked_in_place(live: Captured, saved: Saved, only: Sequence[str]) -> Iterator[str]:
    tied = saved.aliases.keys() & {*(spec.path for spec in live.specs), *live.aliases}
    here: Any = live.objects[KINDS]
    yield from (path for path in _in_place(tied, _Kinds(here)) if matches(path, only))


def _asked_of_trees(live: Captured, saved: Saved, only: Sequence[str]) -> Iterator[TensorRef | str]:
    trees = {name: tree for name, tree in saved.objects.items() if name not in _OURS}
    both = {name: tree for name, tree in trees.items() if name in live.objects}
    yield from _asked_inside(both, live.objects, "", saved.kinds, only)


def _asked(
    was: Any, now: Any, path: str, kinds: Mapping[str, str], only: Sequence[str]
) -> Iterator[TensorRef | str]:
    """What a restore takes out of a saved tree, on one side or on both.

    References, and the paths of optimizers' tensors, which are made as their parameters are.
    """
    kind = kinds.get(path)
    if kind == Kind.MODULE:
        for key in was:
            if key != UNSYNCED and matches(f"{path}/{key}", only):
                yield from _references(was[key])
    elif kind is None and type(was) is type(now) and any(entries(was)):
        yield from _asked_inside(was, now, path, kinds, only)
    elif matches(path, only):
        yield from _references(was)
        if kind == Kind.OPTIMIZER and isinstance(now, dict):
            stepped = {n for group in now.get("param_groups", ()) for n in group["params"]}
            for keys, _, names in was["tensors"]:
                for name in stepped.intersection(names):
                    yield from (child(f"{path}/state/{name}", key) for key in keys)


def _asked_inside(
    was: Any, now: Any, path: str, kinds: Mapping[str, str], only: Sequence[str]
) -> Iterator[TensorRef | str]:
    here = dict(entries(now))
    for key, item in entries(was):
        where = child(path, key)
        if type(item) is not TensorRef:
            yield from _asked(item, here.get(key), where, kinds, only)
        elif matches(where, only):  # it has nothing inside, whatever stands there now
            yield item


def _references(tree: Any) -> Iterator[TensorRef]:
    if isinstance(tree, TensorRef):
        yield tree
    for _, item in entries(tree):
        yield from _references(item)


def check_patterns(saved: Saved, only: Sequence[str]) -> None:
    """Raise ValueError for a pattern of ``only`` that names nothing that was saved.

    Such a one is a slip, and what it was meant to restore would keep its live values in silence.
    """
    named = [pattern for pattern in only if pattern != "**"]
    if not named:
        return
    paths = sorted(_choices(saved), key=lambda path: (path.count("/"), path))
    for pattern in named:
        if not any(matches(path, (pattern,)) for path in paths):
            raise ValueError(
                f"only={pattern!r} names nothing that was saved and can be restored by itself "
                f"(optimizers, schedulers and their like come whole). There are {some(paths, 10)}. "
                "What to do: name one of these; with strict=False a pattern may name nothing"
            )


def check_components(saved: Saved, names: Iterable[str]) -> None:
    """Raise ValueError for a name that is no component of what was saved."""
    there = [name for name in saved.objects if name not in _OURS]
    for name in names:
        if name not in there:
            raise ValueError(
                f"{name}=: nothing was saved by that name. What to do: name one of these, "
                f"{some(there, 10)}"
            )


def _choices(saved: Saved) -> Iterator[str]:
    """Each path that a restore decides upon by itself."""
    yield from _in_place(saved.paths(), _Kinds(saved.kinds))
    for name, tree in saved.objects.items():
        if name == RNG:
            yield name
        elif name not in (KINDS, EXTRA, GRADS):
            yield from _places(tree, child("", name), saved.kinds)


def _places(tree: Any, path: str, kinds: Mapping[str, str]) -> Iterator[str]:
    yield path
    if kinds.get(path) == Kind.MODULE:
        yield from (f"{path}/{key}" for key in tree if key != UNSYNCED)
    elif path not in kinds:
        for key, item in entries(tree):
            yield from _places(item, child(path, key), kinds)


def _things(live: Captured, saved: Saved) -> Iterator[Difference]:
    """Live things that only one side has, or that are of different kinds."""
    here: Any = live.objects[KINDS]
    for path in {**saved.kinds, **here}:
        was, now = saved.kinds.get(path), here.get(path)
        if was == now:
            continue
        if Kind.TENSOR in (was, now) and {was, now} <= {Kind.TENSOR, None}:
            continue  # compared as tensors
        if _way(was) != _way(now) or _class(was, now) != _class(now, was):
            yield Difference(path, "kind", was or ABSENT, now or ABSENT)


def _components(live: Captured, saved: Saved) -> Iterator[Difference]:
    """Boxes that a restore would leave as they are, or put plain values for the things in them."""
    here: Any = live.objects[KINDS]
    kinds = saved.kinds.keys() | here.keys()
    # Tensors that are no more than values can be made anew; all else stands where it is.
    fixed = bound(live) | above(path for path, kind in saved.kinds.items() if kind != Kind.TENSOR)
    things = _Things(kinds, above(here) | fixed, fixed)
    was, now = ({k: v for k, v in s.objects.items() if k not in _OURS} for s in (saved, live))
    for name in sorted(was.keys() | now.keys()):
        path = child("", name)
        if path in kinds:
            continue  # told of with the things
        if name in was and name in now:
            yield from _box(was[name], now[name], path, things, placed=False)
        elif path not in things.alive:  # else its things are told of
            one, two = (
                type(side[name]).__name__ if name in side else ABSENT for side in (was, now)
            )
            yield Difference(path, "component", one, two)


class _Things(NamedTuple):
    """The paths of live things; of the boxes that hold any; and of those that can't be replaced."""

    kinds: AbstractSet[str]
    alive: AbstractSet[str]
    bound: AbstractSet[str]


def _box(was: Any, now: Any, path: str, things: _Things, *, placed: bool) -> Iterator[Difference]:
    """Hold two boxes against each other; ``placed``: what holds them could take another one."""
    alive = path in things.alive
    fixed = path in things.bound or not placed
    if not in_place(now, was, placed=placed, alive=alive):
        if type(was) is not type(now) and (fixed or (alive and refers(was))):
            yield Difference(path, "box", type(was).__name__, type(now).__name__)
        return
    one, two = dict(entries(was)), dict(entries(now))
    if type(was) is tuple and fixed and len(one) != len(two):
        yield Difference(path, "length", str(len(one)), str(len(two)))
    inside = placed or type(now) is not tuple
    for key in one.keys() & two.keys():
        where = child(path, key)
        if where not in things.kinds:
            yield from _box(one[key], two[key], where, things, placed=inside)


def _way(kind: str | None) -> str | None:
    base = (kind or "").partition(":")[0]
    return Kind(base).restored_by if base in set(Kind) else kind


def _class(kind: str | None, other: str | None) -> str:
    """The class that a kind names, where both do; older images say nothing of those inside."""
    one, two = ((side or "").partition(":")[2] for side in (kind, other))
    if "(" in one and "(" not in two:
        one = one.partition("(")[0]
    return one if two else ""


class _Kinds(dict[str, str | None]):
    """The kind of the live thing that a tensor's path belongs to; None if it is in a box.

    Made of the kinds of the live things; what is asked for once is kept.
    """

    def __missing__(self, path: str) -> str | None:
        above = holder(path)
        found = self[path] = self[above] if above else None
        return found


def _in_place(paths: Iterable[str], kinds: _Kinds) -> set[str]:
    """The paths of tensors that a restore copies into live ones: of modules, and plain ones."""
    return {path for path in paths if kinds[path] in (Kind.MODULE, Kind.TENSOR)}


def _tensors(live: Captured, saved: Saved, only: Sequence[str]) -> Iterator[Difference]:
    specs = {spec.path: spec for spec in live.specs}
    specs |= {path: specs[kept] for path, kept in live.aliases.items()}
    here: Any = live.objects[KINDS]
    kinds = _Kinds(here)
    now = _in_place(specs, kinds)
    was = _in_place(saved.paths(), kinds if here == saved.kinds else _Kinds(saved.kinds))
    if now != was:
        boxed = changes(live, saved, only)
        for path in now - was - boxed.gone:
            yield Difference(path, "tensor", ABSENT, _shown(specs[path]))
        for path in was - now - boxed.anew:
            spec = saved.spec(path)
            if spec is not None:
                yield Difference(path, "tensor", _shown(spec), ABSENT)
    for path in now & was:
        spec = saved.spec(path)
        if spec is not None and spec != specs[path]:
            yield from _tensor(path, spec, specs[path], in_box=saved.kinds.get(path) == Kind.TENSOR)
    if saved.aliases != live.aliases:
        yield from _ties(now & was, saved.aliases, live.aliases)


def _shown(spec: TensorSpec) -> str:
    return f"{spec.dtype}{list(spec.global_shape)}"


def _tensor(path: str, was: TensorSpec, now: TensorSpec, *, in_box: bool) -> Iterator[Difference]:
    if was.dtype != now.dtype:
        yield Difference(path, "dtype", was.dtype, now.dtype)
    if was.global_shape != now.global_shape:
        anew = in_box and ("/" in path or "[" in path)
        how = " (in the place of None it would be made anew)" if anew else ""
        yield Difference(path, "shape", str(was.global_shape), f"{now.global_shape}{how}")
    elif (was.shape, was.offset) != (now.shape, now.offset):
        block = "block {0.shape} at {0.offset}"
        yield Difference(path, "placement", block.format(was), block.format(now))
    elif any(
        size > 1 and step == 0 != before
        for size, step, before in zip(now.shape, now.stride, was.stride, strict=True)
    ):
        yield Difference(path, "stride", str(was.stride), f"{now.stride}, which repeats elements")


def _ties(paths: set[str], was: Mapping[str, str], now: Mapping[str, str]) -> Iterator[Difference]:
    """Tensors that are tied on one side only: one value would win, or both would drift apart."""
    saved_to_live: dict[str, str] = {}
    live_to_saved: dict[str, str] = {}
    for path in sorted(paths):
        then, here = was.get(path, path), now.get(path, path)
        if saved_to_live.setdefault(then, here) != here:
            yield Difference(path, "tie", f"tied to {then}", "apart")
        if live_to_saved.setdefault(here, then) != then:
            yield Difference(path, "tie", "apart", f"tied to {here}")


def _optimizer(path: str, now: Any, was: Any) -> Iterator[Difference]:
    if was.get("type", now["type"]) != now["type"]:  # Adam and AdamW have the same state
        yield Difference(path, "type", was["type"], now["type"])
    before, after = was["param_groups"], now["param_groups"]
    if len(before) != len(after):
        yield Difference(path, "groups", f"{len(before)} groups", f"{len(after)} groups")
        return
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        where = child(f"{path}/param_groups", number)
        for name in sorted(set(old["params"]) ^ set(new["params"])):
            sides = (name, ABSENT) if name in old["params"] else (ABSENT, name)
            yield Difference(where, "parameter", *sides)
        first = (i for i, pair in enumerate(zip(old["params"], new["params"], strict=False))
                 if pair[0] != pair[1])  # fmt: skip
        if now["by_order"] and (at := next(first, None)) is not None:
            sides = old["params"][at], new["params"][at]
            yield Difference(where, "order", *sides)


def _extras(path: str, now: Any, was: Any) -> Iterator[Difference]:
    """What a module's ``get_extra_state()`` or a hook gave besides tensors, on one side only."""
    for key in sorted((now.keys() ^ was.keys()) - {UNSYNCED}):
        sides = ("there", ABSENT) if key in was else (ABSENT, "there")
        yield Difference(f"{path}/{key}", "extra state", *sides)


def _scaler(path: str, now: Any, was: Any) -> Iterator[Difference]:
    """A scaler that only one side has enabled: another one has no state, and takes none."""
    if bool(now) != bool(was):
        sides = (str(tree.get("scale")) if tree else ABSENT for tree in (was, now))
        yield Difference(path, "enabled scaler's scale", *sides)


_HELD_APART: Final[Mapping[str, Callable[[str, Any, Any], Iterator[Difference]]]] = {
    Kind.OPTIMIZER: _optimizer,
    Kind.MODULE: _extras,
    Kind.SCALER: _scaler,
}
"""How the trees of two things of a kind are held against each other, given path, live, saved."""


def _paired(
    now: Any, was: Any, path: str, kinds: Mapping[str, str]
) -> Iterator[tuple[str, Any, Any]]:
    """The trees of each live thing in a box, on both sides, where both have one."""
    if type(now) is not type(was):
        return
    before = dict(entries(was))
    for key, item in entries(now):
        if key in before and key != KINDS:
            where = child(path, key)
            if where in kinds:
                yield where, item, before[key]
            else:
                yield from _paired(item, before[key], where, kinds)
