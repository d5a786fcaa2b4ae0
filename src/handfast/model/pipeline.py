"""A checkpoint pipeline in a few lines: who writes what where, and what a restart would load.

A pipeline is made of *actors* (ranks, a coordinator), of what they act on (:class:`Place`,
:class:`Barrier`, :class:`Mail`), and of a restart. Each is a process of
:mod:`handfast.model.process`; the whole is their parallel composition, so nobody waits for anybody
but through a barrier, a message or a read. All is our own construction.

What is assumed, and it favours the pipelines where it isn't the whole truth:

- A crash takes the whole job, once. That one rank dies is contained in it: as nobody has clocks, a
  dead rank can't be told from one that is never scheduled again, until the restart.
- **killed**: processes die, what was written stays. **power**: what was not synced stays or not,
  each place by itself, in whole or in part; written in place it may be half there; a file that was
  renamed before its bytes were synced may be empty. The kernel may write back at any time before.
- fsync of a new file keeps its name too (as ext4 does, and POSIX does not promise). Disks do what
  fsync says. A put of an object store is durable and visible to all once it returns.
- Restarting reads and writes nothing: what is loaded is judged, and the model ends there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from inspect import currentframe
from traceback import walk_stack
from typing import Any, ClassVar, Final, NamedTuple, TypeAlias, overload

import msgspec

from handfast.model.process import STOP, Choice, Interrupted, Prefix, Process, choice, process

__all__ = [
    "KILLED",
    "NOTHING",
    "POWER",
    "STOP",
    "TORN",
    "Actor",
    "Barrier",
    "Claim",
    "Event",
    "Mail",
    "Pipeline",
    "Place",
    "Process",
    "Restart",
    "Server",
    "Steps",
    "choice",
    "process",
]

TORN: Final = -1
"""What a place holds that was begun and not finished: bytes that are of no epoch."""

NOTHING: Final = 0
"""What a place holds that was never written; a rank that loads it starts from scratch."""


class Event(NamedTuple):
    """Who does what to what, for which epoch. ``of`` is what a restart loads, rank by rank."""

    who: str
    does: str
    what: str = ""
    epoch: int = 0
    of: tuple[int, ...] = ()

    @overload
    def __rshift__(self, then: Event | Steps) -> Steps: ...
    @overload
    def __rshift__(self, then: Process) -> Process: ...
    def __rshift__(self, then: Event | Steps | Process) -> Steps | Process:
        """Put this before another event, steps (giving steps), or a process (giving one)."""
        return Steps((self,)) >> then

    def __str__(self) -> str:
        words = [self.who, self.does, self.what, f"(epoch {self.epoch})" if self.epoch > 0 else ""]
        if self.does == "loads":
            words[2:] = [", ".join(f"rank {r}: {_content(v)}" for r, v in enumerate(self.of))]
        elif self.does == "reads":
            words[3] = f"and finds {_content(self.epoch)}"
        return " ".join(word for word in words if word)


def _content(value: int) -> str:
    return {TORN: "a torn piece", NOTHING: "nothing"}.get(value, f"epoch {value}")


class Steps(tuple[Event, ...]):
    """Events one after the other; ``steps >> process`` goes on as the process."""

    __slots__ = ()

    @overload
    def __rshift__(self, then: Event | Steps) -> Steps: ...
    @overload
    def __rshift__(self, then: Process) -> Process: ...
    def __rshift__(self, then: Event | Steps | Process) -> Steps | Process:
        """Append an event or steps, giving steps, or a process, giving a process."""
        if isinstance(then, Process):
            for event in reversed(self):
                then = Prefix(event, then)
            return then
        return Steps((*self, then) if isinstance(then, Event) else (*self, *then))


KILLED: Final = Event("the job", "is killed")
POWER: Final = Event("the machines", "lose power")


class Held(NamedTuple):
    """What a place holds: to be seen now, and after a power cut; and what its draft holds.

    ``whole`` says that the bytes behind the name are durable, so that only the name is not.
    """

    seen: int = NOTHING
    kept: int = NOTHING
    whole: bool = True
    draft: int = NOTHING
    safe: bool = False


class Place(msgspec.Struct, frozen=True):
    """A file with a name (and a temporary one, its draft), or an object of a store.

    ``lasting`` is False for memory: it survives processes and not the machine. ``ranks`` are the
    numbers of those whose piece is in there: ``(0,)``, all of them for a model that is saved once
    for all, and none for a pointer, a mark or a log, which only name an epoch.
    """

    name: str
    lasting: bool = True
    ranks: tuple[int, ...] = ()
    start: ClassVar[Held] = Held()

    def __post_init__(self) -> None:
        """Raise TypeError for ranks that are no numbers from 0 on."""
        ranks: object = self.ranks
        if not (isinstance(ranks, tuple) and all(isinstance(r, int) and r >= 0 for r in ranks)):
            raise TypeError(
                f"{self.name}: give the ranks whose piece is in there as a tuple of numbers, "
                f"(0,) say, not {ranks!r}"
            )

    def after(self, event: Event, state: Held) -> Held | None:
        """Do as file systems and stores do; None refuses the event until it can be."""
        e = event.epoch
        match event.does:
            case "opens":
                return state._replace(seen=TORN, whole=False)
            case "writes":
                return state._replace(seen=e, whole=False)
            case "syncs":
                return state._replace(kept=state.seen, whole=True)
            case "drafts":
                return state._replace(draft=e, safe=False)
            case "syncs the draft of":
                return state._replace(safe=True)
            case "renames":
                known = state.draft == e
                return Held(seen=e, kept=state.kept, whole=state.safe) if known else None
            case "syncs the name of":
                return state._replace(kept=state.seen if state.whole else TORN)
            case "creates" if state.seen != NOTHING:
                return None
            case "puts" | "creates":
                return Held(seen=e, kept=e)
            case "deletes":
                return state._replace(seen=NOTHING, whole=True)
            case "reads":
                return state if state.seen == e else None
        raise ValueError(f"{self.name}: nothing can be done to a place by {event.does!r}")

    def lazily(self, state: Held) -> Iterator[tuple[str, Held]]:
        """The kernel writes back what is dirty: all of it, or a part."""
        if state.seen != state.kept:
            yield "writes back", state._replace(kept=state.seen)
            if not state.whole and TORN not in (state.seen, state.kept):
                yield "writes back a part of", state._replace(kept=TORN)

    def crashed(self, state: Held, power: bool) -> Held:
        """Keep what is durable, or all of it where only processes died; of memory, nothing."""
        if power and not self.lasting:
            return self.start
        left = state.kept if power else state.seen
        return Held(seen=left, kept=left)


class Barrier(msgspec.Struct, frozen=True):
    """Returns to each of its members, to each in its own time, once all have arrived.

    ``members`` are actors' names, in a tuple. It returns for an epoch once each member's last
    arrival was for that epoch or a later one, so one barrier does for all epochs, in their order.
    Not one event that all share: under crashes nothing of the kind can be had, and a return is
    the receipt of a message.
    """

    name: str
    members: tuple[str, ...]

    def __post_init__(self) -> None:
        """Raise TypeError for members that are no names."""
        members: object = self.members
        if not (isinstance(members, tuple) and all(isinstance(m, str) for m in members)):
            raise TypeError(f"{self.name}: give the members of a barrier as a tuple of their names")

    @property
    def start(self) -> tuple[int, ...]:
        """Nobody has come: the epoch of each member's last arrival is 0."""
        return (0,) * len(self.members)

    def after(self, event: Event, state: tuple[int, ...]) -> tuple[int, ...] | None:
        """Count who arrives; return to those for whose epoch all have arrived."""
        if event.does == "arrives at":
            if event.who not in self.members:
                raise ValueError(f"{event.who} arrives at {self.name}, and is no member of it")
            i = self.members.index(event.who)
            return (*state[:i], event.epoch, *state[i + 1 :])
        return state if min(state) >= event.epoch else None


