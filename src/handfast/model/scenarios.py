"""What is searched: small jobs, each with the faults that it may suffer and what it must reach.

Each scenario is a bound on one question, so that it can be searched to its end. On one core that
takes up to ten seconds; those that are ``heavy`` take longer, most of them minutes.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final

import msgspec

from handfast.core.membership import (
    Change,
    Configuration,
    Domain,
    Roster,
    RoundRecord,
    allocate,
)
from handfast.core.retain import Keep
from handfast.model.explore import Report, explore
from handfast.model.place import Bounds, Place, Round, Rules
from handfast.model.protocol import Move, Protocol, State
from handfast.model.soup import Soup
from handfast.model.symmetry import Symmetry
from handfast.model.tell import story

__all__ = ["SCENARIOS", "Found", "Scenario", "build", "search", "shape"]


def shape(shards: int, fanout: int = 0, **tiers: tuple[int, int]) -> Configuration:
    """Build a configuration: each tier as (copies of every shard, how many are needed)."""
    domains = tuple(
        Domain(f"{tier}{shard}{chr(97 + copy)}", tier, shard, f"host{shard}{copy}")
        for tier, (copies, _) in tiers.items()
        for shard in range(shards)
        for copy in range(copies)
    )
    need = tuple((t, k) for t, (_, k) in tiers.items())
    return Configuration("run", shards, domains, need, fanout)


class Launch(msgspec.Struct, frozen=True):
    """One start of the job: by which engine's store, told which generation as the greatest that a
    member reports, asking for which step, and whether after the change of configuration."""

    store: int = 0
    reported: int = 0
    want: int | None = None
    changed: bool = False


class Scenario(msgspec.Struct, frozen=True):
    """A job, its launches, its bounds, and the goals that a search of it must reach.

    ``begun``: the only round has recovered undisturbed, all know of each other that they have, and
    nothing is in the air: what is searched is what comes then. With no epoch to be saved it is what
    comes before. Together they leave out what meets across that line; the composed ones don't.
    ``soup``: over whatever anyone could ever hear (:mod:`handfast.model.soup`), not over a network.
    """

    name: str
    what: str
    job: Configuration
    bounds: Bounds
    launches: tuple[Launch, ...] = (Launch(),)
    reach: tuple[str, ...] = ()
    keep: Keep = Keep(1)
    window: int = 2
    links: tuple[tuple[int, int], ...] | None = None
    fenced: str = ""
    alike: bool = False
    begun: bool = False
    ordered: bool = True
    stale: bool = False
    apart: bool = False
    soup: bool = False
    heavy: bool = False
    limit: int | None = None


class Found(msgspec.Struct, frozen=True):
    """What a search of a scenario found.

    ``breach`` is empty or says which law is broken and how, ``story`` is the shortest way there;
    ``unmet`` are the goals that were not reached; ``places``, ``messages`` and ``judgements``
    count what the model's tables hold.
    """

    scenario: str
    states: int
    transitions: int
    depth: int
    frontier: int
    breach: str
    story: tuple[str, ...]
    unmet: tuple[str, ...]
    seconds: float
    per_second: float
    bytes_per_state: float
    places: int
    messages: int
    judgements: int

    @property
    def sound(self) -> bool:
        """Say whether every law held, and every goal was reached."""
        return not self.breach and not self.unmet


def build(scenario: Scenario) -> Protocol:
    """Build the model of a scenario; its generations are allocated as an engine's store does."""
    founding = Roster(scenario.job)
    heir, after = "", founding
    changes: tuple[Change, ...] = ()
    if scenario.fenced:
        heir = f"{scenario.fenced}+"
        domains = tuple(
            msgspec.structs.replace(d, id=heir) if d.id == scenario.fenced else d
            for d in scenario.job.domains
        )
        after = Roster(msgspec.structs.replace(scenario.job, domains=domains))
        changes = (Change(founding.digest, after.digest, (scenario.fenced,)),)
    stores: dict[int, RoundRecord | None] = {}
    rounds = []
    for number, launch in enumerate(scenario.launches):
        name = f"round{number}"
        record = allocate(stores.get(launch.store), name, launch.reported)
        if record is None:
            raise ValueError(f"{name} was superseded before it began")
        stores[launch.store] = record
        late = launch.changed
        rounds.append(
            Round(name, record.generation, after if late else founding, not late,
                  changes if late else (), launch.want)
        )  # fmt: skip
    rules = Rules(
        tuple(rounds),
        scenario.bounds,
        scenario.keep,
        scenario.window,
        scenario.alike,
        scenario.apart,
    )
    model: Callable[..., Protocol]
    if scenario.soup:
        model = partial(Soup, founding=founding, fenced=scenario.fenced, heir=heir)
    else:
        model = partial(
            Protocol, founding=founding, fenced=scenario.fenced, heir=heir, links=scenario.links,
            stale=scenario.stale, ordered=scenario.ordered,
        )  # fmt: skip
    if not scenario.begun:
        return model(rules)
    calm = msgspec.structs.replace(rules, bounds=Bounds(epochs=0, lives=1))
    return model(rules, begun=_recovered(model(calm)))


