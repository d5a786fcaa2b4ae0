"""The boundary adversary: the shortest schedule that tears what a claimed instant promised.

A *claim* says that an epoch is saved once a certain instant has come: a barrier returns, a rename
happens, a clock strikes. It promises that **from that instant on every domain holds the epoch
durably, and a restart loads it**: after a crash at that instant or at any later one, all ranks
resume one and the same epoch, whole, and not an older one than was claimed. What breaks it is

- **torn**: some rank is given bytes that are of no epoch;
- **mixed**: ranks are given different epochs (or one an epoch and another nothing), in silence;
- **lost**: all are given one epoch older than was claimed, or nothing, or a loud refusal.

The search is over all schedules of the model, so where it finds nothing there is nothing within
its bounds (ranks, epochs, one crash). The claim that needs no search to be torn is the one that is
bound to no event, "at 12:00": it is the paper's theorem in its plainest form, and it falls for
every pipeline, the sound ones included.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Final, Literal, TypeAlias

import msgspec

from handfast.model.explore import Report, Trace, explore
from handfast.model.network import Automaton, Network, State, automaton
from handfast.model.pipeline import (
    KILLED,
    NOTHING,
    POWER,
    STOP,
    TORN,
    Barrier,
    Claim,
    Event,
    Load,
    Mail,
    Pipeline,
    Place,
    Restart,
    alive,
    choice,
    process,
    serve,
)
from handfast.model.process import Choice, Named, Prefix, Process, transitions

__all__ = [
    "FAULTS",
    "NOON",
    "Finding",
    "Kind",
    "Tear",
    "attack",
    "broken",
    "compose",
    "instants",
    "judged",
    "unread",
    "waits",
]

Fault = Literal["killed", "power"]
Kind = Literal["torn", "mixed", "lost"]
FAULTS: Final[dict[Fault, Event]] = {"killed": KILLED, "power": POWER}
KINDS: Final[tuple[Kind, ...]] = ("torn", "mixed", "lost")
ENDS: Final = ("loads", "refuses")
NOON: Final = Claim("at 12:00", "strikes 12:00")
WATCH: Final = "the claim"
CLOCK: Final = "the clock"

Found: TypeAlias = frozenset[tuple[int, int]]
"""Of which rank the piece of which epoch was read."""


class Tear(msgspec.Struct, frozen=True):
    """A shortest schedule that ends in a breach of the claim; ``events`` end with what is loaded.

    ``moves`` counts those before the crash: what the schedule needs of the pipeline.
    """

    fault: Fault
    kind: Kind
    claimed: int
    events: tuple[Event, ...]

    @property
    def moves(self) -> int:
        """How many events came before the crash."""
        return next(i for i, event in enumerate(self.events) if event in FAULTS.values())


class Finding(msgspec.Struct, frozen=True):
    """What became of one claim of a pipeline.

    ``tears`` has at most one for each fault and kind, the shortest. ``reached`` says whether the
    claim's instant comes for the last epoch at all: without it nothing was shown.
    """

    pipeline: str
    claim: str
    tears: tuple[Tear, ...]
    reached: bool
    states: int
    transitions: int
    seconds: float

    def tear(self, fault: Fault | None = None) -> Tear | None:
        """Give the shortest, of one fault or of any."""
        found = [tear for tear in self.tears if fault in (None, tear.fault)]
        return min(found, key=lambda tear: len(tear.events), default=None)

    @property
    def sound(self) -> bool:
        """Say whether nothing within the bounds breaks the claim, which does come true."""
        return self.reached and not self.tears


def judged(claimed: int, loaded: tuple[int, ...]) -> Kind | None:
    """Judge what the ranks load, after an epoch was claimed (0: none was, and all is well)."""
    if claimed == 0:
        return None
    if not loaded:
        return "lost"
    if TORN in loaded:
        return "torn"
    if any(value != loaded[0] for value in loaded):
        return "mixed"
    return "lost" if loaded[0] < claimed else None


def breach(fault: Fault, kind: Kind, claimed: int) -> Process:
    """Where the watcher stands once a claim is broken."""
    return Prefix(Event(WATCH, _says(fault, kind), "", claimed), STOP)


@process
def watch(claimed: int, instants: tuple[Event, ...], ends: tuple[Event, ...]) -> Process:
    """Follow the claim's instants, then the crash, then judge what the restart loads."""
    later = [Prefix(e, watch(max(claimed, e.epoch), instants, ends)) for e in instants]
    crash = [Prefix(FAULTS[fault], judge(claimed, fault, ends)) for fault in FAULTS]
    return choice(*later, *crash)


