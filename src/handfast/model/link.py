"""Two ends of a link over a network that forgets nothing: what F10 is searched over.

Whatever was said may be heard at any time, in any order, again and again, or never. Both ends crash
and come back as new incarnations; the operator upgrades and rolls back, over open links or by
taking an end down. Each moment of durability is a move of its own, so a crash falls on both sides.

**What is the real code**: every decision on epochs, from the choice of a handshake to each phase of
a change, is a call of ``rules``: the functions of ``handfast.link.switch``, or wrong ones. **What
is abstracted**: signatures hold (an offer is its content, a session is the pair of two offers);
nonces and ephemeral keys are left out, as if chance repeated itself, as that of a cloned memory
image does; there is no replay window, so a frame is taken any number of times; and what was not
taken may be given up at once. Each makes the receiver weaker than it is.

Data frames need no delivery: a law is held, in each state, of every frame that was ever sent and
either end, as if it came now. ``step`` numbers the operator's plan and is the ghost by which a
frame is judged: an epoch's number is only what the code goes by.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

import msgspec

from handfast.core.lattice import Epoch

__all__ = ["End", "Frame", "Link", "Rules", "State", "calm", "talking"]

SETTLED: Final = 1 << 30
"""Whatever was not taken is given up: see the module."""


class Rules(Protocol):
    """The decisions that are searched, as :mod:`handfast.link.switch` has them."""

    def Spoken(self, epoch: Epoch, digest: str) -> Any:  # noqa: N802 - a class where it is real
        """Name a bundle by an epoch."""

    def choose(self, mine: tuple[Any, ...], theirs: tuple[Any, ...]) -> Any:
        """Choose a session's epoch; an error where there is none in common."""

    def begin(self, spoken: Any) -> Any:
        """Open a session."""

    def ask(self, switch: Any, to: Any) -> Any:
        """Ask for a change; an error where it is not allowed."""

    def accepted(self, switch: Any) -> Any:
        """Go on once ACCEPT_BOTH is durable."""

    def hear(self, switch: Any, word: Any) -> Any:
        """Hear a word."""

    def takes(self, switch: Any, epoch: Epoch) -> bool:
        """Say whether a frame of this epoch is taken."""

    def may_turn(self, switch: Any) -> bool:
        """Say whether the new epoch may be sent."""

    def turn(self, switch: Any, last: int) -> Any:
        """Send the new epoch."""

    def may_close(self, switch: Any, settled: int) -> bool:
        """Say whether the old epoch may go."""

    def closed(self, switch: Any) -> Any:
        """Go on once the promise to take nothing older is durable."""

    def says(self, switch: Any) -> Any:
        """Put all that there is to say into a word."""


Offer: TypeAlias = tuple[int, tuple[int, ...]]
"""The incarnation's number and the steps of the plan that this end speaks."""

Sid: TypeAlias = tuple[Offer, Offer]
"""A session: the offers of end 0 and of end 1."""


class Frame(NamedTuple):
    """A data frame: what it says of itself, and the ghosts: which step, sent in which lives."""

    sender: int
    session: Sid | None
    epoch: Epoch
    step: int
    lives: tuple[int, int]


class End(NamedTuple):
    """One end. ``disk`` has the steps that it durably takes; ``life`` counts truly.

    ``number`` is the incarnation that it says, ``known`` the peer's newest that it durably bound
    to. Volatile: the session and the lives that it has in mind, and once that is open its step and
    the switch's own state.
    """

    life: int
    number: int
    disk: tuple[int, ...]
    offer: Offer
    known: int = 0
    session: Sid | None = None
    lives: tuple[int, int] = (0, 0)
    step: int = -1
    switch: Any = None


class State(NamedTuple):
    """Both ends, and all that was ever said. Offers and proofs come with the sender's true life."""

    ends: tuple[End, End]
    offers: frozenset[tuple[int, Offer, int]]
    proofs: frozenset[tuple[int, Sid, int]]
    words: frozenset[tuple[int, Sid | None, Any]]
    frames: frozenset[Frame]


