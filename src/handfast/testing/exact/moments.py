"""What a rank's state was after each step: a print of each leaf, one file a moment.

Values can't be kept of all steps, so a digest stands for each leaf, with its value where that is
short, and of a tensor a few elements, evenly spread, which show how far two of them are apart.
"""

from __future__ import annotations

import os
from typing import Final, Literal

import msgspec

__all__ = ["SAMPLE", "Moment", "Print", "What", "read_moments", "write_moment"]

SAMPLE: Final = 32
"""Elements of a tensor that are kept, at most."""

What = Literal["restored", "saved"]


class Print(msgspec.Struct, frozen=True, array_like=True):
    """One leaf. ``digest`` tells it from any other, ``text`` is what people see of it.

    ``kind`` says what it is of: "parameter", "scheduler" and so on. ``sample`` has up to
    ``SAMPLE`` of a tensor's ``size`` elements, as floats. ``stored``: a save stores it; else it
    lives beside the state, and no resume brings it back. ``loadable``: it is not stored, and is of
    a thing that gives and takes a state, by ``state_dict`` and ``load_state_dict``.
    """

    kind: str
    digest: bytes
    text: str
    stored: bool = True
    sample: tuple[float, ...] = ()
    size: int = 0
    loadable: bool = False


class Moment(msgspec.Struct, frozen=True, array_like=True):
    """All leaves by path: once ``restore()`` had given ``step``, or at ``save(step)``.

    ``taken`` says whether that save took an image.
    """

    what: What
    step: int
    taken: bool
    prints: dict[str, Print]


def write_moment(folder: str, number: int, moment: Moment) -> None:
    """Write a rank's moment; it is there whole or not at all, however this process ends."""
    path = os.path.join(folder, f"{number:06d}")
    with open(f"{path}.part", "wb") as file:
        file.write(msgspec.msgpack.encode(moment))
    os.rename(f"{path}.part", f"{path}.moment")


def read_moments(folder: str) -> list[Moment]:
    """Read a rank's moments, in their order."""
    found = []
    for name in sorted(os.listdir(folder)):
        if name.endswith(".moment"):
            with open(os.path.join(folder, name), "rb") as file:
                found.append(msgspec.msgpack.decode(file.read(), type=Moment))
    return found
