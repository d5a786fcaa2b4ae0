"""Show who is told what: views of a peer only grow, what it lacks is sent, and silence follows."""

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handfast.core import events as ev
from handfast.core import gossip
from handfast.core.lattice import Epoch
from handfast.core.member import boot, step
from handfast.core.membership import Configuration, Domain, Roster
from handfast.core.messages import (
    Accepted,
    Bad,
    Converged,
    Declined,
    Frozen,
    Knows,
    Report,
    Restored,
    Skipped,
    Staged,
    Valid,
    decode_message,
    encode,
    pack,
    unpack,
)

epochs = st.builds(Epoch, st.just(1), st.integers(1, 3))
masks = st.integers(0, 2**70).map(pack)
votes = st.dictionaries(st.tuples(st.integers(0, 1), epochs), masks, max_size=3)
lines = st.just(()) | st.tuples(st.none() | epochs, st.none() | epochs)
views = st.builds(
    lambda frozen, checks, accepted, restored, lines, votes: Knows(
        frozen,
        tuple(sorted(checks.items())),
        accepted,
        b"",
        restored,
        lines,
        tuple((t, e, m) for (t, e), m in sorted(votes.items())
              if not lines or lines[t] is None or e > lines[t]),
    ),
    masks, st.dictionaries(epochs, masks, max_size=2), masks, st.booleans(), lines, votes,
)  # fmt: skip


@given(st.integers(0, 2**200))
def test_a_mask_of_any_size_crosses_the_wire(mask):
    assert unpack(pack(mask)) == mask
    assert pack(0) == b""


@given(views, views, views)
def test_merging_is_a_join(a, b, c):
    """Shows that views may arrive in any order, and any number of times."""
    assert gossip.merge(a, a) == a
    assert gossip.merge(a, b) == gossip.merge(b, a)
    assert gossip.merge(gossip.merge(a, b), c) == gossip.merge(a, gossip.merge(b, c))
    assert gossip.merge(gossip.merge(a, b), b) == gossip.merge(a, b)


def test_a_line_makes_the_votes_below_it_forgotten():
    old = Knows(lines=(None,), votes=((0, Epoch(1, 1), b"\1"), (0, Epoch(1, 2), b"\1")))
    new = Knows(lines=(Epoch(1, 1),), votes=((0, Epoch(1, 2), b"\2"),))
    assert gossip.merge(old, new) == Knows(lines=(Epoch(1, 1),), votes=((0, Epoch(1, 2), b"\3"),))


# --- members that talk


class Job:
    """Members in one process, and a network that only delivers."""

    def __init__(self, size: int) -> None:
        domains = tuple(Domain(f"d{i}", "dir", i) for i in range(size))
        self.roster = Roster(Configuration("run", size, domains, (("dir", 1),)))
        self.members = [boot(domain.id, 1, []) for domain in domains]
        self.mail: deque[tuple[int, bytes]] = deque()
        self.told: list[ev.Action] = []

    def run(self, at: int, event: ev.Event) -> None:
        self.members[at], effects = step(self.members[at], event)
        self.mail.extend((send.to, encode(send.message)) for send in effects.send)
        self.told += effects.apply
        for action in effects.apply:
            if isinstance(action, ev.Persist):
                self.run(at, ev.Persisted(action.epoch, f"image{at}"))
            elif isinstance(action, ev.Propose):
                self.run(at, ev.Accept(action.generation, action.epoch, at))

    def settle(self) -> int:
        for rounds in range(20):
            while self.mail:
                to, data = self.mail.popleft()
                self.run(to, ev.Received(decode_message(data)))
            for at in range(len(self.members)):
                self.run(at, ev.Tick())
            if not self.mail:
                return rounds
        return 20

    def begin(self, *ats: int) -> None:
        for at in ats or range(len(self.members)):
            self.run(at, ev.Begin(1, "r1", self.roster, founding=True))