class Link:
    """The system that is searched: a plan of (number, digest), of which ends go up step by step.

    ``lives`` bounds the incarnations of each end; ``alone`` lets an end come back with the next
    step only, as parts do that speak one epoch at a time.
    """

    def __init__(
        self,
        rules: Rules,
        plan: Sequence[tuple[int, str]],
        *,
        lives: tuple[int, int] = (2, 1),
        alone: bool = False,
        refused: type[Exception] | tuple[type[Exception], ...] = Exception,
    ) -> None:
        self.rules = rules
        self.plan = tuple(rules.Spoken(Epoch(1, number), digest) for number, digest in plan)
        self.lives = lives
        self.alone = alone
        self.refused = refused

    # -- what a wrong link would do otherwise --------------------------------------------------

    def number(self, end: End) -> int:
        """Give a new life its incarnation: the counter that was durable before it was used."""
        return end.number + 1

    def reads(self, end: End, frame: Frame) -> int | None:
        """Say under which step an end would read a frame; None where it refuses it."""
        if end.switch is None or frame.session != end.session:
            return None
        if not self.rules.takes(end.switch, frame.epoch):
            return None
        now = self.plan[end.step].epoch == frame.epoch
        return end.step if now else end.step + 1

    # -- the laws ------------------------------------------------------------------------------

    def f10(self, state: State) -> bool:
        """F10: a frame is read only under the epoch that it was sent under."""
        return all(
            self.reads(state.ends[1 - frame.sender], frame) in (None, frame.step)
            for frame in state.frames
        )

    def own(self, state: State) -> bool:
        """A frame is read only between the two lives between which it was sent."""
        for frame in state.frames:
            end = state.ends[1 - frame.sender]
            if self.reads(end, frame) is not None and end.lives != frame.lives:
                return False
        return True

    def agreed(self, state: State) -> bool:
        """Two ends of one session have the same lives in mind, and can be one change apart."""
        one, other = state.ends
        if one.switch is None or one.session != other.session or other.switch is None:
            return True
        near = abs(one.step - other.step) <= 1
        return one.lives == other.lives and near

    def promised(self, state: State) -> bool:
        """What an end sends, the other end of the session has durably promised to take."""
        for who, end in enumerate(state.ends):
            peer = state.ends[1 - who]
            alive = end.switch is not None and end.lives[1 - who] == peer.life
            if alive and peer.session == end.session and self._sends(end) not in peer.disk:
                return False
        return True

    # -- what can happen -----------------------------------------------------------------------

    def initial(self) -> Iterator[State]:
        """Both ends up, at the plan's first step, in their first life."""
        offer: Offer = (1, (0,))
        end = End(1, 1, (0,), offer)
        offers = frozenset({(0, offer, 1), (1, offer, 1)})
        yield State((end, end), offers, frozenset(), frozenset(), frozenset())

    def moves(self, state: State) -> Iterator[tuple[str, State]]:
        """Give what either end can do, what it can hear, and its crashes."""
        for who in (0, 1):
            yield from self._shakes(state, who)
            if state.ends[who].switch is not None:
                yield from self._changes(state, who)
                yield from self._hears(state, who)
                yield from self._speaks(state, who)
            yield from self._crashes(state, who)

    def _shakes(self, state: State, who: int) -> Iterator[tuple[str, State]]:
        """Answer an offer by a proof, open by the peer's, and end by a later life's offer."""
        end = state.ends[who]
        for sender, offer, life in sorted(state.offers):
            if sender == who or offer[0] < end.known:
                continue
            if end.switch is not None:
                if offer[0] > end.known:
                    yield from self._ends(state, who)
                continue
            sid = (end.offer, offer) if who == 0 else (offer, end.offer)
            try:
                chosen = self._choose(end.offer[1], offer[1])
            except self.refused:
                continue
            lives = (end.life, life) if who == 0 else (life, end.life)
            bound = end._replace(session=sid, lives=lives, known=offer[0])
            after = _with(state, who, bound)
            after = after._replace(proofs=state.proofs | {(who, sid, end.life)})
            if after != state:
                yield f"{who} proves", after
            if (1 - who, sid, life) in state.proofs:
                opened = bound._replace(step=chosen, switch=self.rules.begin(self.plan[chosen]))
                yield f"{who} opens", self._said(after, who, opened)

    def _ends(self, state: State, who: int) -> Iterator[tuple[str, State]]:
        """End a session with a past life of the peer; offer anew what the disk says by now."""
        end = state.ends[who]
        fresh = End(end.life, end.number, end.disk, (end.number, end.disk), end.known)
        offers = state.offers | {(who, fresh.offer, end.life)}
        yield f"{who} ends", _with(state, who, fresh)._replace(offers=offers)

    def _choose(self, mine: tuple[int, ...], theirs: tuple[int, ...]) -> int:
        """Choose as the code does, and find which of this end's own steps that is."""
        spoken = [self.plan[step] for step in mine]
        chosen = self.rules.choose(tuple(spoken), tuple(self.plan[step] for step in theirs))
        return mine[spoken.index(chosen)]

    def _changes(self, state: State, who: int) -> Iterator[tuple[str, State]]:
        """Ask, make durable, turn, close: what an end does by itself."""
        end, rules = state.ends[who], self.rules
        if (asked := self._asks(end)) is not None:
            yield f"{who} asks", self._said(state, who, end._replace(switch=asked))
        if end.switch.next is not None and not end.switch.durable:
            both = end._replace(switch=rules.accepted(end.switch), disk=(end.step, end.step + 1))
            yield f"{who} persists both", self._said(state, who, both)
        if rules.may_turn(end.switch):
            yield (
                f"{who} turns",
                self._said(state, who, end._replace(switch=rules.turn(end.switch, 0))),
            )
        if rules.may_close(end.switch, SETTLED):
            new = end._replace(
                switch=rules.closed(end.switch), disk=(end.step + 1,), step=end.step + 1
            )
            yield f"{who} persists new", self._said(state, who, new)

    def _asks(self, end: End) -> Any:
        if end.step + 1 == len(self.plan):
            return None
        try:
            return self.rules.ask(end.switch, self.plan[end.step + 1])
        except self.refused:
            return None

    def _hears(self, state: State, who: int) -> Iterator[tuple[str, State]]:
        end = state.ends[who]
        mine = [w for sender, sid, w in state.words if sender != who and sid == end.session]
        for word in sorted(mine, key=repr):  # a set's order is not the same twice
            switch = self.rules.hear(end.switch, word)
            if switch != end.switch:
                heard = f"{who} hears {word.number}"
                yield heard, self._said(state, who, end._replace(switch=switch))

    def _speaks(self, state: State, who: int) -> Iterator[tuple[str, State]]:
        end = state.ends[who]
        frame = Frame(who, end.session, end.switch.sending, self._sends(end), end.lives)
        if frame not in state.frames:
            yield f"{who} sends", state._replace(frames=state.frames | {frame})

    def _crashes(self, state: State, who: int) -> Iterator[tuple[str, State]]:
        """Come back as a new incarnation, which speaks what its disk says; or the next step."""
        end = state.ends[who]
        if end.life < self.lives[who]:
            number = self.number(end)
            disks = [end.disk]
            if self.alone and end.disk[-1] + 1 < len(self.plan):
                disks.append((end.disk[-1] + 1,))
            for disk in disks:
                offer = (number, disk)
                born = End(end.life + 1, number, disk, offer, end.known)
                offers = state.offers | {(who, offer, born.life)}
                yield f"{who} crashes", _with(state, who, born)._replace(offers=offers)

    def _sends(self, end: End) -> int:
        """Find which step an end sends under."""
        turned = end.switch.next is not None and end.switch.sending == end.switch.next.epoch
        return end.step + 1 if turned else end.step

    def _said(self, state: State, who: int, end: End) -> State:
        """Let an end do something, and say all that there is to say then.

        Which words of the peer it holds is left out: only resending depends on it.
        """
        after = _with(state, who, end)
        word = msgspec.structs.replace(self.rules.says(end.switch), heard=0)
        return after._replace(words=state.words | {(who, end.session, word)})


def calm(label: str) -> bool:
    """Say whether a move needs no fault."""
    return "crashes" not in label


def talking(state: State) -> bool:
    """Say whether both ends are open in one session and speak one epoch."""
    one, other = state.ends
    both = one.switch is not None and other.switch is not None
    return both and one.session == other.session and one.step == other.step


def _with(state: State, who: int, end: End) -> State:
    ends = (end, state.ends[1]) if who == 0 else (state.ends[0], end)
    return state._replace(ends=ends)