class Mail(msgspec.Struct, frozen=True):
    """Messages of one kind from one actor to another: late, doubled, or never heard at all."""

    name: str
    start: ClassVar[int] = 0

    def after(self, event: Event, state: int) -> int | None:
        """Keep all that was ever sent, as a mask of epochs; it may be heard any number of times."""
        bit = 1 << event.epoch
        return state | bit if event.does == "sends" else state if state & bit else None


WORDS: Final = frozenset(
    {
        *("opens", "writes", "syncs", "drafts", "syncs the draft of", "renames"),
        *("syncs the name of", "puts", "creates", "deletes", "arrives at", "returns from"),
        *("sends", "hears", "reads", "loads", "refuses", "writes back", "writes back a part of"),
        *(KILLED.does, POWER.does),
    }
)
"""What is done to places, barriers and mails, by a restart, or by what strikes the whole job."""

Server: TypeAlias = Place | Barrier | Mail
"""What actors act on; it takes part in each event that names it, or refuses it."""


class Actor(msgspec.Struct, frozen=True):
    """One who acts. Each method gives events, to be put before what comes next with ``>>``."""

    name: str

    def does(self, what: str, epoch: int) -> Event:
        """Do something by oneself: time out, say. Not a word that means something already."""
        if what in WORDS:
            raise ValueError(
                f"{_line()}: {self.name} can't do by itself what is called {what!r}: that word "
                "means something already. What to do: say it in another word, or by the method "
                "that gives it"
            )
        return Event(self.name, what, "", epoch)

    def writes(self, place: Place, epoch: int) -> Steps:
        """Write in place: open (which truncates), then write."""
        return Steps(Event(self.name, word, place.name, epoch) for word in ("opens", "writes"))

    def syncs(self, place: Place, epoch: int) -> Event:
        """Sync a file that was written in place."""
        return Event(self.name, "syncs", place.name, epoch)

    def drafts(self, place: Place, epoch: int) -> Event:
        """Write the whole of a temporary file beside the place; nobody looks at it."""
        return Event(self.name, "drafts", place.name, epoch)

    def syncs_draft(self, place: Place, epoch: int) -> Event:
        """Sync the temporary file."""
        return Event(self.name, "syncs the draft of", place.name, epoch)

    def renames(self, place: Place, epoch: int) -> Event:
        """Rename the temporary file to the place's name."""
        return Event(self.name, "renames", place.name, epoch)

    def syncs_name(self, place: Place, epoch: int) -> Event:
        """Sync the directory in which the name stands."""
        return Event(self.name, "syncs the name of", place.name, epoch)

    def replaces(self, place: Place, epoch: int) -> Steps:
        """Draft, sync, rename, sync the directory: all that a file system asks for."""
        return Steps(
            (
                self.drafts(place, epoch),
                self.syncs_draft(place, epoch),
                self.renames(place, epoch),
                self.syncs_name(place, epoch),
            )
        )

    def puts(self, place: Place, epoch: int) -> Event:
        """Put an object: whole, and durable once it returns."""
        return Event(self.name, "puts", place.name, epoch)

    def creates(self, place: Place, epoch: int) -> Event:
        """Put an object only where none is yet."""
        return Event(self.name, "creates", place.name, epoch)

    def deletes(self, place: Place, epoch: int) -> Event:
        """Remove what a place holds."""
        return Event(self.name, "deletes", place.name, epoch)

    def arrives(self, barrier: Barrier, epoch: int) -> Event:
        """Arrive at a barrier, and not wait."""
        return Event(self.name, "arrives at", barrier.name, epoch)

    def returns(self, barrier: Barrier, epoch: int) -> Event:
        """Wait until a barrier returns where one has arrived: half of ``meets``, for a choice."""
        return Event(self.name, "returns from", barrier.name, epoch)

    def meets(self, barrier: Barrier, epoch: int) -> Steps:
        """Arrive at a barrier and wait until it returns."""
        return self.arrives(barrier, epoch) >> self.returns(barrier, epoch)

    def sends(self, mail: Mail, epoch: int) -> Event:
        """Send a message."""
        return Event(self.name, "sends", mail.name, epoch)

    def hears(self, mail: Mail, epoch: int) -> Event:
        """Wait for a message."""
        return Event(self.name, "hears", mail.name, epoch)


