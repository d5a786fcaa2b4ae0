"""One end of a link, without I/O: its handshake, its session's frames, its changes of epoch.

Feed it what arrives and what has become durable; do what it returns, in order. A transport adds
bytes on a wire and a timer that calls :meth:`End.again`; nothing here knows which it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final, Protocol, TypeAlias

import msgspec

from handfast.core.lattice import GENESIS, Epoch
from handfast.errors import UNREADABLE, Refused
from handfast.link import switch as sw
from handfast.link.frame import (
    MAX_TALK,
    NO_KEY,
    Header,
    Kind,
    LinkError,
    Reason,
    seal,
    unseal,
    whole,
)
from handfast.link.session import Persist, Record, Send, Session, Taking
from handfast.link.switch import Spoken, Word
from handfast.link.window import Window

__all__ = ["USUAL", "Codec", "Effect", "End", "Opened", "Taken", "read_word"]

USUAL: Final = 1 << 20
"""The most bytes of data in a frame, unless it is said otherwise."""


class Codec(Protocol):
    """How one epoch writes and reads its values. ValueError for bytes that it can't read."""

    def encode(self, value: Any) -> bytes:
        """Give a value's bytes."""

    def decode(self, body: bytes) -> Any:
        """Give the value that bytes are of."""


class Opened(msgspec.Struct, frozen=True):
    """The handshake is done: data may be sent."""

    session: bytes
    spoken: Spoken


class Taken(msgspec.Struct, frozen=True):
    """A value that was read by the codec of ``epoch``, the one that it was sent under."""

    epoch: Epoch
    value: Any


Effect: TypeAlias = Persist | Send | Opened | Taken