def _recovered(model: Protocol) -> list[Place]:
    """Follow one calm way to where all have recovered and are silent."""
    (state,) = model.initial()
    while not model.settled(state):
        state = next(after for move, after in model.moves(state) if move.calm)
    return [model.places.values[place] for place in state[1 : 1 + model.size]]


def digest(state: State) -> bytes:
    """Digest a state in 16 bytes."""
    return hashlib.blake2b(array("i", state).tobytes(), digest_size=16).digest()


def search(
    scenario: Scenario,
    *,
    limit: int | None = None,
    symmetric: bool = True,
    progress: Callable[[int, int, int], None] | None = None,
) -> Found:
    """Search a scenario; *eventually* is judged where the search is not bounded by ``limit``."""
    model = build(scenario)
    limit = limit or scenario.limit
    report = explore(
        model,
        always={"every law": model.sound},
        eventually=None if limit else {"settles": model.settled},
        calm=lambda move: move.calm,
        canonical=Symmetry(model).canonical if scenario.alike and symmetric else None,
        digest=digest if scenario.heavy else None,
        limit=limit,
        progress=progress,
    )
    return _found(scenario, model, report)


def ends(model: Protocol, state: State, most: int = 20_000) -> str:
    """Name the laws that are to hold eventually, and hold nowhere in the end.

    From a state from which none settles calm moves are followed to where they go round in the end
    (or through the first ``most`` states): what is wrong everywhere there is named.
    """
    seen = _calmly(model, state, most)
    for _ in range(8):  # the last one found is likely nearer to the end
        seen = _calmly(model, seen[-1], most)
    wrong = [model.unsettled(at) for at in seen]
    return " ".join(law for law in wrong[0] if all(law in w for w in wrong)) or "nothing settles"


def _calmly(model: Protocol, state: State, most: int) -> list[State]:
    seen = dict.fromkeys([state])
    queue = deque(seen)
    while queue and len(seen) < most:
        for move, after in model.moves(queue.popleft()):
            if move.calm and after not in seen:
                seen[after] = None
                queue.append(after)
    return list(seen)


def _found(scenario: Scenario, model: Protocol, report: Report[State, Move]) -> Found:
    breach = ""
    told: tuple[str, ...] = ()
    for found in report.breaches[:1]:
        last = found.trace.states[-1]
        breach = model.breach(last) or f"{ends(model, last)}: and no calm way leads out of it"
        told = story(model, found.trace)
    return Found(
        scenario.name, report.states, report.transitions, report.depth, report.frontier,
        breach, told, tuple(goal for goal in scenario.reach if goal not in model.met),
        report.seconds, report.per_second, report.bytes_per_state,
        len(model.places.values), len(model.air.messages.values), len(model.judge.judged),
    )  # fmt: skip


CONVERGES: Final = ("an epoch converges", "a certificate is learnt")
BOOTS: Final = (*CONVERGES, "a member boots in the middle of a recovery")
PATH: Final = ((0, 1), (1, 2))
STAR: Final = ((0, 1), (0, 2), (0, 3))
TWO, THREE = shape(2, dir=(1, 1)), shape(3, dir=(1, 1))
ONE, SPARE = shape(1, dir=(1, 1)), shape(1, dir=(2, 1))