class Load(Prefix, frozen=True):
    """The end of a restart. ``where`` is the line that asked for it.

    It is no part of what the term is: who loads the same has come to the same state.
    """

    where: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Load) and self.event == other.event

    def __hash__(self) -> int:
        return hash(self.event)


def _line() -> str:
    """Where this module was called from: the file, and the line."""
    stack = walk_stack(currentframe())
    file, line = next((f.f_code.co_filename, n) for f, n in stack if f.f_globals is not globals())
    return f"{file}, line {line}"


class Restart(msgspec.Struct, frozen=True):
    """What looks at what is left, and loads. Its processes begin after the crash."""

    epochs: int
    name: ClassVar[str] = "the restart"

    def reads(self, place: Place, then: Callable[[int], Process]) -> Process:
        """Read a place and go on by what is there: TORN, NOTHING or an epoch."""
        return Choice(
            tuple(
                Prefix(Event(self.name, "reads", place.name, value), then(value))
                for value in range(TORN, self.epochs + 1)
            )
        )

    def reads_all(
        self, places: Sequence[Place], then: Callable[[tuple[int, ...]], Process]
    ) -> Process:
        """Read places one after the other."""
        if not places:
            return then(())
        return self.reads(
            places[0], lambda first: self.reads_all(places[1:], lambda rest: then((first, *rest)))
        )

    def loads(self, values: Iterable[int]) -> Process:
        """Rank r resumes from ``values[r]``: NOTHING, from scratch, or what a read has found.

        That is an epoch, or TORN bytes, in a place whose ``ranks`` have r; a pointer is no piece.
        """
        loaded = tuple(values)
        if strange := [v for v in loaded if v not in range(TORN, self.epochs + 1)]:
            raise ValueError(f"a restart loads {strange[0]!r}; epochs are 1 to {self.epochs}")
        return Load(Event(self.name, "loads", of=loaded), STOP, _line())

    def refuses(self) -> Process:
        """Nothing can be loaded, and that is said aloud; what was claimed is lost all the same."""
        return Prefix(Event(self.name, "refuses"), STOP)


