"""The port that every tier fills: what a domain must be able to do, wherever its bytes lie.

`handfast.testing.stores.DirectorySuite` is the conformance suite for it.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, Protocol

import msgspec

from handfast.core.lattice import Epoch
from handfast.core.verdict import Verdict
from handfast.errors import Damaged, Refused
from handfast.store.bulk import Source
from handfast.store.image import Layout
from handfast.store.manifest import Left, Manifest, Stamp

__all__ = ["Buffer", "Entry", "Log", "Progress", "Tier", "Verify", "Written"]

Buffer = bytes | bytearray | memoryview  # and whatever else memoryview() takes, an mmap say
Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all, from the thread that does the work."""

Verify = Literal["fsync", "sampled", "full"]
"""What is read back before an epoch counts as written: nothing, a sample, or all of it."""


class Entry(msgspec.Struct, frozen=True):
    """One manifest as it was found: sound (`manifest` and `digest` are set), or what is wrong."""

    path: str
    epoch: Epoch
    manifest: Manifest | None = None
    digest: str = ""
    verdict: Verdict | None = None
    problem: str = ""

    def sound(self, digest: str = "") -> Manifest:
        """The manifest, or Damaged (its bytes are not those written) or Refused (not ours).

        With `digest`, the one that was voted for, Damaged for a sound one of another.
        """
        if self.manifest is not None:
            if digest not in ("", self.digest):
                raise Damaged(
                    f"{self.path}: its digest is {self.digest}, but {digest} was voted for. "
                    "What to do: restore this shard from another copy or another epoch"
                )
            return self.manifest
        if self.verdict is None or self.verdict is Verdict.CORRUPT:
            raise Damaged(self.problem)
        raise Refused(
            self.problem,
            verdict=self.verdict,
            shards=(self.path,),
            remedy="put this shard's own file back; `handfast verify` says what is whose",
        )


class Written(msgspec.Struct, frozen=True):
    """An epoch that is durable here: its manifest, whose digest a vote STAGED carries."""

    digest: str
    manifest: Manifest
    bytes_written: int
    bytes_total: int


class Log(Protocol):
    """The tier's own journal; `append`, then `sync`, and only then act on the record."""

    @property
    def length(self) -> int:
        """Bytes in the journal."""

    def append(self, payload: bytes) -> None:
        """Add one record; SaveFailed is final."""

    def sync(self) -> None:
        """Make every record durable; SaveFailed is final."""


class Tier(Protocol):
    """One domain of a tier, claimed by one incarnation.

    The rule of the owner: append a record, sync, ask `current()`, and only if that is true send
    or apply what the record says. The rule of a claim: take the next incarnation, durably, and
    only then read what the predecessors recorded. So either the predecessor sees the claim, or
    the successor sees the record.
    """

    @property
    def incarnation(self) -> int:
        """This owner's number; a later owner's is greater."""

    @property
    def history(self) -> tuple[bytes, ...]:
        """All records of earlier incarnations that are not void, oldest first."""

    @property
    def journal(self) -> Log:
        """This incarnation's own journal."""

    def current(self) -> bool:
        """Whether no later incarnation has claimed the domain; looks at the medium each time."""

    def write(
        self,
        stamp: Stamp,
        layout: Layout,
        image: Buffer | Source,
        *,
        objects: bytes,
        aliases: Mapping[str, str],
        environment: Mapping[str, str],
        replicated: Iterable[str],
        structure: str,
        left: Left | None = None,
        digests: Callable[[], bytes] | None = None,
        parent: Manifest | None = None,
        verify: Verify = "sampled",
        progress: Progress | None = None,
    ) -> Written:
        """Make one shard of one epoch durable by the tier's own standard, or raise SaveFailed."""

    def manifests(self) -> dict[Epoch, Entry]:
        """Every epoch that has a manifest here, sound or not."""

    def read(
        self,
        epoch: Epoch,
        into: Buffer | None = None,
        *,
        digest: str = "",
        progress: Progress | None = None,
    ) -> Manifest:
        """Read and verify every byte of an epoch; Damaged or Refused before anything is used."""

    def release(self, epochs: Iterable[Epoch]) -> tuple[Epoch, ...]:
        """Let epochs go; returns those that stay because a reader has pinned them."""

    def free_bytes(self) -> int:
        """Bytes that can still be written."""
