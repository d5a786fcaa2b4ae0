"""What a rule of compatibility is: plain values, as :mod:`reading` takes them from a file."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, TypeAlias

import msgspec

__all__ = [
    "ABSENT", "Adjacent", "Body", "Exact", "Fact", "Level", "Matrix", "Minimum", "MustProbe",
    "Named", "Pair", "Place", "Probed", "Rule", "Rules", "Scope", "Text",
]  # fmt: skip

ABSENT = ""
"""The value of a fact that is not there: no Fabric Manager runs on a node without NVSwitches."""

Text: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=2000)]
Fact: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,199}\Z")]
Named: TypeAlias = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,199}\Z"
        r"|^[A-Za-z0-9][A-Za-z0-9._+-]{0,99}\.[A-Za-z0-9._+-]{0,98}\*\Z"
    ),
]
"""A fact, or a pattern: ``env.NCCL_*`` is every fact that begins so; a dot is before the star."""
Pair: TypeAlias = tuple[Text, Text]


class Scope(StrEnum):
    """Over what a rule speaks. Beyond one node, over each ordered pair of a place's nodes.

    A node is a pair with itself, too: its ranks talk to each other. A link has two sides, and its
    pairs are its clients with its servers.
    """

    NODE = "node"
    LINK = "link"
    GROUP = "group"  # the ranks of one communicator
    FABRIC = "fabric"  # an NVLink domain, an InfiniBand subnet
    FLEET = "fleet"


class Level(StrEnum):
    """How bad it is."""

    FINE = "fine"
    WARN = "warn"
    REFUSE = "refuse"


class Exact(msgspec.Struct, frozen=True):
    """Equal text: several facts on one node, or one fact over all nodes of a place.

    Over a place there may be patterns: each fact that fits one is held equal to itself. ``below``
    is the pattern that brought a fact here (`meaning.expanded`), and empty as a rule is written.
    ``absent_differs``: over a place, a node without the fact differs from one that has it.
    """

    facts: tuple[Named, ...]
    absent_differs: bool = False
    below: str = ""


class Adjacent(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """At most ``width`` apart: in an ordered list of releases, or in a field of the version.

    The first fact is the client's (or of a pair's first node), the last the server's; there may
    be one for both. ``field`` counts from 1, and the fields before it must be equal.
    ``never_ahead``: the first may be behind the last, and never ahead.
    """

    facts: Annotated[tuple[Fact, ...], msgspec.Meta(min_length=1, max_length=2)]
    width: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 1
    field: Annotated[int, msgspec.Meta(ge=1, le=8)] | None = None
    releases: tuple[Text, ...] = ()
    never_ahead: bool = False


class Minimum(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """At least a version; or, for each version that fact ``by`` has reached, at least another."""

    fact: Fact
    version: Text | None = None
    by: Fact | None = None
    versions: dict[Text, Text] = {}


class Matrix(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """Which releases of a client may talk to which of a server; ``*`` stands for any.

    With ``allow`` alone no other pair may; with ``deny`` alone every other; with both, the pairs
    in neither are unknown. The direction counts: (1.13, 1.22) says nothing of (1.22, 1.13).
    """

    client: Fact
    server: Fact
    allow: tuple[Pair, ...] = ()
    deny: tuple[Pair, ...] = ()


class MustProbe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """Versions do not tell, so the recorded result of a probe by this name is required.

    It is recorded for the values of these facts at both ends. Equal values need none, unless the
    rule is about one node; where it is ``about`` some of the facts, equal values of these need
    none.
    """

    probe: Text
    facts: Annotated[tuple[Fact, ...], msgspec.Meta(min_length=1)]
    about: tuple[Fact, ...] = ()


Body: TypeAlias = Exact | Adjacent | Minimum | Matrix | MustProbe


class Rule(msgspec.Struct, frozen=True):
    """One rule, who says so, and how bad it is to break it.

    ``require_known``: what can't be judged counts as broken; else it warns.
    """

    name: str
    source: str
    scope: Scope
    body: Body
    mode: Level = Level.REFUSE
    require_known: bool = False


class Rules(msgspec.Struct, frozen=True):
    """The rules of one file, and the words for its facts."""

    name: str
    rules: tuple[Rule, ...]
    words: dict[str, str] = {}

    def word(self, fact: str) -> str:
        """What people call a fact; a variable has its name, whatever the file says of others."""
        return self.words.get(fact, fact if fact.endswith("*") else fact.removeprefix("env."))


class Place(msgspec.Struct, frozen=True):
    """Nodes that a rule of this scope holds together: a communicator group, a fabric domain.

    Of a link ``nodes`` are the clients, and ``servers`` whom they talk to.
    """

    scope: Scope
    name: str
    nodes: tuple[str, ...]
    servers: tuple[str, ...] = ()


class Probed(msgspec.Struct, frozen=True):
    """What a probe found, once: of a client with these values, and a server with those.

    The values stand in the order of the rule's facts. Of one node both are the same.
    """

    probe: str
    client: tuple[str, ...]
    server: tuple[str, ...]
    passed: bool