class Claim(msgspec.Struct, frozen=True):
    """An instant at which an epoch is said to be saved: whenever somebody does that to that.

    ``who`` is how the names of those begin who may do it.
    """

    words: str
    does: str
    what: str = ""
    who: str = ""

    def matches(self, event: Event) -> bool:
        """Say whether an event is this instant."""
        named = self.what in ("", event.what) and event.who.startswith(self.who)
        return event.does == self.does and named


class Pipeline(msgspec.Struct, frozen=True, kw_only=True):
    """A pipeline. ``actors`` and ``restart`` are processes; a crash comes to them from outside.

    ``actors`` has under each actor's name what that one does, and nobody else; ``servers`` has all
    places, barriers and mails that an event names. A claim has to come for ``epochs``, the last
    epoch, or nothing was shown. ``assumes`` says what this model takes for granted beyond this
    module's own assumptions, and ``source`` whose words or sources it follows.
    """

    name: str
    about: str
    actors: dict[str, Process]
    servers: tuple[Server, ...]
    restart: Process
    claims: tuple[Claim, ...]
    epochs: int
    assumes: str = ""
    source: str = ""


def alive(body: Process) -> Process:
    """Let a crash end an actor, in either way."""
    return Interrupted(body, choice(Prefix(KILLED, STOP), Prefix(POWER, STOP)))


@process
def serve(server: Server, offers: tuple[Event, ...], state: Any) -> Process:
    """A server as a process: it offers what its state allows, and what happens by itself."""
    ways: list[tuple[Event, Any]] = [(event, server.after(event, state)) for event in offers]
    if isinstance(server, Place):
        ways += [(Event("the kernel", w, server.name), to) for w, to in server.lazily(state)]
        ways += [(crash, server.crashed(state, crash == POWER)) for crash in (KILLED, POWER)]
    else:  # whoever waited or was written to is gone
        ways += [(KILLED, server.start), (POWER, server.start)]
    return choice(
        *(Prefix(event, serve(server, offers, to)) for event, to in ways if to is not None)
    )
