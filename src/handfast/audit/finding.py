"""What an audit found, and how much that is worth."""

from __future__ import annotations

from enum import StrEnum

import msgspec

__all__ = ["Code", "Finding", "Strength"]


class Strength(StrEnum):
    """How sure a finding is: by the format's own rules, beyond reasonable doubt, or worth a look.

    A sound checkpoint has no findings that are ``certain`` or ``strong``: many are tested for that.
    """

    CERTAIN = "certain"
    STRONG = "strong"
    HINT = "hint"


class Code(StrEnum):
    """The kinds of findings: their names in ``--json`` and SARIF never change their meaning."""

    COUNTERS = "counters-disagree"
    MASTER = "weights-are-not-their-masters-rounding"
    REPLICAS = "replicas-differ"
    MOMENTS = "moments-break-their-bound"
    NEGATIVE = "second-moment-is-negative"
    NONFINITE = "values-are-not-finite"
    IDENTICAL = "shards-are-identical"
    ZERO = "shard-is-all-zero"
    STALE = "step-repeats-another"
    MISSING = "part-is-missing"
    EXTRA = "part-is-foreign"
    TRUNCATED = "part-is-cut"
    UNREADABLE = "part-is-unreadable"
    CORRUPT = "bytes-differ-from-their-checksum"
    WORLD = "parts-disagree-on-the-job"
    INDEX = "index-and-files-disagree"
    UNCOMMITTED = "step-was-never-committed"
    LEFTOVER = "left-over-of-a-save"
    TRACKER = "tracker-points-elsewhere"
    TIMES = "file-times-straddle-saves"
    UNSEEN = "directory-was-not-looked-at"
    UNREAD = "values-were-not-read"
    HARMFUL = "pickle-names-what-runs-code"


class Finding(msgspec.Struct, frozen=True):
    """One thing that is wrong, or may be.

    ``step`` and ``parts`` say where, by their paths; ``says`` is one sentence for a person, and
    ``evidence`` the values that it stands on, each with where it was read.
    """

    code: Code
    strength: Strength
    step: str
    says: str
    parts: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()
