"""Two protocols whose state spaces others have counted: the search must count the same.

Two-phase commit and Paxos Commit, as J. Gray and L. Lamport specify them in TLA+ (*Consensus on
Transaction Commit*, ACM TODS 31(1), 2006). TLC's figures: 288 states for two-phase commit with 3
resource managers and 50,816 with 6; 1,321,761 for Paxos Commit with 2 resource managers, 3
acceptors and 2 ballots. Stateright's example asserts 288 and 8,832 (5). A search that loses or
invents states would not agree with all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Final, NamedTuple, TypeVar

__all__ = ["SOURCES", "PaxosCommit", "TwoPhase", "orbit"]

SOURCES: Final = {
    "TLC": "the checker of TLA+ (L. Lamport), on the specifications of J. Gray and L. Lamport, "
    "Consensus on Transaction Commit, ACM TODS 31(1), 2006",
    "Stateright": "J. Nadal's model checker, whose example of two-phase commit asserts the figure",
    "ourselves": "no one else's figure: the 8,832 states above, up to exchanges of managers",
}
"""Whose figures ours are held against."""


class Manager(NamedTuple):
    """A resource manager, and what the coordinator and the network hold of it."""

    state: str = "working"
    counted: bool = False
    sent: bool = False


class Transaction(NamedTuple):
    """A state of two-phase commit; messages are never lost, and stay."""

    coordinator: str
    managers: tuple[Manager, ...]
    commit: bool = False
    abort: bool = False


class TwoPhase:
    """Two-phase commit with so many resource managers."""

    def __init__(self, managers: int) -> None:
        self.managers = managers

    def initial(self) -> Iterator[Transaction]:
        """Everybody works."""
        yield Transaction("init", (Manager(),) * self.managers)

    def moves(self, state: Transaction) -> Iterator[tuple[str, Transaction]]:
        """Follow the actions of the specification, in its order."""
        deciding = state.coordinator == "init"
        if deciding and all(manager.counted for manager in state.managers):
            yield "commit", state._replace(coordinator="committed", commit=True)
        if deciding:
            yield "abort", state._replace(coordinator="aborted", abort=True)
        for i, manager in enumerate(state.managers):
            if deciding and manager.sent:
                yield f"count {i}", _with(state, i, manager._replace(counted=True))
            if manager.state == "working":
                yield f"prepare {i}", _with(state, i, manager._replace(state="prepared", sent=True))
                yield f"give up {i}", _with(state, i, manager._replace(state="aborted"))
            if state.commit:
                yield f"commit {i}", _with(state, i, manager._replace(state="committed"))
            if state.abort:
                yield f"abort {i}", _with(state, i, manager._replace(state="aborted"))

    @staticmethod
    def consistent(state: Transaction) -> bool:
        """Say that no manager has committed what another one has aborted."""
        states = {manager.state for manager in state.managers}
        return not {"committed", "aborted"} <= states


def _with(state: Transaction, i: int, manager: Manager) -> Transaction:
    managers = (*state.managers[:i], manager, *state.managers[i + 1 :])
    return state._replace(managers=managers)


def orbit(state: Transaction) -> Transaction:
    """Give the representative of a state under every exchange of resource managers."""
    return state._replace(managers=tuple(sorted(state.managers)))


T = TypeVar("T")

NONE: Final = -1
VALUES: Final = ("none", "prepared", "aborted")


class Ballots(NamedTuple):
    """A state of Paxos Commit: managers, acceptors as (mbal, bal, value), and a mask of messages.

    ``acceptors[manager][acceptor]``.
    """

    managers: tuple[str, ...]
    acceptors: tuple[tuple[tuple[int, int, int], ...], ...]
    messages: int = 0


class PaxosCommit:
    """Paxos Commit; every set of messages that was ever sent is a mask over all there can be."""

    def __init__(self, managers: int = 2, acceptors: int = 3, ballots: int = 2) -> None:
        self.managers, self.acceptors, self.ballots = managers, acceptors, ballots
        need = acceptors // 2 + 1
        self.majorities = [
            tuple(a for a in range(acceptors) if mask >> a & 1)
            for mask in range(1 << acceptors)
            if mask.bit_count() == need
        ]
        self.bit: dict[tuple[object, ...], int] = {}
        rms, accs, bals = range(managers), range(acceptors), range(ballots)
        for key in (
            *(("1a", r, b) for r in rms for b in bals),
            *(
                ("1b", r, m, b, v, a)
                for r, m, b, v, a in product(rms, bals, range(NONE, ballots), range(3), accs)
            ),
            *(("2a", r, b, v) for r, b, v in product(rms, bals, (1, 2))),
            *(("2b", r, b, v, a) for r, b, v, a in product(rms, bals, (1, 2), accs)),
            ("commit",),
            ("abort",),
        ):
            self.bit[key] = 1 << len(self.bit)

    def initial(self) -> Iterator[Ballots]:
        """Everybody works, and no acceptor has heard of anything."""
        yield Ballots(
            ("working",) * self.managers, (((0, NONE, 0),) * self.acceptors,) * self.managers
        )

    def moves(self, state: Ballots) -> Iterator[tuple[str, Ballots]]:
        """Follow the actions of the specification."""
        yield from self._managers(state)
        for ins in range(self.managers):
            for ballot in range(1, self.ballots):
                yield f"1a {ins} {ballot}", self._send(state, "1a", ins, ballot)
                yield from self._lead(state, ins, ballot)
        yield from self._decide(state)
        yield from self._accept(state)

    def _send(self, state: Ballots, *message: object) -> Ballots:
        return state._replace(messages=state.messages | self.bit[message])

    def _sent(self, state: Ballots, *message: object) -> int:
        return state.messages & self.bit[message]

    def _managers(self, state: Ballots) -> Iterator[tuple[str, Ballots]]:
        for i, manager in enumerate(state.managers):
            for value, word in enumerate(VALUES):
                if manager == "working" and value:
                    after = state._replace(managers=_put(state.managers, i, word))
                    yield f"{word} {i}", self._send(after, "2a", i, 0, value)
            for word, said in (("committed", "commit"), ("aborted", "abort")):
                if self._sent(state, said):
                    yield f"{said} {i}", state._replace(managers=_put(state.managers, i, word))

    def _lead(self, state: Ballots, ins: int, ballot: int) -> Iterator[tuple[str, Ballots]]:
        if any(self._sent(state, "2a", ins, ballot, value) for value in (1, 2)):
            return
        heard = {
            acceptor: [
                (bal, value)
                for bal in range(NONE, self.ballots)
                for value in range(3)
                if self._sent(state, "1b", ins, ballot, bal, value, acceptor)
            ]
            for acceptor in range(self.acceptors)
        }
        for majority in self.majorities:
            if all(heard[acceptor] for acceptor in majority):
                top, value = max(said for acceptor in majority for said in heard[acceptor])
                chosen = 2 if top == NONE else value
                yield f"2a {ins} {ballot}", self._send(state, "2a", ins, ballot, chosen)

    def _decided(self, state: Ballots, ins: int, value: int) -> bool:
        return any(
            all(self._sent(state, "2b", ins, ballot, value, acceptor) for acceptor in majority)
            for ballot in range(self.ballots)
            for majority in self.majorities
        )

    def _decide(self, state: Ballots) -> Iterator[tuple[str, Ballots]]:
        every = range(self.managers)
        if all(self._decided(state, ins, 1) for ins in every):
            yield "decide commit", self._send(state, "commit")
        if any(self._decided(state, ins, 2) for ins in every):
            yield "decide abort", self._send(state, "abort")

    def _accept(self, state: Ballots) -> Iterator[tuple[str, Ballots]]:
        for ins, row in enumerate(state.acceptors):
            for acceptor, (mbal, bal, value) in enumerate(row):
                for ballot in range(self.ballots):
                    if mbal < ballot and self._sent(state, "1a", ins, ballot):
                        after = self._promise(state, ins, acceptor, (ballot, bal, value))
                        sent = self._send(after, "1b", ins, ballot, bal, value, acceptor)
                        yield f"1b {ins} {acceptor}", sent
                    for said in (1, 2):
                        if mbal <= ballot and self._sent(state, "2a", ins, ballot, said):
                            after = self._promise(state, ins, acceptor, (ballot, ballot, said))
                            sent = self._send(after, "2b", ins, ballot, said, acceptor)
                            yield f"2b {ins} {acceptor}", sent

    def _promise(
        self, state: Ballots, ins: int, acceptor: int, held: tuple[int, int, int]
    ) -> Ballots:
        row = _put(state.acceptors[ins], acceptor, held)
        return state._replace(acceptors=_put(state.acceptors, ins, row))

    @staticmethod
    def consistent(state: Ballots) -> bool:
        """Say that no manager has committed what another one has aborted."""
        return not {"committed", "aborted"} <= set(state.managers)


def _put(row: tuple[T, ...], at: int, value: T) -> tuple[T, ...]:
    return (*row[:at], value, *row[at + 1 :])