_ALL = (
    Scenario("crash", "two domains, an epoch, a crash", TWO, Bounds(crashes=1), reach=BOOTS),
    Scenario("epochs", "two domains, two epochs", TWO, Bounds(epochs=2), reach=CONVERGES),
    Scenario("any order", "two domains; whatever was sent may come in any order, or never", TWO,
             Bounds(), reach=CONVERGES, ordered=False),
    Scenario("network", "a message is lost, one overtakes, one comes twice, a tick is early", TWO,
             Bounds(epochs=1, losses=1, overtakes=1, echoes=1, early=1), reach=CONVERGES),
    Scenario("overlap", "two rounds at once", TWO, Bounds(), (Launch(), Launch()),
             (*CONVERGES, "an orphan is released", "a round is overtaken")),
    Scenario("tie", "two engines give one generation to two rounds, then a third", TWO, Bounds(),
             (Launch(), Launch(1), Launch()), (*CONVERGES, "a stale message is refused"),
             stale=True),
    Scenario("rollback", "the second round asks for an older step", ONE, Bounds(epochs=2),
             (Launch(), Launch(want=1), Launch()), ("a timeline is abandoned",), keep=Keep(2)),
    Scenario("rot", "a copy is damaged or lost between two rounds", TWO, Bounds(rots=1),
             (Launch(), Launch()), (*CONVERGES, "a recovery descends below a bad copy",
             "nothing is left to restore"), keep=Keep(2)),
    Scenario("loss", "a copy is damaged or lost before its agent comes back, or between rounds",
             ONE, Bounds(epochs=2, rots=1, crashes=1), (Launch(), Launch()),
             ("an epoch converges", "a recovery descends below a bad copy"), keep=Keep(2)),
    Scenario("either", "one of two copies is damaged", SPARE, Bounds(rots=1),
             (Launch(), Launch()), ("a bad copy is outlived by a valid one",)),
    Scenario("misread", "a sound copy can't be read once", ONE, Bounds(epochs=2, misreads=1),
             (Launch(), Launch(), Launch()),
             ("an epoch converges", "a recovery descends below a bad copy"), keep=Keep(2)),
    Scenario("path", "three domains, of which two never hear each other", THREE, Bounds(),
             reach=CONVERGES, links=PATH, alike=True),
    Scenario("tree", "three domains that hear each other along a tree alone; a message is lost",
             shape(3, fanout=2, dir=(1, 1)), Bounds(losses=1), reach=CONVERGES,
             links=((0, 1), (0, 2))),
    Scenario("tree of four", "four domains that hear each other along a tree alone, two deep",
             shape(4, fanout=2, dir=(1, 1)), Bounds(), reach=CONVERGES,
             links=((0, 1), (0, 2), (2, 3))),
    Scenario("tree skip", "a tree of three, and a save fails", shape(3, fanout=2, dir=(1, 1)),
             Bounds(failures=1), reach=(*CONVERGES, "a skip is voted"), links=((0, 1), (0, 2)),
             heavy=True),
    Scenario("tree crash", "a tree of three, a crash", shape(3, fanout=2, dir=(1, 1)),
             Bounds(crashes=1), links=((0, 1), (0, 2)), heavy=True, limit=3_000_000),
    Scenario("both", "two domains, both needed", shape(1, dir=(2, 2)), Bounds(crashes=1),
             reach=BOOTS),
    Scenario("tiers", "a shard in two tiers, two rounds", shape(1, dir=(1, 1), mem=(1, 1)),
             Bounds(rots=1), (Launch(), Launch()), ("an epoch converges",), heavy=True),
    Scenario("change", "one of two copies is lost for good, and an heir takes its place", SPARE,
             Bounds(changes=1), (Launch(), Launch(changed=True)),
             ("a changed configuration resumes",), fenced="dir0b"),
    Scenario("pins", "a reader holds an epoch while others are released", TWO,
             Bounds(epochs=2, pins=1), reach=CONVERGES),
    Scenario("reader", "a reader's agent comes back while epochs are released", ONE,
             Bounds(epochs=2, pins=1, crashes=1), reach=("an epoch converges",)),
    Scenario("orphans", "a reader holds an epoch over a rollback", ONE, Bounds(epochs=3, pins=1),
             (Launch(), Launch(want=2)), ("a timeline is abandoned",), keep=Keep(2)),
    Scenario("retry", "a save fails and is tried again, in a window of one", TWO,
             Bounds(epochs=2, failures=1), window=1,
             reach=(*CONVERGES, "a skip is voted", "a window blocks and names")),
    Scenario("passed by", "a save is lost in a crash, in a window of one", TWO,
             Bounds(epochs=2, crashes=1), window=1, heavy=True,
             reach=(*BOOTS, "a window blocks and names")),
    Scenario("again", "a rank saves a step again, or its trainer begins again", TWO,
             Bounds(repeats=1, agains=1), reach=CONVERGES),
    Scenario("resaved", "a rank saves what it was restored from", ONE, Bounds(repeats=1),
             (Launch(), Launch()), ("an epoch converges",)),
    Scenario("forgone", "a save is forgone, in a window of one", TWO,
             Bounds(epochs=2, skips=1), window=1,
             reach=(*CONVERGES, "a skip is voted", "a window blocks and names")),
    Scenario("failures", "a save fails, another is forgone", TWO,
             Bounds(epochs=1, skips=1, failures=1), heavy=True,
             reach=(*CONVERGES, "a skip is voted", "a void epoch is released")),
    Scenario("late", "a save of a past round fails, or is forgone", ONE,
             Bounds(failures=1, skips=1), (Launch(), Launch()),
             ("an epoch converges", "a skip is voted")),
    Scenario("window", "a window of one", TWO, Bounds(epochs=2), window=1,
             reach=(*CONVERGES, "a window blocks and names")),
    Scenario("decline", "a rank can't take what is offered", TWO, Bounds(declines=1),
             (Launch(), Launch()), (*CONVERGES, "a rank declines")),
    Scenario("ghost", "an agent that was frozen wakes up behind its successor", TWO,
             Bounds(crashes=1, ghosts=1), reach=BOOTS, heavy=True),
    Scenario("stale", "messages of a past generation come late", TWO, Bounds(),
             (Launch(), Launch()), (*CONVERGES, "a stale message is refused"), stale=True),
    Scenario("restart", "two rounds and a crash", TWO, Bounds(crashes=1), (Launch(), Launch()),
             BOOTS, heavy=True),
    Scenario("storm", "a crash on a network that may lose one and let one overtake", TWO,
             Bounds(crashes=1, losses=1, overtakes=1), reach=BOOTS, heavy=True),
    Scenario("recovering", "two domains, a crash, nothing is saved", TWO,
             Bounds(epochs=0, crashes=1), reach=("a member boots in the middle of a recovery",)),
    Scenario("saving", "two domains that have recovered, an epoch, a crash", TWO,
             Bounds(crashes=1), begun=True, reach=CONVERGES),
    Scenario("triangle", "three domains that all hear each other", THREE, Bounds(),
             reach=CONVERGES, alike=True, heavy=True),
    Scenario("triangle crash", "three domains that all hear each other, a crash", THREE,
             Bounds(crashes=1), alike=True, heavy=True, limit=3_000_000),
    Scenario("path saving", "a path of three that has recovered, an epoch, a crash", THREE,
             Bounds(crashes=1), reach=CONVERGES, links=PATH, begun=True, alike=True, heavy=True),
    Scenario("path crash", "a path of three, a crash", THREE, Bounds(crashes=1), reach=BOOTS,
             links=PATH, alike=True, heavy=True, limit=4_000_000),
    Scenario("star", "four domains, three of which hear only the first", shape(4, dir=(1, 1)),
             Bounds(), reach=CONVERGES, links=STAR, alike=True),
    Scenario("star crash", "a star of four, a crash", shape(4, dir=(1, 1)), Bounds(crashes=1),
             links=STAR, alike=True, heavy=True, limit=3_000_000),
    Scenario("any order crash", "a crash, and any order", TWO, Bounds(crashes=1), reach=BOOTS,
             ordered=False, heavy=True),
    Scenario("soup", "a crash; whatever anyone ever wrote is heard at any time, or never",
             TWO, Bounds(crashes=1), reach=BOOTS, alike=True, soup=True),
    Scenario("soup of three", "three domains and a crash over such a soup", THREE,
             Bounds(crashes=1), reach=BOOTS, alike=True, soup=True, heavy=True),
    Scenario("soup of four", "four domains and a crash over such a soup", shape(4, dir=(1, 1)),
             Bounds(crashes=1), reach=BOOTS, alike=True, soup=True, heavy=True),
    Scenario("soup of two rounds", "an epoch in each of two rounds, and a crash each, over a soup",
             TWO, Bounds(crashes=2), (Launch(), Launch()), BOOTS, alike=True, soup=True,
             heavy=True),
    Scenario("full", "two epochs in each of two rounds, and a crash each", TWO,
             Bounds(epochs=2, crashes=2), (Launch(), Launch()), heavy=True, limit=4_000_000),
)  # fmt: skip
SCENARIOS: Final = {scenario.name: scenario for scenario in _ALL}
