"""What can be said of an epoch, or of one shard of it, after a look at what is stored."""

from enum import StrEnum

__all__ = ["Verdict"]


class Verdict(StrEnum):
    """A typed judgement; skew is a normal condition, so none of these is an exception."""

    COMPLETE = "complete"  # every shard has a sound copy of this epoch
    BEHIND = "behind"  # the domain's newest epoch is older than the converged one
    AHEAD = "ahead"  # the domain holds an epoch that has not converged
    TORN = "torn"  # some shards have the epoch, others never finished it
    MIXED = "mixed"  # bytes, or loads, of several epochs stand under the stamp of one
    CORRUPT = "corrupt"  # bytes differ from what was attested
    FOREIGN = "foreign"  # another run, configuration or format
    MISSING = "missing"  # nothing is there, though a record says that something was