@process
def judge(claimed: int, fault: Fault, ends: tuple[Event, ...]) -> Process:
    """Stand still where all is well, and in :func:`breach` where it is not."""
    return choice(
        *(
            Prefix(end, breach(fault, kind, claimed) if kind else STOP)
            for end in ends
            for kind in [judged(claimed, end.of)]
        )
    )


@process
def strikes(epoch: int, last: int) -> Process:
    """A clock that is bound to nothing: it strikes for each epoch in turn, whenever it likes."""
    if epoch > last:
        return STOP
    return Prefix(Event(CLOCK, NOON.does, "", epoch), strikes(epoch + 1, last))


def compose(pipeline: Pipeline, claim: Claim) -> Network:
    """Put a pipeline, its restart, and a watcher of one claim in parallel.

    Raises ValueError where names are used twice, a claim names an instant that no actor has,
    actors do things to what is no server of the pipeline, or its restart may load what it has not
    found, or end without having loaded anything or refused to: nothing could be judged by that.
    """
    _check(pipeline)
    actors = dict(pipeline.actors)
    if claim is NOON:
        actors[CLOCK] = strikes(1, pipeline.epochs)
    parts = {name: alive(body) for name, body in actors.items()}
    acts = _events(parts)
    restart = choice(*(Prefix(fault, pipeline.restart) for fault in FAULTS.values()))
    parts[Restart.name] = restart
    looks = _events({Restart.name: pipeline.restart})
    events = (*acts, *looks)
    names = [server.name for server in pipeline.servers]
    names += [*pipeline.actors, CLOCK, Restart.name, WATCH]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{pipeline.name}: names used twice: {', '.join(sorted(twice))}")
    if strange := {e.what for e in events} - {"", *(server.name for server in pipeline.servers)}:
        raise ValueError(f"{pipeline.name}: in no server: {', '.join(sorted(strange))}")
    _check_loads(pipeline)
    instants = tuple(event for event in acts if claim.matches(event))
    if not instants:
        raise ValueError(f"{pipeline.name}: no actor ever {claim.does} {claim.what}".rstrip())
    refused: dict[str, frozenset[Hashable]] = {}
    for server in pipeline.servers:
        offers = tuple(event for event in events if event.what == server.name)
        parts[server.name] = serve(server, offers, server.start)
        refused[server.name] = frozenset(offers)
    ends = tuple(event for event in looks if event.does in ENDS)
    parts[WATCH] = watch(0, instants, ends)
    refused[WATCH] = frozenset(instants)
    return Network(parts, refused)


def _check(pipeline: Pipeline) -> None:
    """Raise ValueError for what users write that is no pipeline, whatever its types say."""
    _check_tuples(pipeline)
    name = pipeline.name
    actors: object = pipeline.actors
    epochs: object = pipeline.epochs
    if not (isinstance(actors, dict) and actors and isinstance(epochs, int) and epochs > 0):
        raise ValueError(f"{name}: it needs actors, by name, and at least one epoch")
    terms: dict[str, object] = {**actors, "restart": pipeline.restart}
    for who, term in terms.items():
        if not isinstance(term, Process):
            raise ValueError(
                f"{name}: {who} is to be a process, STOP or a call of a function under @process, "
                f"not {term!r:.60}"
            )
    _check_names(pipeline)
    _check_restart(pipeline)


def _check_names(pipeline: Pipeline) -> None:
    """Raise ValueError where a process acts by another's name or in an epoch beyond the last, or a
    barrier awaits nobody.
    """
    for name, term in pipeline.actors.items():
        acts, known = _events({name: term}), range(1, pipeline.epochs + 1)
        if beyond := [e for e in acts if e.epoch not in known]:
            raise ValueError(
                f"{pipeline.name}: {name} {beyond[0].does} {beyond[0].what}".rstrip()
                + f" for epoch {beyond[0].epoch}; epochs are 1 to {pipeline.epochs}. What to do: "
                "let the processes end with the last epoch, or give `epochs` and Restart(...) more"
            )
        if others := [e for e in acts if e.who != name]:
            raise ValueError(
                f"{pipeline.name}: `{others[0]}` is done by actors[{name!r}]. What to do: give "
                "each actor's process under that actor's own name"
            )
    for server in pipeline.servers:
        members = server.members if isinstance(server, Barrier) else ()
        if absent := [member for member in members if member not in pipeline.actors]:
            raise ValueError(
                f"{pipeline.name}: {server.name} waits for {absent[0]}, who is none of the actors"
            )