@pytest.mark.parametrize("size", [1, 2, 9, 12])
def test_a_job_of_any_size_starts_saves_and_falls_silent(size):
    """Shows that it makes no difference whether all are linked to all (up to 9) or by a ring."""
    job = Job(size)
    job.begin()
    job.settle()
    assert all(member.open for member in job.members)
    for at in range(size):
        job.run(at, ev.Captured(Epoch(1, 10)))
    rounds = job.settle()
    assert {m.tallies[0].line.epoch for m in job.members} == {Epoch(1, 10)}
    assert rounds <= size.bit_length() + 1
    assert not any(gossip.restless(member) for member in job.members)


def test_a_job_of_seventy_ranks_can_speak():
    """Shows that masks are not cut, nor refused, where they outgrow msgpack's 64 bits."""
    job = Job(70)
    job.begin(0, 1)
    known = tuple(
        Frozen(i, 1, 1, "r1", job.roster.digest, Report((), (), None, ())) for i in range(2, 69)
    )
    job.run(0, ev.Received(gossip_of(job, known)))
    job.run(0, ev.Tick())
    spoken = [decode_message(data) for _, data in job.mail]
    assert unpack(spoken[-1].knows.frozen) == (1 << 69) - 1 - 2
    assert job.roster.names(1 << 69) == ("d69",)


def test_in_a_recovery_a_peer_is_sent_what_it_lacks_and_nothing_else():
    job = Job(3)
    job.begin(0, 1)
    job.settle()
    member = job.members[0]
    everything = gossip.lacking(member, Knows())
    assert [type(fact) for fact in everything] == [Frozen, Frozen]
    assert gossip.lacking(member, gossip.knows(member)) == ()
    assert gossip.lacking(member, Knows(frozen=pack(0b01))) == everything[1:]
    assert gossip.lacking(member, Knows(restored=True)) == ()
    assert job.roster.names(gossip.restless(member)) == ("d2",)


def test_judgements_acceptances_and_refusals_are_passed_on():
    job = Job(3)
    job.begin(0, 1)
    job.settle()
    said = (
        Frozen(2, 1, 1, "r1", job.roster.digest, Report((), (), None, ())),
        Valid(1, 1, Epoch(0, 0)),
        Bad(2, 1, Epoch(0, 0), "gone"),
        Accepted(1, 1, Epoch(0, 0), 1),
        Declined(2, 1, Epoch(0, 0), "no"),
    )
    sent = gossip_of(job, said)
    job.run(0, ev.Received(sent))
    lacking = gossip.lacking(job.members[0], Knows(frozen=pack(0b111)))
    assert [fact for fact in lacking if fact in said] == list(said[1:])
    assert gossip.lacking(job.members[0], gossip.knows(job.members[0])) == ()


def gossip_of(job: Job, facts):
    """Give a message of member 1 that carries these facts."""
    data = next(data for to, data in reversed(sent_by(job)) if to == 0)
    message = decode_message(data)
    return type(message)(
        message.sender, message.incarnation, message.generation, message.round,
        message.configuration, facts, message.knows, False,
    )  # fmt: skip


def sent_by(job: Job) -> list[tuple[int, bytes]]:
    job.run(1, ev.Greet(0))
    mail = list(job.mail)
    job.mail.clear()
    return mail


def test_once_open_a_peer_is_sent_certificates_and_open_votes():
    job = Job(3)
    job.begin()
    job.settle()
    for at in (0, 1, 2, 0):
        job.run(at, ev.Captured(Epoch(1, 10) if not job.members[at].last else Epoch(1, 20)))
    job.settle()
    member = job.members[0]
    assert [type(f) for f in gossip.lacking(member, Knows())] == [Restored, Converged, Staged]
    late = Knows(restored=True, lines=(Epoch(1, 30),))
    assert gossip.lacking(member, late) == ()
    skipped = Skipped(1, Epoch(1, 20), "full")
    job.run(0, ev.Received(gossip_of(job, (skipped,))))
    assert skipped in gossip.lacking(job.members[0], Knows(restored=True))


def test_who_has_not_begun_is_silent():
    assert gossip.restless(boot("d0", 1, [])) == 0
    assert gossip.lacking(boot("d0", 1, []), Knows()) == ()
