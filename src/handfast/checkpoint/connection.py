"""A rank's line to its node's agent: the newest snapshot, calls, waiting, and agents that die.

Nothing here asks the agent "what happened?": the agent pushes what is so, and waiting is waiting
for a snapshot to say something. If the agent dies, training goes on: the next call or wait starts
another, which finds in the journals where its predecessor was.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from handfast.agent.joining import Opened, Round
from handfast.agent.local import AgentGone, AgentStuck, Client
from handfast.agent.reminder import Reminder
from handfast.agent.snapshot import Snapshot
from handfast.agent.snapshot import decode as decode_snapshot
from handfast.core.verdict import Verdict
from handfast.errors import Blocked, HandfastError, Refused, Superseded

__all__ = ["Connection", "Joining"]

logger = logging.getLogger("handfast")

POLL_S: Final = 0.25
REVIVALS: Final = 5
SOUND_S: Final = 30.0


class Joining(msgspec.Struct, frozen=True):
    """What an agent must know to open a rank's domain for a round."""

    root: str
    name: str
    shard: int
    run: str
    nonce: str
    secret: bytes
    bind: str


class Connection:
    """One rank's connection, used by one training thread.

    ``connect`` finds this node's agent or starts one; ``again`` is called once another agent has
    taken over, to hand over what the dead one had not persisted. ``latest`` reads the highest
    generation that the domain's journals know, without touching them.
    """

    def __init__(
        self,
        connect: Callable[[], Client],
        again: Callable[[], None],
        latest: Callable[[], int],
    ) -> None:
        self._connect = connect
        self._again = again
        self._latest = latest
        self._changed = threading.Condition()
        self._client: Client | None = None
        self._joining: Joining | None = None
        self._opened: Opened | None = None
        self._round: Round | None = None
        self._unjoined = False
        self._revivals = 0
        self._revived = 0.0
        self._unlinked: dict[str, str] = {}  # why, by agent
        self.patience_s: float | None = 600.0
        """How long an agent that lives may leave a call unanswered."""
        self.snapshot = Snapshot("", 0)
        """The newest that the agent has told; no I/O."""

    def open(self, joining: Joining) -> Opened:
        """Open this rank's domain for a round that is still to be agreed on.

        An agent that is just ending, is killed, or could not be started, is replaced. Raises what
        the agent raised, AgentGone where none can be kept alive, and Blocked where one does not
        answer.
        """
        self._joining, self._round, self._unlinked = joining, None, {}
        for attempt in range(REVIVALS):
            try:
                if self._client is None or self._client.ended:
                    if self._client is not None:
                        self._client.close()
                    self._client = self._dial()
                opened = self._open(joining, port=0)
                self._unjoined = False
                return opened
            except AgentGone as error:
                if attempt == REVIVALS - 1:
                    raise
                logger.warning("%s: asking another", error)
        raise AssertionError("unreachable")

    def begin(self, spec: Round) -> None:
        """Begin the generation that the ranks have agreed on."""
        self._round = spec
        self.call("begin", round=msgspec.msgpack.encode(spec))

    @property
    def domain(self) -> str:
        """This rank's domain, as the agent named it; empty before it was opened."""
        return self._opened.domain if self._opened else ""

    @property
    def generation(self) -> int:
        """The generation of this round; 0 before it began."""
        return self._round.generation if self._round else 0

    def close(self) -> None:
        """Leave: the agent ends by itself once all is settled."""
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(HandfastError, TimeoutError):
                client.call("close", timeout=5.0)
            client.close()

    def check(self) -> None:
        """Raise Superseded where a later launch has taken over; no I/O."""
        self._compare(self.snapshot.overtaken)

    def _compare(self, heard: int) -> None:
        if heard > self.generation > 0:
            raise Superseded(
                f"generation {heard} has begun on this run: this job, generation "
                f"{self.generation}, must stop"
            )

    def renew(self, why: str) -> None:
        """Open the domain anew: this agent has said that it can't go on with it."""
        if not self.snapshot.failure:
            self._note_failure(why)
        self._revive()

    def call(self, name: str, fds: Sequence[int] = (), **fields: Any) -> dict[str, Any]:
        """Ask the agent; if it dies, revive it and ask again. All calls are idempotent.

        Raises what the agent raises, AgentGone where no agent can be kept alive, and Blocked where
        one lives and does not answer for ``patience_s`` seconds (it is stopped, say).
        """
        while True:
            if self._opened is None:
                raise AgentGone("no agent is connected: call restore() first", socket="")
            self._revive()
            try:
                return self.ask(name, fds=fds, **{"domain": self._opened.domain, **fields})
            except AgentGone:
                if self._round is None:  # nothing could be told to another
                    raise
                self._revive()

    def ask(self, name: str, /, *, fds: Sequence[int] = (), **fields: Any) -> dict[str, Any]:
        """Ask this agent and no other. Raises what it raised, AgentGone, and Blocked."""
        client = self._client
        if client is None:
            raise AgentGone("no agent is connected: call restore() first", socket="")
        try:
            return client.call(name, fds=fds, timeout=self.patience_s, **fields)
        except TimeoutError as error:
            pid = client.agent_pid
            raise Blocked(str(error), by=(f"agent process {pid} of this node",)) from error

    def wait(
        self,
        ready: Callable[[Snapshot], bool],
        timeout: float | None,
        what: str,
        nudge: Callable[[], None] | None = None,
    ) -> None:
        """Wait for the snapshot to say so; revives the agent, and reminds of who is missing.

        ``nudge`` is called a few times a second meanwhile. Raises Blocked, naming them, after
        ``timeout`` seconds; Superseded; AgentGone.
        """
        reminder = Reminder()
        pause = POLL_S if timeout is None else max(0.0, min(POLL_S, timeout))
        while True:
            with self._changed:
                if ready(self.snapshot) or (self._changed.wait(pause) and ready(self.snapshot)):
                    return
            if self._client is None:
                raise AgentGone(f"{what}: nobody to wait for, this is closed", socket="")
            self.check()
            self._revive()
            if nudge is not None:
                nudge()
            if reminder.over(timeout):
                phase = self.snapshot.lattice.phase
                raise Blocked(
                    f"{what} is not done after {timeout:g} s ({phase})", by=self._missing()
                )
            if reminder.due():
                by = ", ".join(self._missing())
                logger.warning("%s has waited %.0f s for: %s", what, reminder.waited, by)

    def _missing(self) -> Sequence[str]:
        """Name who is awaited, and where they live."""
        by = self.snapshot.lattice.blocked_by
        if not by:
            return (self._opened.domain,) if self._opened is not None else ()
        domains = self._round.configuration.domains if self._round is not None else ()
        hosts = {domain.id: domain.host for domain in domains}
        return tuple(f"{name} (on {self._place(hosts.get(name, '?'))})" for name in by)

    def _place(self, host: str) -> str:
        """Name a node, and why its agent and ours are not linked, where that is known."""
        why = self._unlinked.get(host, "")
        return f"{host}, whose agent is refused: {why}" if why else host

    def _dial(self) -> Client:
        try:
            client = self._connect()
        except AgentStuck as error:  # it may go on yet, and no other can take its place
            raise Blocked(str(error), by=("the agent of this node",)) from error
        client.on_push(self._take)
        return client

    def _take(self, topic: str, fields: dict[str, Any]) -> None:
        """Keep the newest of what is told; called in the client's reader thread."""
        if topic.startswith("unlinked "):
            self._unlinked[fields["agent"]] = fields["why"]
        if topic == "snapshot":
            snapshot = decode_snapshot(fields["data"])
            with self._changed:
                self.snapshot = snapshot
                self._changed.notify_all()

    def _open(self, joining: Joining, port: int) -> Opened:
        within_s = math.inf if self.patience_s is None else self.patience_s / 2
        reply = self.ask("open", port=port, within_s=within_s, **msgspec.structs.asdict(joining))
        self._opened = msgspec.msgpack.decode(reply["opened"], type=Opened)
        return self._opened

    def _revive(self) -> None:
        """Start another agent where ours has died, and give it what it must know.

        An agent that lives and whose domain failed (its journal could not be written, say) opens
        the domain anew, as another incarnation. Raises AgentGone, with the last failure, where
        ``REVIVALS`` of them in a row have not lived for ``SOUND_S`` seconds.
        """
        failed: AgentGone | None = None
        while (client := self._client) is not None and (
            client.ended or self.snapshot.failure or self._unjoined
        ):
            if self._opened is None or self._joining is None or self._round is None:
                return
            self.check()
            why = self.snapshot.failure or ("it ended" if client.ended else "interrupted")
            if self._exhausted():
                raise failed or AgentGone(
                    f"this rank's domain failed {REVIVALS} times in a row, the last time: {why}",
                    socket=client.path,
                    log=client.log,
                )
            logger.warning("agent process %d failed (%s): starting anew", client.agent_pid, why)
            # A job that was taken for dead must not claim the domain of the one that took over.
            self._compare(self._latest())
            try:
                self._reopen(client, self._joining, self._round, self._opened.address[1])
            except AgentGone as error:
                failed = error
                self._note_failure("its successor failed, too")
            except HandfastError as error:  # so that the next call tries again
                self._note_failure(str(error))
                raise

    def _exhausted(self) -> bool:
        """Count one more revival; True, once, where that is one too many."""
        now = time.monotonic()
        self._revivals = 1 if now - self._revived > SOUND_S else self._revivals + 1
        self._revived = now
        if self._revivals > REVIVALS:
            self._revivals = 0  # whoever calls again has heard, and may try again
            return True
        return False

    def _reopen(self, client: Client, joining: Joining, spec: Round, port: int) -> None:
        self._unjoined = True  # whatever interrupts this, the next call goes through it again
        if client.ended:
            client.close()
            self._client = self._dial()
        with self._changed:
            self.snapshot = Snapshot("", 0)
        before = self.domain
        domain = self._open(joining, port).domain
        if domain != before:
            raise Refused(
                f"{joining.root} is not the directory that it was: {before} is gone from it",
                verdict=Verdict.MISSING,
                shards=(before,),
                remedy="put the directory back, or stop this job and start it anew",
            )
        self.ask("begin", domain=domain, round=msgspec.msgpack.encode(spec))
        self._again()
        self._unjoined = False

    def _note_failure(self, why: str) -> None:
        with self._changed:
            self.snapshot = msgspec.structs.replace(self.snapshot, failure=why)