class End:
    """One end of a link. ``codecs`` has one for each epoch that this end may speak.

    ``most`` bounds the body of a data frame that is taken or sent, in bytes. ``single`` says that
    the parts behind this link speak one epoch at a time: then it is never changed while it is open.
    ``order`` says that the transport keeps the order of frames and loses none: then a gap is an
    error. ``refused`` counts the frames that were not taken, by reason.
    """

    def __init__(
        self,
        session: Session,
        codecs: Mapping[Epoch, Codec],
        *,
        most: int = USUAL,
        single: bool = False,
        order: bool = False,
    ) -> None:
        self.session = session
        self.codecs = codecs
        self.single = single
        self.switch: sw.Switch | None = None
        """The state of the change of epoch; None before the handshake is done."""
        self.refused: Counter[Reason] = Counter()
        self.window = Window(order=order)
        """Which of the peer's sequence numbers are settled."""
        self.most = most
        """The most bytes of data in a frame that is taken or sent."""
        self._sent = 0
        self._waiting: Taking | None = None
        self._missing(session.offer.spoken)

    @property
    def bound(self) -> int:
        """The most bytes of a body that is read now: few of a peer that has proved nothing yet."""
        return MAX_TALK if self.switch is None else self.most

    @property
    def sending(self) -> Epoch:
        """Under which epoch this end speaks; RuntimeError before the handshake is done."""
        return self._open().sending

    def begin(self) -> list[Effect]:
        """Begin the handshake."""
        return [*self.session.begin()]

    def receive(self, data: bytes) -> list[Effect]:
        """Take one whole frame. Raises LinkError, and has counted it, where it is not taken.

        A frame that is refused changes nothing here, but that it has come. After Reason.ANEW the
        end is of no more use.
        """
        try:
            header = whole(data, self.most)
            if header.kind < Kind.WORD:
                body = unseal(NO_KEY, header, data)
                return self._opened([*self.session.receive(header.kind, body)])
            return self._inside(header, data)
        except LinkError as error:
            self.refused[error.reason] += 1
            raise

    def persisted(self, record: Record) -> list[Effect]:
        """Go on once a record is durable. Raises LinkError as :meth:`Session.persisted` does."""
        if not isinstance(record, Taking):
            try:
                return self._opened([*self.session.persisted(record)])
            except LinkError as error:
                self.refused[error.reason] += 1
                raise
        if record != self._waiting:
            return []
        self._waiting = None
        open_ = self._open()
        self.switch = sw.accepted(open_) if len(record.spoken) == 2 else sw.closed(open_)
        return [self._word(), *self._advance()]

    def beat(self) -> list[Effect]:
        """Say once more how this end stands: that it is here."""
        return [self._word()]

    def send(self, value: Any) -> list[Effect]:
        """Send a value under the epoch that is spoken now. It may be lost on the way.

        Raises ValueError where its bytes are above the bound.
        """
        epoch = self._open().sending
        body = self.codecs[epoch].encode(value)
        if len(body) > self.most:
            raise ValueError(f"{len(body)} bytes of data; this link's bound is {self.most}")
        return [self._frame(Kind.DATA, body, epoch)]

    def change(self, to: Spoken) -> list[Effect]:
        """Ask for a change of epoch; it goes on by itself once the peer asks for the same.

        Raises Refused for a number that was used, a change that is not over, or a single stack;
        ValueError where there is no codec for it.
        """
        if self.single:
            raise Refused(
                "this end speaks one epoch at a time",
                verdict=None,
                remedy=f"take the link down, and shake hands anew with epoch {to.epoch} alone",
            )
        self._missing((to,))
        asked = self.switch = sw.ask(self._open(), to)
        return self._persist(asked.now, to)

    def again(self) -> list[Effect]:
        """Repeat whatever the peer has not shown to have heard. Nothing, where it has all."""
        if self.switch is None:
            return [*self.session.again()]
        if not sw.unheard(self.switch):
            return []
        shaking = self.session.again() if self.switch.peer is None else []
        return [*shaking, self._word()]

    @property
    def draining(self) -> bool:
        """Whether the peer has named its last old frame, and not all up to it is settled."""
        state = self.switch
        if state is None or state.next is None or state.peer is None:
            return False
        named = state.peer.sending == state.next.epoch
        return named and state.peer.last >= self.window.floor

    def give_up(self) -> list[Effect]:
        """Wait no more for old data that is lost, so that a change can go on."""
        if self.draining and self.switch is not None and self.switch.peer is not None:
            self.window.give_up(self.switch.peer.last)
        return self._advance() if self.switch is not None else []

    # -- frames of the session -----------------------------------------------------------------

    def _inside(self, header: Header, data: bytes) -> list[Effect]:
        if self.switch is None or header.session != self.session.bound.session:
            raise LinkError(Reason.SESSION, "a frame of another session, or before there is one")
        body = unseal(self.session.keys[1], header, data)
        self.window.check(header.sequence)
        if header.kind is Kind.WORD:
            word = read_word(body)
            state = sw.hear(self.switch, word)
            self.window.take(header.sequence)
            return self._hear(state, word)
        self.window.take(header.sequence)  # it has come, whatever becomes of it
        if not sw.takes(self.switch, header.epoch):
            now = self.switch.now.epoch
            raise LinkError(Reason.EPOCH, f"sent under {header.epoch}, this end takes {now}")
        try:
            value = self.codecs[header.epoch].decode(body)
        except (ValueError, *UNREADABLE) as error:
            raise LinkError(Reason.CODEC, f"epoch {header.epoch}: {error}") from error
        return [Taken(header.epoch, value), *self._advance()]

    def _hear(self, state: sw.Switch, word: Word) -> list[Effect]:
        self.switch = state
        effects = self._advance()
        said = any(isinstance(effect, Send) for effect in effects)
        return [self._word(), *effects] if word.asks and not said else effects

    def _advance(self) -> list[Effect]:
        """Do what follows from what is known by now."""
        effects: list[Effect] = []
        state = self._open()
        if sw.may_turn(state):
            self.switch = state = sw.turn(state, self._sent - 1)
            effects.append(self._word())
        if state.next is not None and sw.may_close(state, self.window.floor):
            effects += self._persist(state.next)
        return effects

    def _opened(self, effects: list[Effect]) -> list[Effect]:
        if self.switch is None and self.session.open:
            bound = self.session.bound
            self.switch = sw.begin(bound.spoken)
            effects += [Opened(bound.session, bound.spoken), self._word()]
        return effects

    def _persist(self, *spoken: Spoken) -> list[Effect]:
        record = Taking(self.session.bound.session, spoken)
        if record == self._waiting:
            return []
        self._waiting = record
        return [Persist(record)]

    def _word(self) -> Send:
        return self._frame(Kind.WORD, msgspec.msgpack.encode(sw.says(self._open())), GENESIS)

    def _frame(self, kind: Kind, body: bytes, epoch: Epoch) -> Send:
        bound, key = self.session.bound, self.session.keys[0]
        frame = seal(key, kind, body, session=bound.session, epoch=epoch, sequence=self._sent)
        self._sent += 1
        return Send(frame)

    def _missing(self, spoken: tuple[Spoken, ...]) -> None:
        lacking = [f"{each.epoch}" for each in spoken if each.epoch not in self.codecs]
        if lacking:
            raise ValueError(f"no codec for epoch {', '.join(lacking)}")

    def _open(self) -> sw.Switch:
        if self.switch is None:
            raise RuntimeError("the handshake is not done: wait for Opened")
        return self.switch


def read_word(body: bytes) -> Word:
    """Read what a peer says of its end. Raises LinkError."""
    try:
        return msgspec.msgpack.decode(body, type=Word)
    except UNREADABLE as error:
        raise LinkError(Reason.MALFORMED, f"a word that can't be read: {error}") from None
