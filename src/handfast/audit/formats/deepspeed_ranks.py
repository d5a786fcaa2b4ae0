"""What tells that a file of ZeRO 3 is another rank's: its row has the same length in every rank.

torch.save calls the directory in an archive as the file that it is told to write, without the
ending, which a copy keeps; written to a stream it is "archive" (torch 2.13, caffe2/serialize/
inline_container.cc, ``PyTorchStreamWriter``). Where a parameter can't be cut evenly, the last
shares are padded. The masters there are memory as it was found; the moments stay 0, since gradients
are copied into a buffer of zeros without what pads them (DeepSpeed 0.19.8, runtime/zero/stage3.py,
``partition_grads``; runtime/comm/coalesced_collectives.py, ``reduce_scatter_coalesced``). Not so
where an optimizer adds its decay to the gradient, as Adam's does and AdamW's does not.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from handfast.audit.archive import Record
from handfast.audit.extent import Extent
from handfast.audit.finding import Code, Finding, Strength
from handfast.audit.formats.deepspeed_parts import Partition, Share
from handfast.audit.formats.states import number
from handfast.audit.formats.zero import flat, share_of
from handfast.audit.tree import values
from handfast.errors import HandfastError

__all__ = ["alike", "padded", "written"]

LEAST: Final = 64
"""Bytes below which rows that are alike say nothing."""

BLOCK: Final = 1 << 16

MOMENTS: Final = ("exp_avg", "exp_avg_sq")
"""Not Muon's buffer, which is cut anew in each step."""

SHOWN: Final = 6


def written(path: str, name: str, patterns: Sequence[re.Pattern[str]]) -> Iterator[Finding]:
    """Find a file whose archive was written as another rank's.

    ``name`` is what the archive's directory is called; ``patterns`` are of names of files, with the
    ranks as their groups.
    """
    file = path.rpartition("/")[2]
    for pattern in patterns:
        own, other = pattern.fullmatch(file), pattern.fullmatch(f"{name}.pt")
        if own and other and own.groups() != other.groups():
            says = (
                f"{path} was written as {name}.pt, by its archive's own directory: it is another "
                "rank's, copied or renamed"
            )
            yield Finding(Code.EXTRA, Strength.STRONG, "", says, (path,))


def padded(partition: Partition, share: Share | None) -> Iterator[Finding]:
    """Find a partition that has moments where its rank's row has nothing but padding."""
    if share is None or share.stage != 3 or not all(map(_decays_apart, partition.base[1])):
        return
    told = []
    for label, row, at, count in _paddings(partition, share):
        piece = flat(row, at, count)
        if piece is not None and _holds(piece):
            told.append(f"{label}: {count} elements from {at} on")
    if told:
        path = partition.part.path
        says = (
            f"{path} has moments where the row of rank {partition.dp} is padding, to which no "
            "gradient comes: it is another rank's"
        )
        parts = (path,)
        yield Finding(Code.EXTRA, Strength.STRONG, "", says, parts, tuple(told[:SHOWN]))


def _decays_apart(group: Mapping[Any, Any]) -> bool:
    """Whether no decay of the masters comes into a group's moments."""
    return group.get("decoupled_weight_decay") is True or group.get("weight_decay") == 0


def _paddings(partition: Partition, share: Share) -> Iterator[tuple[str, Extent, int, int]]:
    """What pads each parameter's share: a moment's label, its row, from where on, how much."""
    for group, moments in _moments(partition).items():
        at = 0
        for name, shape in share.shapes[group].items() if group < len(share.shapes) else ():
            length, _, count = share_of(shape, share.world, partition.dp)
            if count < length:
                for key, row in moments.items():
                    yield f"{key} of {name}", row, at + count, length - count
            at += length


def _moments(partition: Partition) -> Mapping[int, Mapping[str, Extent]]:
    """The moments of each group, a row each."""
    found: dict[int, dict[str, Extent]] = defaultdict(dict)
    for group in range(len(partition.rows)):
        own = partition.base[0].get(group)
        for key, node in own.items() if type(own) is dict else ():
            row = values(node)
            if key in MOMENTS and row is not None and len(row.shape) == 1:
                found[group][key] = row
    return found


def _holds(row: Extent) -> bool:
    """Whether a row has anything but zeros, as far as can be read."""
    try:
        return any(any(block.cast("B")) for block in row.blocks(BLOCK))
    except HandfastError:
        return False  # that it can't be read is told by itself


def alike(partitions: Sequence[Partition]) -> Iterator[Finding]:
    """Find partitions of different ranks of ZeRO 3 whose rows have the same checksums, all of them.

    None that says nothing: before the first update, without checksums, of few bytes, or all zero.
    """
    same: dict[tuple[int, tuple[tuple[int, int], ...]], list[Partition]] = defaultdict(list)
    for partition in partitions:
        rows = [row for own in _moments(partition).values() for row in own.values()]
        sources = [row.source for row in (*partition.rows, *rows)]
        sums = tuple((s.crc, s.nbytes) for s in sources if type(s) is Record and s.crc)
        large = sum(nbytes for _, nbytes in sums) >= LEAST
        if large and len(sums) == len(sources) and rows and _counts(partition):
            same[partition.mp, sums].append(partition)
    for found in same.values():
        first = [row for own in _moments(found[0]).values() for row in own.values()]
        if len({one.dp for one in found}) > 1 and any(map(_holds, first)):
            paths = tuple(one.part.path for one in found)
            says = (
                f"{len(found)} partitions of different ranks have the same checksums, masters and "
                "moments alike: one of them was copied over the others"
            )
            yield Finding(Code.IDENTICAL, Strength.STRONG, "", says, paths)


def _counts(partition: Partition) -> bool:
    """Whether its optimizer has made an update."""
    states = partition.base[0].values()
    return any(number(own.get("step")) for own in states if type(own) is dict)
