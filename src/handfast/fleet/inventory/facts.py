"""What is known of a node, what is known not to be there, and what is not known.

A fact has one of three states, and none is ever taken for another. KNOWN has a value. ABSENT is
known, too: this node has no NVIDIA driver. UNKNOWN has the reason: nobody here may look, or what
was found has no meaning. Nothing is guessed.

**What equal digests say.** That the same is known, and that the same is not known: an unknown fact
is in its tier's digest as unknown, without its reason, which would differ for no cause (a process
number, say). Two nodes that both can't tell their driver are therefore in one group, and a fleet
of ten thousand has a few digests and not as many as nodes. But *equal digests don't say that the
nodes are equal*: whoever judges digests must judge each with itself as well, and
:meth:`Inventory.unknown` names what a rule may not pass over. To salt an unknown with its node
would look safer. It would make every pair of nodes a pair to be judged, and the answer would be
the same.

**All of a fact can be printed.** Its texts come from files and programs of others. What a terminal
would obey or not show is spelled out where a fact is made, and a fact that holds such a thing can
neither be made nor read: so whoever prints one, and there are many, need not think of it.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from enum import StrEnum
from itertools import pairwise
from typing import Annotated, Final

import msgspec

from handfast.errors import UNREADABLE, FormatError
from handfast.link.life import Node

__all__ = [
    "ALL", "FORMAT", "Fact", "Inventory", "Kind", "State", "Tier", "Want", "decode", "encode",
    "gather", "look", "printable", "spell",
]  # fmt: skip

FORMAT: Final = 1
LONGEST: Final = 4096
SOURCE: Final = 1000

Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,127}\Z")]
Text = Annotated[str, msgspec.Meta(max_length=LONGEST)]

UNSHOWN: Final = re.compile(
    # controls; what has no width, ends a line or turns its direction; halves of a pair; tags
    "[\0-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
"""A list and not `str.isprintable`, which changes with each Python's edition of Unicode."""


class Tier(StrEnum):
    """Who has to agree on a fact, and where it is looked for."""

    HOST = "host"  # of the machine: kernel, GPU driver and firmware, processor
    FABRIC = "fabric"  # of what nodes reach each other by: NICs, Fabric Manager, IMEX
    JOB = "job"  # of one rank's interpreter, container and environment


ALL: Final = frozenset(Tier)


class Kind(StrEnum):
    """What a difference between two nodes means."""

    EXACT = "exact"  # part of the digest
    PER_NODE = "per_node"  # right on each node for itself: the name of an interface
    IGNORED = "ignored"  # told, and never compared


class State(StrEnum):
    """How much is known."""

    KNOWN = "known"
    ABSENT = "absent"
    UNKNOWN = "unknown"


class Fact(msgspec.Struct, frozen=True):
    """One thing about one node, and where that is from.

    ``value`` is None unless the state is KNOWN; ``problem`` is the reason of what is UNKNOWN, and
    empty else. ``source`` is the file, command or call that said so. Raises ValueError where these
    don't fit together.
    """

    name: Name
    tier: Tier
    kind: Kind
    state: State
    value: Text | None = None
    problem: Text = ""
    source: Text = ""

    def __post_init__(self) -> None:
        """Refuse a state that its value or its reason contradicts."""
        if (self.state is State.KNOWN) != (self.value is not None):
            raise ValueError(f"{self.name} is {self.state}, and its value is {self.value!r}")
        if (self.state is State.UNKNOWN) != bool(self.problem):
            raise ValueError(f"{self.name} is {self.state}, and its problem is {self.problem!r}")
        if UNSHOWN.search(f"{self.value or ''}{self.problem}{self.source}"):
            raise ValueError(f"{self.name} has characters that can't be printed")

    def __str__(self) -> str:
        """Spell what is known, for people."""
        return self.value if self.value is not None else str(self.state)


class Want(msgspec.Struct, frozen=True):
    """A fact that a collector undertakes to report, whatever happens to it.

    A ``family`` stands for itself and for all names below it, which can't be listed beforehand: the
    variables that are set, the boards that are plugged in. What a known family does not list is
    ABSENT. Only names of families have others below them.
    """

    name: Name
    tier: Tier
    kind: Kind = Kind.EXACT
    family: bool = False

    def known(self, value: str, source: str) -> Fact:
        """Report a value; what is too long or can't be printed is changed, and ends in a hash."""
        told = printable(value)
        if told != value or len(told) > LONGEST:
            told = f"{told[:4000]} sha256:{_hash(value)}"
        return Fact(self.name, self.tier, self.kind, State.KNOWN, told, source=_short(source))

    def absent(self, source: str) -> Fact:
        """Report that it is not there at all."""
        return Fact(self.name, self.tier, self.kind, State.ABSENT, source=_short(source))

    def unknown(self, problem: str, source: str = "") -> Fact:
        """Report that nobody can say, and why."""
        reason = _short(problem.strip()) or "no reason was given"
        return Fact(
            self.name, self.tier, self.kind, State.UNKNOWN, problem=reason, source=_short(source)
        )

    def below(self, part: str, kind: Kind | None = None) -> Want:
        """Give a member of this family; what a name can't hold becomes an underscore."""
        clean = "".join(c if c.isascii() and (c.isalnum() or c in "._+-") else "_" for c in part)
        return Want(f"{self.name}.{clean}"[:128], self.tier, kind or self.kind)

    def covers(self, fact: Fact) -> bool:
        """Say whether a fact is this one, or of this family."""
        below = self.family and fact.name.startswith(f"{self.name}.")
        return fact.tier is self.tier and (below or fact.name == self.name)