def _check_tuples(pipeline: Pipeline) -> None:
    name, fields = pipeline.name, {"claims": Claim, "servers": Place | Barrier | Mail}
    for field, kind in fields.items():
        value: object = getattr(pipeline, field)
        if not (isinstance(value, tuple) and value and all(isinstance(v, kind) for v in value)):
            raise ValueError(f"{name}: {field} is to be a tuple of one or more, not {value!r}")


def _check_restart(pipeline: Pipeline) -> None:
    """Raise ValueError for a restart that may come to nothing, or to other ranks each time; or
    that does what actors do, who are dead by then: it would wait for them, and come to nothing.
    """
    name, known = pipeline.name, set(range(TORN, pipeline.epochs + 1))
    if others := [e for e in _events({name: pipeline.restart}) if e.who != Restart.name]:
        raise ValueError(
            f"{name}: the restart has `{others[0]}` in it. What to do: let it read places, and end "
            "with loads(...) or refuses(); nothing else is done there"
        )
    edges = automaton(pipeline.restart).edges
    counts: set[int] = set()
    for row in edges or ((),):
        events = [(event, target) for event, target in row if isinstance(event, Event)]
        counts |= {len(event.of) for event, _ in events if event.does == "loads"}
        for event, target in events:
            if event.does not in ENDS and not edges[target]:
                raise ValueError(f"{name}: after `{event}` it neither loads nor refuses")
        for place in {event.what for event, _ in events if event.does == "reads"}:
            found = {e.epoch for e, _ in events if (e.does, e.what) == ("reads", place)}
            if not known <= found:
                raise ValueError(
                    f"{name}: the restart goes on from epochs 1 to {max(found)} in {place}, and "
                    f"`epochs` is {pipeline.epochs}. What to do: give Restart(...) and `epochs` "
                    "the same number, and let it go on from all that it may find"
                )
    if not counts:
        raise ValueError(
            f"{name}: the restart loads nothing on any way, so every claim would be lost. What to "
            "do: let some way end in loads(...); NOTHING is to start from scratch"
        )
    if len(counts) != 1 or 0 in counts:
        raise ValueError(
            f"{name}: the restart is to load a piece for each rank, always as many, "
            f"not {sorted(counts)}"
        )


def _check_loads(pipeline: Pipeline) -> None:
    """Raise ValueError for a load of what was not read: the claim would hold whatever is there."""
    places = [server for server in pipeline.servers if isinstance(server, Place)]
    ranks = {place.name: place.ranks for place in places}

    def look(term: Process, read: Found, when: str) -> None:
        for way, load, _ in _ways(term):
            if not (isinstance(load, Event) and load.does == "loads"):
                continue
            if wrong := _unfounded(load, read, places):
                where = f"{way.where}: " if isinstance(way, Load) else ""
                raise ValueError(f"{pipeline.name}: {where}`{load}` comes {when}, {wrong}")

    look(pipeline.restart, Found(), "at once")
    found = {pipeline.restart: Found()}  # on every way to a term
    ahead = [pipeline.restart]
    for term in ahead:  # which grows meanwhile: a term comes again where a way to it found less
        for _, event, after in _ways(term):
            here = found[term]
            if isinstance(event, Event) and event.does == "reads":
                here |= {(rank, event.epoch) for rank in ranks.get(event.what, ())}
            look(after, here, f"after `{event}`")
            every = here & found.get(after, here)
            if every != found.get(after):
                found[after] = every
                ahead.append(after)


def _unfounded(load: Event, found: Found, places: list[Place]) -> str:
    """Say what is wrong with a load, if anything: of each rank a piece of it was to be read.

    From scratch nothing need be found.
    """
    for rank, value in enumerate(load.of):
        if value == NOTHING or (rank, value) in found:
            continue
        if own := [place.name for place in places if rank in place.ranks]:
            return (
                f"and no read before it has found that for rank {rank}, whose piece is in "
                f"{', '.join(own)}. What to do: load only what was read there on the way, or "
                "NOTHING; a pointer is no piece"
            )
        return (
            f"and no place is said to hold the piece of rank {rank}. What to do: say it of each "
            f"that does, Place(..., ranks=({rank},)), and not of a pointer, a mark or a log"
        )
    return ""


def _ways(term: Process) -> Iterator[tuple[Process, Hashable, Process]]:
    """Give what a term can do, each with the very term that does it.

    :func:`transitions` won't do: it keeps one of equal terms, and so one of their lines.
    """
    if isinstance(term, Named):
        yield from _ways(term.body(*term.arguments))
    elif isinstance(term, Choice):
        for option in term.options:
            yield from _ways(option)
    else:
        for event, after in transitions(term):
            yield term, event, after


