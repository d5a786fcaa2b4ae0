"""Who has which bytes: live tensors that share memory can't hold what was saved apart."""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import TypeVar

import torch
from torch import Tensor

from handfast.store.objects import TensorRef
from handfast.torch.saved import Source
from handfast.torch.tensors import HOST, Place, copy_into, flat_bytes, local, make, place_of, reach
from handfast.torch.tree import join
from handfast.torch.types import DTYPE_NAMES

__all__ = ["UNNAMED", "Memory", "Remade", "bytes_of", "torn"]

UNNAMED = ""
"""The path of a live tensor that no name of the state leads to."""
LEFT = "\0"
"""The path of one that is to keep its value."""
Held = tuple[str, Tensor]
"""A path in the state, or one of these two, and a local tensor."""
_Taken = tuple[int, int, Held]
"""With its first byte, and the one behind its last."""
_K = TypeVar("_K")


class Memory:
    """The bytes that are taken so far, and by whom.

    ``live`` are all tensors that are likely to be taken. Which of them share bytes with no other is
    found out for all at once, and when one of these is taken nobody is looked for.
    """

    def __init__(self, live: Sequence[Tensor] = ()) -> None:
        self._starts: dict[torch.device, list[int]] = {}
        self._ends: dict[torch.device, list[int]] = {}
        self._groups: dict[torch.device, list[list[_Taken]]] = {}
        self._live = live  # held, so that no other tensor can come to have the id of one
        self._known: dict[int, tuple[int, int, bool]] = {}  # where each lies, and if it is alone
        for group in _connected((id(tensor), local(tensor)) for tensor in live):
            for first, end, (key, _) in group:
                self._known[key] = first, end, len(group) == 1
        self._alone: list[_Taken] = []  # taken, and in no group

    def hold(self, path: str, tensor: Tensor) -> None:
        """Take a tensor's bytes, and those of the gaps in between."""
        self._take(path, tensor)

    def claim(self, path: str, tensor: Tensor) -> list[Held]:
        """Take them, too; gives those who have some of them."""
        *others, (first, end, _) = self._take(path, tensor)
        return [held for start, behind, held in others if first < behind and start < end]

    def _take(self, path: str, tensor: Tensor) -> list[_Taken]:
        """Give the group of all that are connected by their bytes, the new one last."""
        part = local(tensor)
        first, end = _extent(part)
        mine = (first, end, (path, part))
        if first == end:
            return [mine]
        known = self._known.get(id(tensor))
        if known == (first, end, True):
            del self._known[id(tensor)]  # a second time it meets itself
            self._alone.append(mine)
            return [mine]
        if known != (first, end, False):  # it came or moved since: it may meet any that is alone
            self._known.clear()
            for other in sorted(self._alone, key=itemgetter(0)):
                self._join(other)
            self._alone.clear()
        return self._join(mine)

    def _join(self, mine: _Taken) -> list[_Taken]:
        first, end, (_, part) = mine
        starts = self._starts.setdefault(part.device, [])
        ends = self._ends.setdefault(part.device, [])
        groups = self._groups.setdefault(part.device, [])
        at, behind = bisect_right(ends, first), bisect_left(starts, end)
        group = groups[at] if at < behind else []
        for other in groups[at + 1 : behind]:
            group += other
        group.append(mine)
        if at < behind:
            first, end = min(first, starts[at]), max(end, ends[behind - 1])
        starts[at:behind], ends[at:behind], groups[at:behind] = [first], [end], [group]
        return group


def _extent(part: Tensor) -> tuple[int, int]:
    """The first byte of a tensor and the one behind its last; twice 0 of one without plain memory,
    on the meta device too. No image holds such a one.
    """
    far = reach(part)
    first = part.data_ptr() if far else 0
    return (first, first + far) if first else (0, 0)


