"""The order of versions: numbers between dots, then what can be said of the rest, and no more.

Drivers, firmware and kernels follow no common standard (PEP 440 and semantic versions are for
packages), so the order is small. ``580.65.06`` is its numbers, and a missing one counts as 0.
Of two with the same numbers only this is known: a revision behind a dash comes after none, and
revisions are ordered among their like (``5.15.0-91-generic`` before ``5.15.0-157-generic``); what
stands behind a plus is a label of the build and orders nothing (semver.org 2.0.0, 10). Whether
``1.22.0-rc1`` or ``1.22.0.post1`` comes before ``1.22.0`` each project settles for itself. That
can't be compared here, and whoever needs it lists the releases in their order.
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import zip_longest

import msgspec

__all__ = ["Version", "compare", "read", "sort_key", "within"]

_SHAPE = re.compile(r"v?(\d{1,18}(?:\.\d{1,18})*)(?!\d)([^+,]*)(?:\+[^,]*)?")
_REVISION = re.compile(r"-(\d{1,18}(?:[.-]\d{1,18})*)(?![0-9A-Za-z])")


class Version(msgspec.Struct, frozen=True):
    """A version in its parts: ``5.15.0-157-generic`` is (5, 15, 0), (157,) and ``-generic``."""

    numbers: tuple[int, ...]
    revision: tuple[int, ...]
    label: str

    @property
    def plain(self) -> bool:
        """Whether it is numbers alone."""
        return not self.revision and not self.label


@lru_cache(maxsize=4096)
def read(text: str) -> Version | None:
    """Take a version apart.

    None for what does not begin with a number (or v and a number), and for several versions in one
    text, with commas between them: the GPUs of one node, say.
    """
    shape = _SHAPE.fullmatch(text)
    if shape is None:
        return None
    rest = shape[2]
    revision = _REVISION.match(rest)
    return Version(
        tuple(map(int, shape[1].split("."))),
        tuple(map(int, re.split("[.-]", revision[1]))) if revision else (),
        rest[revision.end() :] if revision else rest,
    )


def compare(a: str, b: str) -> int | None:
    """Tell which comes first: below 0 is ``a``, above 0 is ``b``, 0 neither; None: can't be said.

    0 does not make them the same text: ``1.13`` and ``1.13.0``, or two builds of one version.
    """
    first, second = read(a), read(b)
    if first is None or second is None:
        return 0 if a == b else None
    for x, y in zip_longest(first.numbers, second.numbers, fillvalue=0):
        if x != y:
            return -1 if x < y else 1
    if first.label == second.label:
        return (first.revision > second.revision) - (first.revision < second.revision)
    if first.plain and second.revision:
        return -1
    if second.plain and first.revision:
        return 1
    return None


def within(text: str, release: str) -> bool:
    """Tell whether a version belongs to a release: 24.11.5 to 24.11, and to 24; 24.110 does not.

    What is no version belongs to itself alone.
    """
    version, line = read(text), read(release)
    if version is None or line is None or not line.plain:
        return text == release
    return version.numbers[: len(line.numbers)] == line.numbers


def sort_key(text: str) -> tuple[bool, tuple[int, ...], bool, str, tuple[int, ...], str]:
    """A key that agrees with `compare` wherever that can tell; elsewhere it is only some order."""
    version = read(text)
    if version is None:
        return True, (), False, "", (), text
    numbers = version.numbers
    while numbers and not numbers[-1]:
        numbers = numbers[:-1]
    return False, numbers, not version.plain, version.label, version.revision, text