def unread(pipeline: Pipeline) -> tuple[str, ...]:
    """Give the places that the restart never reads, whatever it finds: they can't save anything."""
    rows = automaton(pipeline.restart).edges
    read = {e.what for row in rows for e, _ in row if isinstance(e, Event) and e.does == "reads"}
    return tuple(s.name for s in pipeline.servers if isinstance(s, Place) and s.name not in read)


def _events(parts: dict[str, Process]) -> tuple[Event, ...]:
    """All that actors and the restart can ever do, each once, but for crashes."""
    found: dict[Event, None] = {}
    for term in parts.values():
        for row in automaton(term).edges:
            found |= {e: None for e, _ in row if isinstance(e, Event) and e not in FAULTS.values()}
    return tuple(found)


def broken(network: Network) -> dict[tuple[Fault, Kind], frozenset[int]]:
    """Give the watcher's states in which the claim is broken, by fault and kind."""
    found: dict[tuple[Fault, Kind], set[int]] = {}
    kinds = {_says(fault, kind): (fault, kind) for fault in FAULTS for kind in KINDS}
    for number, term in enumerate(network.parts[WATCH].terms):
        if isinstance(term, Prefix) and isinstance(term.event, Event) and term.event.who == WATCH:
            found.setdefault(kinds[term.event.does], set()).add(number)
    return {how: frozenset(numbers) for how, numbers in found.items()}


def attack(pipeline: Pipeline, claim: Claim) -> Finding:
    """Search all schedules for the shortest that break a claim: each kind after each fault.

    Raises ValueError as :func:`compose`.
    """
    network = compose(pipeline, claim)
    watcher = network.parts[WATCH]
    at = list(network.parts).index(WATCH)
    reached = frozenset(
        target
        for row in watcher.edges
        for event, target in row
        if isinstance(event, Event) and claim.matches(event) and event.epoch == pipeline.epochs
    )
    laws = {_says(*how): (how, numbers) for how, numbers in broken(network).items()}
    report: Report[State, Hashable] = explore(
        network,
        always={law: _outside(at, numbers) for law, (_, numbers) in laws.items()},
        sometimes={"reached": lambda state: state[at] in reached},
        patience=len(laws) + 1,  # to the end: how many states there are is compared with spin's
    )
    return Finding(
        pipeline=pipeline.name,
        claim=claim.words,
        tears=tuple(_tear(laws[b.law][0], b.trace, watcher, at) for b in report.breaches),
        reached=not report.unmet,
        states=report.states,
        transitions=report.transitions,
        seconds=report.seconds,
    )


def _says(fault: Fault, kind: Kind) -> str:
    return f"is {kind} after {fault}"


def _inside(at: int, numbers: frozenset[int]) -> Callable[[State], bool]:
    return lambda state: state[at] in numbers


def _without(dead: str) -> Callable[[Hashable], bool]:
    return lambda e: isinstance(e, Event) and e.who != dead and e not in FAULTS.values()


def _outside(at: int, numbers: frozenset[int]) -> Callable[[State], bool]:
    return lambda state: state[at] not in numbers


def _tear(
    how: tuple[Fault, Kind], trace: Trace[State, Hashable], watcher: Automaton, at: int
) -> Tear:
    events = tuple(event for event in trace.labels if isinstance(event, Event))
    ((said, _),) = watcher.edges[trace.states[-1][at]]
    claimed = said.epoch if isinstance(said, Event) else 0
    return Tear(*how, claimed, events)


def waits(pipeline: Pipeline) -> dict[str, tuple[str, ...]]:
    """Say for each actor who may have to wait for ever if it stops for ever: to block is no tear.

    An actor is done when it can do nothing but crash. It waits for another if there is a state from
    which, without that one and without a crash, it can't be done any more.
    """
    network = compose(pipeline, pipeline.claims[0])
    parts = list(network.parts.values())
    order = {name: i for i, name in enumerate(network.parts)}
    done = {
        name: frozenset(
            number
            for number, row in enumerate(parts[order[name]].edges)
            if all(event in FAULTS.values() for event, _ in row)
        )
        for name in pipeline.actors
    }
    found = {}
    for dead in pipeline.actors:
        report: Report[State, Hashable] = explore(
            network,
            eventually={
                name: _inside(order[name], done[name]) for name in pipeline.actors if name != dead
            },
            calm=_without(dead),
        )
        found[dead] = tuple(breach.law for breach in report.breaches)
    return found


def instants(pipeline: Pipeline) -> tuple[Claim, ...]:
    """Give the pipeline's own claims, and the clock's. Raises ValueError where these are none."""
    _check_tuples(pipeline)
    return (*pipeline.claims, NOON)