def _connected(
    parts: Iterable[tuple[_K, Tensor]],
) -> Iterator[list[tuple[int, int, tuple[_K, Tensor]]]]:
    """Local tensors in groups that hang together by their bytes, each with its first and end.

    What has no plain memory is in none.
    """
    rows: defaultdict[torch.device, list[tuple[int, int, tuple[_K, Tensor]]]] = defaultdict(list)
    for one in parts:
        first, end = _extent(one[1])
        if first < end:
            rows[one[1].device].append((first, end, one))
    for here in rows.values():
        here.sort(key=itemgetter(0))
        group, behind = here[:1], here[0][1]
        for row in here[1:]:
            if row[0] >= behind:
                yield group
                group = []
            group.append(row)
            behind = max(behind, row[1])
        yield group


class Remade:
    """What optimizers' saved tensors become: what was one tensor is one again, and no other.

    A live tensor serves where it can be what was saved: not one that was made in inference mode
    (no step outside of that mode could change it), nor one that can't be filled without a change
    of what another has, be that restored by now or to be left alone. ``standing`` are the live
    tensors, by the path that is stored, that have been filled for themselves; what was tied to
    one is so again.
    """

    def __init__(self, source: Source, standing: Mapping[str, Tensor], memory: Memory) -> None:
        self._source = source
        self._standing = standing
        self._memory = memory
        self._made: dict[tuple[str, bool], Tensor] = {}
        self._pairs: list[tuple[Tensor, str]] = []

    def leave(self, values: Iterable[object]) -> None:
        """Let live tensors among these keep their values, whatever is restored."""
        for value in values:
            if isinstance(value, Tensor):
                self._memory.hold(LEFT, value)

    def take(self, path: str, place: Place, live: object = None) -> Tensor:
        """The tensor that stands for a saved path; its values come with :meth:`fill`."""
        kept = self._source.saved.aliases.get(path, path)
        key = kept, place.mesh is None
        if key not in self._made:
            tied = self._tied(kept, place, live)
            self._made[key] = self._own(kept, place, live) if tied is None else tied
        return self._made[key]

    def _tied(self, path: str, place: Place, live: object) -> Tensor | None:
        other = self._standing.get(path)
        if other is None or place_of(other) != place:
            return None
        return live if isinstance(live, Tensor) and _same(live, other) else other.detach()

    def _own(self, path: str, place: Place, live: object) -> Tensor:
        if isinstance(live, Tensor) and self._fits(live, path, place):
            held = self._memory.claim(path, live)
            if not held:
                self._pairs.append((local(live), path))
                return live
            aliases = self._source.saved.aliases
            mine = _look(local(live))
            others = [
                part
                for at, part in held
                # the very same tensor under no name is tied to this one, and goes with it
                if not (aliases.get(at, at) == path or (at == UNNAMED and _look(part) == mine))
            ]
            if not others:
                self._pairs.append((local(live), path))
                return live
            self.fill()
            saved = self._source.view(path)
            # what was apart and is one now would go on as one, though the values be the same
            if mine not in map(_look, others) and _agrees(local(live), saved, others):
                return live
        if (filled := self._source.adopt(path, place)) is not None:
            return filled
        made = make(self._source.spec(path), place)
        self._pairs.append((local(made), path))
        return made

    def _fits(self, live: Tensor, path: str, place: Place) -> bool:
        if live.is_inference() or place_of(live) != place:
            return False
        part, spec = local(live), self._source.spec(path)
        same = DTYPE_NAMES.get(part.dtype) == spec.dtype and part.shape == spec.shape
        return same and part.stride() == spec.stride

    def tree(self, tree: object, device: torch.device = HOST.device, live: object = None) -> object:
        """A plain tree with the tensors that stand for its references.

        ``live`` is what stands there now, and serves where the tree is nothing but a reference.
        Raises LookupError where a DTensor has no mesh.
        """

        def fetch(ref: TensorRef) -> Tensor:
            kept = self._source.saved.aliases.get(ref.path, ref.path)
            tied = self._standing.get(kept)
            place = self._source.home(ref, device) if tied is None else place_of(tied)
            return self.take(ref.path, place, live if ref is tree else None)

        return join(tree, fetch)

    def fill(self) -> None:
        """Copy the saved values of what was taken since the last time."""
        self._source.fill(self._pairs)
        self._pairs.clear()


