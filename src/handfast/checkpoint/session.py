"""One rank's part in one round: the meeting, the restore, its images and its saves."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from handfast.agent import witness
from handfast.agent.joining import Round
from handfast.agent.local import Client
from handfast.agent.snapshot import FORGONE, Proposal, Snapshot
from handfast.checkpoint import fate, rounds
from handfast.checkpoint.brought import LEAVE, refuse_mixed, warn
from handfast.checkpoint.collective import Collective, address_among
from handfast.checkpoint.connection import Connection, Joining
from handfast.checkpoint.refusal import Hand, agree, apart, lay, read, refusal
from handfast.checkpoint.staging import Staging
from handfast.checkpoint.validated import Validated
from handfast.core.lattice import Epoch
from handfast.core.membership import Formation
from handfast.core.messages import Certificate, RestoreCertificate
from handfast.core.retain import Keep
from handfast.core.verdict import Verdict
from handfast.core.view import Lattice
from handfast.errors import Blocked, Damaged, HandfastError, Refused, SaveFailed, Superseded
from handfast.store import manifest as codec
from handfast.store.files import Files
from handfast.store.manifest import Stamp
from handfast.store.provenance import NOTHING, Brought, found
from handfast.store.shelf import Shelf

__all__ = ["Session"]

logger = logging.getLogger("handfast")


class Session:
    """Drives one rank through rounds, for one training thread.

    ``connect`` finds this node's agent or starts one. Errors of the methods: Superseded where a
    later launch has taken over; AgentGone where no agent can be kept alive.
    """

    def __init__(
        self,
        collective: Collective,
        root: str,
        files: Files,
        *,
        connect: Callable[[], Client],
    ) -> None:
        self.collective = collective
        self.root = root
        self._files = files
        self._line = Connection(connect, self._again, self._latest)
        self._meeting: rounds.Meeting | None = None
        self._round: Round | None = None
        self.staging = Staging(self._line, root)
        self._listed: set[Epoch] = set()
        self._refused: set[Epoch] = set()
        self._divergent: set[Epoch] = set()
        self._raised: set[Epoch] = set()
        self._void: dict[Epoch, str] = {}  # what never converges, when no snapshot says so any more
        self._accepted: tuple[Epoch, int] | None = None
        self._found: dict[Epoch, str | None] = {}
        self.brought: Sequence[Brought] = ()  # by the ranks of this round

    # --- what is known, without I/O ------------------------------------------------------------

    @property
    def snapshot(self) -> Snapshot:
        """The newest that the agent has told."""
        return self._line.snapshot

    @property
    def lattice(self) -> Lattice:
        """The lattice as this rank's domain knows it now."""
        return self._line.snapshot.lattice

    @property
    def generation(self) -> int:
        """The generation of this round; 0 before it began."""
        return self._line.generation

    def check(self) -> None:
        """Raise Superseded where a later launch has taken over; no I/O."""
        self._line.check()

    def phase_of(self, epoch: Epoch) -> str:
        """Say how far an epoch has come, also one of an earlier generation."""
        now = self.snapshot
        exactly = now.line is not None and now.line.epoch == epoch
        return "failed" if epoch in self._void and not exactly else fate.phase(now, epoch)

    # --- the round -----------------------------------------------------------------------------

    def start(
        self,
        *,
        want: int | None,
        keep: Keep,
        window: int,
        drain_s: float,
        patience_s: float | None = 600.0,
        require: bool = False,
        in_place: bool = False,
        lineage: str = "",
        brought: Brought = NOTHING,
    ) -> Formation:
        """Meet the other ranks, open this rank's domain, and begin a generation.

        ``patience_s`` bounds how long an agent may be silent. Raises Refused, the same on every
        rank, where directories make no one run, or there is none and some rank does ``require`` it.
        """
        self._line.patience_s, self._accepted = patience_s, None
        self._found = {}
        place = self.collective.place
        mine = rounds.peek(self._files, self.root, place.node, place.rank)
        self._meeting = rounds.meet(self.collective, mine, require=require)
        hand = Hand(want=want, brought=brought)
        try:  # whatever happens here, the others must hear of it: they wait in the gathering
            generation = self._count(self._meeting) if place.rank == 0 else 0
            opened = self._line.open(self._joining(self._meeting))
            hand = Hand(opened, generation, want, lineage=lineage, brought=brought)
        except Refused as error:
            hand = Hand(want=want, problem=str(error), verdict=error.verdict)
        except Blocked as error:
            hand = Hand(want=want, problem=str(error), by=tuple(error.by))
        except OSError as error:
            hand = Hand(want=want, problem=f"{error.strerror}: {error.filename or self.root}")
        except Damaged as error:
            hand = Hand(want=want, problem=str(error), verdict=Verdict.CORRUPT)
        except HandfastError as error:
            hand = Hand(want=want, problem=str(error))
        told = self._meeting.peeks[0].known if place.rank else ""
        said = read(self.gather("hand", lay(hand, told)))
        self.brought = [each.brought for each in said]
        return self._begin(said, keep, window, drain_s, in_place)

    @property
    def run(self) -> str:
        """The run of this round; "" before the ranks have met."""
        return self._meeting.run if self._meeting else ""

    def gather(self, what: str, data: bytes) -> list[bytes]:
        """Gather with the ranks of this round: what was laid down for another one is never met."""
        nonce = self._meeting.nonce if self._meeting else ""
        return self.collective.gather(f"{what}/{nonce}", data)

    def _count(self, meeting: rounds.Meeting) -> int:
        """Rank 0 allocates the generation for all. Raises what :func:`rounds.allocate_in` does."""
        reported, patience_s = max(p.generation for p in meeting.peeks), self._line.patience_s
        return rounds.allocate_in(self._files, self.root, meeting.nonce, reported, patience_s)

    def _joining(self, meeting: rounds.Meeting) -> Joining:
        rank = self.collective.place.rank
        return Joining(
            root=os.path.realpath(self.root),
            name=rounds.domain_name(rank),
            shard=rank,
            run=meeting.run,
            nonce=meeting.nonce,
            secret=meeting.secret,
            bind=address_among({peek.node for peek in meeting.peeks}),
        )

    def _begin(
        self, said: Sequence[Hand], keep: Keep, window: int, drain_s: float, in_place: bool
    ) -> Formation:
        if self._meeting is None:
            raise Superseded("no round has begun")
        opened, generation, want = agree(said)
        mine = opened[self.collective.place.rank]
        formed = rounds.settle(
            self.collective, self._meeting, [(o.domain, o.known) for o in opened]
        )
        self._round = Round(
            generation=generation,
            nonce=self._meeting.nonce,
            configuration=formed.configuration,
            founding=formed.founding,
            homes={o.domain: o.agent for o in opened},
            agents={o.agent: o.address for o in opened},
            shelves={o.domain: o.shelf for o in opened if o.agent == mine.agent},
            want=want,
            keep=keep,
            window=window,
            drain_s=drain_s,
            by_trainer=in_place,
        )
        self.staging.give_up()  # or the agent would drain what nobody hands over any more
        self._line.begin(self._round)
        self.staging.renew(window)
        return formed

    def neighbours(self) -> list[int]:
        """List the shards of this node, its own too; the first may store what their ranks share."""
        if self._round is None:
            raise Superseded("no round has begun")
        return rounds.beside(self._round, self.collective.place.rank)

    # --- restoring -----------------------------------------------------------------------------

    def await_candidate(self, timeout: float | None) -> Epoch | None:
        """Wait for an epoch whose copy this rank is to judge; None once all is decided.

        Raises Blocked where time is up.
        """

        def news(now: Snapshot) -> bool:
            decided = bool(now.proposal or now.stuck or now.resumed)
            return self._ours(now) and (decided or now.checking not in (None, *self._found))

        self._line.wait(news, timeout, "restore", nudge=self._judge_again)
        now = self.snapshot
        return None if now.proposal or now.stuck or now.resumed else now.checking

    def judge(self, epoch: Epoch, problem: str | None) -> None:
        """Say what was found in this rank's copy; None leaves it to the agent."""
        self._found[epoch] = problem
        self._answer("judged", epoch, problem=problem)

    def _judge_again(self) -> None:
        """Repeat what an agent may have died of before it wrote it down: it asks again then."""
        epoch = self.snapshot.checking
        if epoch is not None and epoch in self._found:
            self._answer("judged", epoch, problem=self._found[epoch])

    def look(self, epoch: Epoch, shard: int) -> Validated:
        """Get this node's copy of a shard before it is judged.

        Raises FormatError where it is not what was attested, Refused where there is none.
        """
        domains = self._round.configuration.domains if self._round is not None else ()
        domain = next(domain.id for domain in domains if domain.shard == shard)
        return self._copy("manifest", domain, epoch)

    def _copy(self, call: str, domain: str, epoch: Epoch) -> Validated:
        if self._round is None:
            raise Superseded("no round has begun")
        reply = self._line.call(call, domain=domain, epoch=msgspec.structs.astuple(epoch))
        shelf = Shelf(self._files, *self._round.shelves[domain])
        return Validated(shelf, codec.decode(reply["manifest"], where=f"{domain} {epoch}"))

    def await_proposal(self, timeout: float | None) -> Proposal:
        """Wait until every shard of some epoch has a valid copy.

        Raises Refused where no epoch is left or a rank declined, Blocked where time is up.
        """
        self._line.wait(
            lambda now: self._ours(now) and bool(now.proposal or now.stuck or now.resumed),
            timeout,
            "restore",
        )
        self._raise_stuck()
        if self.snapshot.proposal is None:
            raise Superseded("this round was restored already")
        return self.snapshot.proposal

    def await_certificate(self, timeout: float | None) -> RestoreCertificate:
        """Wait until every rank has accepted, and that is durable here.

        Raises what :meth:`await_proposal` raises. Only after this may live state be mutated.
        """
        self._line.wait(
            lambda now: self._ours(now) and bool(now.stuck or now.resumed),
            timeout,
            "restore",
            nudge=self._accept_again,
        )
        if self.snapshot.resumed is None:
            self._raise_stuck()
        if self.snapshot.resumed is None:
            raise Superseded("the restore ended without a certificate")
        return self.snapshot.resumed

    def _ours(self, now: Snapshot) -> bool:
        """Say whether a snapshot is of this round, not of one that ended before it."""
        return self._round is not None and now.round == self._round.nonce

    def _raise_stuck(self) -> None:
        stuck = self.snapshot.stuck
        if stuck is None or self.snapshot.resumed is not None:
            return
        want = self._round.want if self._round else None
        raise refusal(stuck, self.snapshot.retained, want)

    def load(self, proposal: Proposal, shard: int) -> Validated:
        """Get a copy of a shard that this node's agent has validated.

        Raises Refused where the shard lives at another node's agent.
        """
        if self._round is None:
            raise Superseded("no round has begun")
        epoch, homes = proposal.epoch, self._round.homes
        domains = self._round.configuration.domains
        domain, mine = domains[proposal.copies[shard]].id, domains[self.collective.place.rank].id
        if homes[domain] != homes[mine]:
            raise Refused(
                f"rank {self.collective.place.rank} shared a node with rank {shard}, which holds "
                f"what they have alike, and now runs on {homes[mine]}, not on {homes[domain]}",
                verdict=Verdict.FOREIGN,
                shards=(domain,),
                remedy="start the ranks that shared a node on one node again",
            )
        return self._copy("load", domain, epoch)

    def accept(self, proposal: Proposal) -> None:
        """Say that this rank compared the epoch with its live state and will load it."""
        copy = proposal.copies[self.collective.place.rank]
        self._accepted = (proposal.epoch, copy)
        self._answer("accept", proposal.epoch, copy=copy)

    def _accept_again(self) -> None:
        """Repeat what an agent may have heard too early, or died of before it wrote it down.

        An acceptance is write-once, so that saying it twice is no harm.
        """
        now = self.snapshot
        if self._accepted and self._ours(now) and now.proposal:
            epoch, copy = self._accepted
            if now.proposal.epoch == epoch:
                self._answer("accept", epoch, copy=copy)

    def decline(self, epoch: Epoch, reason: str) -> None:
        """Say that this rank can't load the epoch, so that no rank waits for it."""
        self._answer("decline", epoch, reason=reason)

    def _answer(self, name: str, epoch: Epoch, **fields: Any) -> None:
        told = msgspec.structs.astuple(epoch)
        self._line.call(name, generation=self.generation, epoch=told, **fields)

    # --- saving --------------------------------------------------------------------------------

    def prove(
        self, epoch: Epoch, wait_s: float, first: int, digests: Mapping[str, bytes]
    ) -> list[str] | None:
        """Ask which paths the first rank of this node holds alike; None where it is not heard."""
        said: dict[str, Any] = {"paths": list(digests), "digests": list(digests.values())}
        said |= {"epoch": msgspec.structs.astuple(epoch), "wait_s": min(wait_s, witness.WAIT_S)}
        reply = self._line.call("prove", first=first, **said)
        return reply["same"] if reply["heard"] else None

    def forgo(self, epoch: Epoch, reason: str) -> None:
        """Vote SKIP on an epoch that the schedule named and this rank does not save."""
        self._answer("skip", epoch, reason=f"{FORGONE}: {reason}")

    def new_problems(self, told: bool = False) -> list[str]:
        """List failures of saves that were learned of and not listed yet.

        Those that a handle has raised are left out, but if ``told``.
        """
        for epoch, _, why in fate.unwritten(self.snapshot):
            self._void.setdefault(epoch, why)
        found = fate.failures(self.snapshot)
        fresh = [
            f"epoch {epoch}: {problem}"
            for epoch, problem in found
            if epoch.generation == self.generation and epoch not in self._listed
            if told or epoch not in self._raised
        ]
        self._listed.update(epoch for epoch, _ in found)
        return fresh

    def new_refusals(self) -> list[tuple[Epoch, str]]:
        """List the epochs that validators refused, learned of and not listed yet, and a line."""
        found = dict(reversed(fate.refusals(self.snapshot)))  # of several ranks, this one's own
        fresh = sorted(found.keys() - self._refused)
        self._refused.update(fresh)
        mine = [epoch for epoch in fresh if epoch.generation == self.generation]
        return [(epoch, f"epoch {epoch}: {found[epoch]}") for epoch in mine]

    def new_divergences(self) -> list[str]:
        """List the epochs whose ranks differ in what they hold alike, not listed yet: a line each.

        Only the first rank's agent hears of it.
        """
        fresh = [d for d in self.snapshot.divergent if d.epoch not in self._divergent]
        self._divergent.update(found.epoch for found in fresh)
        return [
            apart(found.epoch, found.groups)
            for found in fresh
            if found.epoch.generation == self.generation
        ]

    @property
    def histories(self) -> Sequence[Brought]:
        """What each rank goes on as, where the last epoch that all ranks have persisted was of no
        one history; else nothing. Only the first rank's agent hears of it.
        """
        now = self.snapshot.apart
        return now.said if now is not None and now.epoch.generation == self.generation else ()

    def check_histories(self, stamp: Stamp) -> None:
        """Hear what all ranks' shards are of. Raises Refused, the same on all, for a mixture."""
        laid = self.gather("history", msgspec.msgpack.encode(found(stamp)))
        said = [msgspec.msgpack.decode(data, type=Brought) for data in laid]
        refuse_mixed(said, f"epoch {stamp.epoch}, which all were to restore,", LEAVE)
        if self.collective.place.rank == 0:
            warn(said, f"epoch {stamp.epoch}")

    def wait_persisted(self, epoch: Epoch, timeout: float | None) -> None:
        """See :meth:`handfast.checkpoint.save.Save.persisted`."""
        self._line.wait(lambda now: fate.settled(now, epoch), timeout, f"epoch {epoch}")
        now = self.snapshot
        forgotten = epoch in self._void and not fate.attested(now, epoch)
        if forgotten or not fate.persisted(now, epoch):
            self._raised.add(epoch)
            why = fate.problems(now, epoch) or [self._void[epoch]]
            raise SaveFailed(f"epoch {epoch}: {why[0]}")

    def wait_converged(self, epoch: Epoch, timeout: float | None) -> Certificate:
        """See :meth:`handfast.checkpoint.save.Save.converged`."""
        ends = ("converged", "failed")
        self._line.wait(lambda _: self.phase_of(epoch) in ends, timeout, f"epoch {epoch}")
        now = self.snapshot
        if now.line is not None and self.phase_of(epoch) == "converged":
            return now.line
        self._raised.add(epoch)
        why = "; ".join(fate.problems(now, epoch)) or self._void[epoch]
        raise SaveFailed(f"epoch {epoch} will not converge: {why}")

    def _latest(self) -> int:
        at = self.collective.place
        return rounds.peek(self._files, self.root, at.node, at.rank).generation

    def _again(self) -> None:
        self.staging.again()

    def close(self) -> None:
        """Leave: the agent ends by itself once all is settled."""
        self._line.close()
        self.staging.close()