def printable(text: str) -> str:
    """Spell out, as Python does, what a terminal would obey or not show: ESC becomes `\\x1b`."""
    return UNSHOWN.sub(lambda found: repr(found[0])[1:-1], text)


def _short(text: str) -> str:
    return printable(text)[:SOURCE]


def _hash(value: str) -> str:
    return hashlib.sha256(value.encode(errors="surrogatepass")).hexdigest()


class Inventory(msgspec.Struct, frozen=True):
    """All facts of one node, sorted by name, each name once; ValueError if they are not.

    ``node`` is None where the node has not been enrolled, or nobody asked; its key has 64 hex
    digits, else ValueError.
    """

    format: int
    node: Node | None
    facts: tuple[Fact, ...]

    def __post_init__(self) -> None:
        """Refuse facts that are out of order, so that one inventory has one encoding."""
        names = [fact.name for fact in self.facts]
        if any(one >= other for one, other in pairwise(names)):
            raise ValueError("the facts are not sorted by name, or a name is there twice")
        if self.node is not None and not re.fullmatch(r"[0-9a-f]{64}", self.node.key):
            raise ValueError("the node's key is none of 64 hex digits")

    def get(self, name: str) -> Fact:
        """Give a fact by name, also one that nobody listed.

        It is ABSENT if it belongs to a family that is known, else UNKNOWN.
        """
        found = look({fact.name: fact for fact in self.facts}, name)
        return found or Want(name, Tier.HOST).unknown("no collector reported it")

    def digest(self, tier: Tier) -> bytes:
        """Give 32 bytes (SHA-256) over the names, states and values of a tier's exact facts."""
        told = [
            (fact.name, fact.state.value, fact.value)
            for fact in self.facts
            if fact.tier is tier and fact.kind is Kind.EXACT
        ]
        body = msgspec.msgpack.encode(told)
        return hashlib.sha256(f"handfast.inventory/{FORMAT}/{tier}\n".encode() + body).digest()

    def unknown(self, tier: Tier) -> tuple[str, ...]:
        """Name the exact facts of a tier that nobody can tell here."""
        return tuple(
            fact.name
            for fact in self.facts
            if (fact.tier, fact.kind, fact.state) == (tier, Kind.EXACT, State.UNKNOWN)
        )


def look(listed: Mapping[str, Fact], name: str) -> Fact | None:
    """Find a fact by name, or what its family says of it; None where no family has it."""
    if name in listed:
        return listed[name]
    above = name
    while "." in above:
        above = above.rpartition(".")[0]
        if family := listed.get(above):
            want = Want(name, family.tier, family.kind)
            if family.state is State.UNKNOWN:
                return want.unknown(family.problem, family.source)
            return want.absent(family.source)
    return None


def gather(facts: Iterable[Fact], node: Node | None = None) -> Inventory:
    """Sort facts into an inventory; ValueError where two have one name."""
    return Inventory(FORMAT, node, tuple(sorted(facts, key=lambda fact: fact.name)))


def encode(inventory: Inventory) -> bytes:
    """Write an inventory as JSON, on one line; :func:`decode` reads it."""
    return msgspec.json.encode(inventory)


class _Versioned(msgspec.Struct):
    format: int


def decode(data: bytes, where: str) -> Inventory:
    """Read an inventory. Raises FormatError that names ``where`` it came from."""
    try:
        version = msgspec.json.decode(data, type=_Versioned).format
        if version != FORMAT:
            raise FormatError(
                f"{where}: an inventory of format {version}; this handfast reads format {FORMAT}. "
                "What to do: take it again with the same release of handfast on all nodes"
            )
        return msgspec.json.decode(data, type=Inventory)
    except UNREADABLE as error:
        raise FormatError(
            f"{where}: no inventory of a node: {printable(str(error))}. What to do: take it again, "
            "with `handfast fleet inventory --json`"
        ) from error


def spell(values: Iterable[str]) -> str:
    """Spell one value of several devices: the value where all agree, else each with its count.

    So a version can be read as one where there is one; a mixture in one node can't be.
    """
    counted = sorted(Counter(values).items())
    if len(counted) == 1:
        return counted[0][0]
    return ", ".join(f"{value} ({count})" for value, count in counted)