def _agrees(part: Tensor, saved: Tensor, others: Sequence[Tensor]) -> bool:
    """Fill a tensor, if that leaves all others as they are.

    So it is with a view of what else was saved, as it was when it was saved.
    """
    shared = [_within(other, *_extent(part)) for other in others]
    before, mine = [bytes_of(other).clone() for other in shared], part.clone()
    copy_into([part], [saved])
    alike = all(torch.equal(bytes_of(o), b) for o, b in zip(shared, before, strict=True))
    if not alike:
        copy_into([part], [mine])
    return alike


def _within(other: Tensor, first: int, end: int) -> Tensor:
    """What of a tensor may lie between two bytes: all of it, unless it lies in one piece."""
    if not other.is_contiguous() or other.is_conj() or other.is_neg():
        return other
    size, start = other.element_size(), other.data_ptr()
    return other.reshape(-1)[max(0, first - start) // size : -(-(end - start) // size)]


def _same(live: Tensor, other: Tensor) -> bool:
    """Whether a live tensor is another one's memory, seen in the same way."""
    return place_of(live) == place_of(other) and _look(local(live)) == _look(local(other))


def _look(part: Tensor) -> tuple[object, ...]:
    seen = part.data_ptr(), part.dtype, part.shape, part.stride()
    return *seen, part.is_conj(), part.is_neg()


def torn(parts: Mapping[str, Tensor], value: Callable[[str], Tensor]) -> Iterator[tuple[str, str]]:
    """Live tensors that can't all have the values that they are to have, since they overlap.

    One whose elements overlap is among them, and named with itself.
    ``value`` gives what a path is to have; it is asked of those that overlap, and of no other.
    Gives the path of each, and that of one it shares bytes with. Tried on a copy of those bytes.
    """
    for rows in _connected(parts.items()):
        group = [one for *_, one in rows]
        first = group[0][1]
        if not _is_folded(first) and all(_same(part, first) for _, part in group[1:]):
            continue  # one tensor, maybe under several paths
        start = min(_extent(part)[0] for _, part in group)
        scratch = bytearray(max(_extent(part)[1] for _, part in group) - start)
        views = [(path, _placed(scratch, part, start), value(path).cpu()) for path, part in group]
        for _, target, wanted in views:
            copy_into([target], [wanted])
        for path, target, wanted in views:
            if not torch.equal(bytes_of(target), bytes_of(wanted)):
                yield path, next((other for other, _ in group if other != path), path)


def _is_folded(part: Tensor) -> bool:
    """Whether elements of one tensor may lie in the same bytes."""
    if part.is_contiguous():
        return False
    reach = 0
    for step, size in sorted(zip(part.stride(), part.shape, strict=True)):
        if size > 1 and step <= reach:
            return True
        reach += (size - 1) * step
    return False


def _placed(scratch: bytearray, part: Tensor, start: int) -> Tensor:
    """A view of the scratch bytes where, and as, a tensor lies in memory."""
    at = part.data_ptr() - start
    count = (len(scratch) - at) // part.element_size()
    view = torch.frombuffer(scratch, dtype=part.dtype, count=count, offset=at)
    view = view.as_strided(part.shape, part.stride())
    view = view.conj() if part.is_conj() else view
    return torch._neg_view(view) if part.is_neg() else view


def bytes_of(tensor: Tensor) -> Tensor:
    """The values of a local tensor as bytes, in the order of its elements."""
    return flat_bytes(tensor.resolve_conj().resolve_neg().contiguous())
