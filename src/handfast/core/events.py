"""What can happen to a member, and what it asks of the world.

Events and actions are plain frozen values. Time is no event: a :class:`Tick` only says "send
again what a peer seems to lack", and no number of them, early or late, changes any outcome (S15).
"""

from __future__ import annotations

import msgspec

from handfast.core.lattice import Epoch
from handfast.core.membership import Change, Roster
from handfast.core.messages import Certificate, Copy, Message, Record, RestoreCertificate
from handfast.core.recover import Phase
from handfast.core.retain import Keep

__all__ = [
    "Accept", "Action", "Begin", "Captured", "Check", "Checked", "Decline", "Effects", "Event",
    "Failed", "Forgone", "Greet", "Overtaken", "Persist", "Persisted", "Pinned", "Propose",
    "Publish", "Received", "Refuse", "Reject", "Release", "Resume", "Send", "Stuck", "Tick",
]  # fmt: skip


class _Value(msgspec.Struct, frozen=True, gc=False):
    pass


# --- events -------------------------------------------------------------------------------------


class Begin(_Value, frozen=True):
    """A round of the job's engine starts this generation: freeze, then recover.

    The host has drained or abandoned what was being persisted. ``want`` asks for one step.
    ``brought`` is what a domain that joins has already, said by who lets it join.
    """

    generation: int
    round: str
    roster: Roster
    founding: bool = False
    changes: tuple[Change, ...] = ()
    want: int | None = None
    keep: Keep = Keep()
    window: int = 2
    brought: tuple[Copy, ...] = ()


class Captured(_Value, frozen=True):
    """The trainer has handed over an image of this epoch."""

    epoch: Epoch


class Persisted(_Value, frozen=True):
    """The store says: durable by the tier's standard, and read back."""

    epoch: Epoch
    digest: str


class Failed(_Value, frozen=True):
    """The image could not be persisted, or was refused by a validator."""

    epoch: Epoch
    reason: str


class Forgone(_Value, frozen=True):
    """The trainer does not save this epoch, though its schedule says so, and why."""

    epoch: Epoch
    reason: str


class Checked(_Value, frozen=True):
    """Every byte of the own copy was read: ``reason`` is empty where all were right."""

    generation: int
    epoch: Epoch
    reason: str = ""


class Accept(_Value, frozen=True):
    """The rank has compared the candidate, dry, and will load this copy of its shard."""

    generation: int
    epoch: Epoch
    copy: int


class Decline(_Value, frozen=True):
    """The rank can't take the candidate."""

    generation: int
    epoch: Epoch
    reason: str


class Pinned(_Value, frozen=True):
    """These epochs, and no others, are held by readers; until it is said, nothing is released."""

    epochs: tuple[Epoch, ...]


class Received(_Value, frozen=True):
    """A message came; any number of times, in any order, as late as it likes."""

    message: Message


class Greet(_Value, frozen=True):
    """A link to this peer is up, perhaps again."""

    peer: int


class Tick(_Value, frozen=True):
    """Send again what peers seem to lack."""


Event = (
    Begin | Captured | Persisted | Failed | Forgone | Checked | Accept | Decline | Pinned
    | Received | Greet | Tick
)  # fmt: skip


# --- actions ------------------------------------------------------------------------------------


class Persist(_Value, frozen=True):
    """Write the image of this epoch, read it back, then say Persisted or Failed."""

    epoch: Epoch


class Refuse(_Value, frozen=True):
    """This epoch is not taken; ``by`` names who fills the window, if that is why."""

    epoch: Epoch
    reason: str
    by: tuple[str, ...] = ()


class Check(_Value, frozen=True):
    """Read every byte of the own copy, then say Checked."""

    generation: int
    epoch: Epoch


class Propose(_Value, frozen=True):
    """Every shard has a valid copy: the rank may compare it and Accept or Decline.

    ``copies[s]`` masks the VALID copies of shard s.
    """

    generation: int
    epoch: Epoch
    copies: tuple[int, ...]


class Stuck(_Value, frozen=True):
    """This generation will restore nothing: declined by a rank, or no epoch is left."""

    phase: Phase
    epoch: Epoch | None
    reasons: tuple[str, ...]


class Resume(_Value, frozen=True):
    """The restore certificate is durable here: the rank may mutate its state, and train."""

    certificate: RestoreCertificate


class Publish(_Value, frozen=True):
    """This epoch has converged, and that is durable here: `latest` may follow it."""

    certificate: Certificate


class Release(_Value, frozen=True):
    """Remove the files of these epochs, manifests first."""

    epochs: tuple[Epoch, ...]


class Overtaken(_Value, frozen=True):
    """A later round exists: this one must stop."""

    generation: int


class Reject(_Value, frozen=True):
    """A message was refused, with why: counted and logged, and nothing else."""

    reason: str


Action = (
    Persist | Refuse | Check | Propose | Stuck | Resume | Publish | Release | Overtaken | Reject
)  # fmt: skip


class Send(_Value, frozen=True):
    """One message to one peer, by its place in the configuration."""

    to: int
    message: Message


class Effects(_Value, frozen=True):
    """What a step asks for, in this order: append and sync all of ``persist``, send, apply."""

    persist: tuple[Record, ...] = ()
    send: tuple[Send, ...] = ()
    apply: tuple[Action, ...] = ()
