"""Show each thing that the one door takes, and each that it refuses, with the reason."""

from collections import deque

import pytest
from msgspec.structs import replace

from handfast.core import events as ev
from handfast.core import gossip
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.member import boot, step
from handfast.core.membership import Change, Configuration, Domain, Roster
from handfast.core.messages import (
    Accepted,
    Bad,
    Certificate,
    Configured,
    Converged,
    Frozen,
    Knows,
    Message,
    Record,
    Restored,
    Skipped,
    Staged,
    Valid,
)
from handfast.core.recover import Phase
from handfast.core.retain import Keep
from handfast.core.view import view

ROSTER = Roster(
    Configuration("run", 2, (Domain("a", "dir", 0), Domain("b", "dir", 1)), (("dir", 1),))
)
E1, E2, E3 = Epoch(1, 10), Epoch(1, 20), Epoch(1, 30)


def begin(generation: int = 1, name: str = "r1", roster: Roster = ROSTER, **more) -> ev.Begin:
    return ev.Begin(generation, name, roster, founding=True, keep=Keep(1), **more)


class Pair:
    """Two members, their journals, and the mail between them."""

    def __init__(self, window: int = 2) -> None:
        self.window = window
        self.members = [boot("a", 1, []), boot("b", 1, [])]
        self.journals: list[list[Record]] = [[], []]
        self.mail: deque[tuple[int, Message]] = deque()
        for at in (0, 1):
            self.run(at, ev.Pinned(()))

    def run(self, at: int, event: ev.Event) -> ev.Effects:
        self.members[at], effects = step(self.members[at], event)
        self.journals[at] += effects.persist
        self.mail.extend((send.to, send.message) for send in effects.send)
        return effects

    def deliver(self) -> list[ev.Action]:
        told: list[ev.Action] = []
        while self.mail:
            to, message = self.mail.popleft()
            told += self.run(to, ev.Received(message)).apply
        return told

    def begin(self, *ats: int, generation: int = 1) -> None:
        for at in ats or (0, 1):
            self.run(at, replace(begin(generation, f"r{generation}"), window=self.window))

    def opened(self) -> "Pair":
        self.begin()
        self.deliver()
        for at in (0, 1):
            self.run(at, ev.Accept(1, GENESIS, at))
        self.deliver()
        return self

    def save(self, epoch: Epoch) -> None:
        for at in (0, 1):
            self.run(at, ev.Captured(epoch))
            self.run(at, ev.Persisted(epoch, f"image{at}"))
        self.settle()

    def settle(self) -> None:
        for _ in range(4):
            self.deliver()
            for at in (0, 1):
                self.run(at, ev.Tick())

    def reboot(self, at: int) -> None:
        past = self.members[at]
        self.members[at] = boot(past.id, past.incarnation + 1, self.journals[at])
        self.run(at, ev.Pinned(()))

    def word(self, *facts, **other) -> Message:
        """Build a message of the second member's, as it would be now, but for what is given."""
        m = self.members[1]
        message = Message(1, m.incarnation, m.generation, m.round, ROSTER.digest, facts, Knows())
        return replace(message, **other)


def refusals(effects: ev.Effects) -> list[str]:
    return [action.reason for action in effects.apply if isinstance(action, ev.Reject)]


# --- a life, from the founding to the next


def test_a_run_is_founded_saved_and_resumed():
    pair = Pair().opened()
    assert all(member.open for member in pair.members)
    pair.save(E1)
    pair.save(E2)
    assert {m.tallies[0].line.epoch for m in pair.members} == {E2}
    assert [[c.epoch for c in m.retained] for m in pair.members] == [[E2], [E2]]
    for at in (0, 1):
        pair.reboot(at)
    pair.begin(generation=2)
    asked = [a for a in pair.deliver() if isinstance(a, ev.Check)]
    assert {a.epoch for a in asked} == {E2}
    for at in (0, 1):
        pair.run(at, ev.Checked(2, E2))
    proposed = [a for a in pair.deliver() if isinstance(a, ev.Propose)]
    assert {(a.epoch, a.copies) for a in proposed} == {(E2, (1, 2))}
    for at in (0, 1):
        pair.run(at, ev.Accept(2, E2, at))
    resumed = [a for a in pair.deliver() if isinstance(a, ev.Resume)]
    assert {a.certificate.base for a in resumed} == {E2}


def test_effects_are_what_was_written_and_then_told():
    """Shows that a member never says what is not in its journal."""
    pair = Pair().opened()
    pair.run(0, ev.Captured(E1))
    effects = pair.run(0, ev.Persisted(E1, "x"))
    assert effects.persist == (Staged(0, E1, "x"),)
    assert [send.message.facts for send in effects.send] == [effects.persist]


def test_what_is_no_event_is_refused():
    with pytest.raises(KeyError):
        step(boot("a", 1, []), "begin")


# --- rounds


def test_an_older_round_is_told_that_it_is_overtaken():
    pair = Pair()
    pair.begin(generation=3)
    assert pair.run(0, begin(2, "r2")).apply == (ev.Overtaken(3),)
    assert pair.run(0, begin(3, "other")).apply == (ev.Overtaken(3),)


def test_the_same_round_may_begin_again():
    """Shows that a trainer which finds its agent again is told what it missed."""
    pair = Pair()
    pair.begin()
    pair.deliver()
    again = pair.run(0, begin())
    assert again.persist == ()
    assert [type(a) for a in again.apply] == [ev.Propose]
    assert [send.message.hello for send in again.send] == [True]
    pair.run(0, ev.Accept(1, GENESIS, 0))
    pair.run(1, ev.Accept(1, GENESIS, 1))
    pair.deliver()
    assert [type(a) for a in pair.run(0, begin()).apply] == [ev.Resume]


def test_who_was_fenced_can_not_begin():
    other = Roster(replace(ROSTER.configuration, domains=(Domain("c", "dir", 0),), shards=1))
    effects = Pair().run(0, begin(roster=other))
    assert effects.persist == ()
    assert "a is no member of configuration" in effects.apply[0].reasons[0]
    assert "fenced" in effects.apply[0].reasons[0]


def test_a_configuration_needs_a_recorded_change():
    pair = Pair().opened()
    heirs = (Domain("a", "dir", 0), Domain("c", "dir", 1))
    new = Roster(replace(ROSTER.configuration, domains=heirs))
    effects = pair.run(0, begin(2, "r2", new))
    assert [a.phase for a in effects.apply] == [Phase.DECLINED]
    assert "no engine recorded the change" in effects.apply[0].reasons[0]
    change = Change(ROSTER.digest, new.digest, ("b",))
    effects = pair.run(0, begin(2, "r2", new, changes=(change,)))
    assert effects.persist[0] == Configured(new.configuration, True)
    assert isinstance(effects.persist[1], Frozen)
    assert pair.members[0].tallies[0].line is None
    assert effects.persist[1].report.converged[0].epoch == GENESIS


# --- recovery


def test_a_copy_is_read_once_and_judged_once():
    pair = Pair().opened()
    pair.save(E1)
    pair.begin(generation=2)
    pair.deliver()
    assert pair.run(0, ev.Checked(2, E2)).persist == ()
    assert pair.run(0, ev.Checked(1, E1)).persist == ()
    assert pair.run(0, ev.Checked(2, E1, "damaged")).persist == (Bad(0, 2, E1, "damaged"),)
    assert pair.run(0, ev.Checked(2, E1)).persist == ()
    assert pair.members[0].doubted == (E1,)


def test_a_reboot_in_the_middle_of_a_recovery_goes_on_where_it_was():
    pair = Pair().opened()
    pair.save(E1)
    pair.begin(generation=2)
    pair.deliver()
    pair.run(0, ev.Checked(2, E1))
    pair.reboot(0)
    again = pair.run(0, begin(2, "r2"))
    assert again.persist == ()
    told = pair.deliver()
    assert not [a for a in told if isinstance(a, ev.Check)]
    assert Valid(0, 2, E1) in pair.journals[0]


def test_nothing_left_to_restore_is_said_once_and_why():
    pair = Pair().opened()
    pair.save(E1)
    pair.begin(generation=2)
    pair.deliver()
    stuck = pair.run(0, ev.Checked(2, E1, "damaged")).apply
    assert stuck == (ev.Stuck(Phase.EXHAUSTED, None, ("a: 1/10 damaged",)),)
    assert pair.run(0, ev.Tick()).apply == ()


@pytest.mark.parametrize(
    ("event", "why"),
    [
        (ev.Accept(2, GENESIS, 0), "is not the candidate"),
        (ev.Accept(1, E1, 0), "is not the candidate"),
        (ev.Accept(1, GENESIS, 1), "can't accept copy 1"),
    ],
)
def test_an_acceptance_of_what_is_not_offered_is_refused(event, why):
    pair = Pair()
    pair.begin()
    pair.deliver()
    assert why in refusals(pair.run(0, event))[0]


def test_an_acceptance_before_any_round_is_refused():
    assert "is not the candidate" in refusals(Pair().run(0, ev.Accept(1, E1, 0)))[0]


def test_a_rank_accepts_once():
    pair = Pair()
    pair.begin()
    pair.deliver()
    assert pair.run(0, ev.Accept(1, GENESIS, 0)).persist == (Accepted(0, 1, GENESIS, 0),)
    assert pair.run(0, ev.Accept(1, GENESIS, 0)).persist == ()


def test_a_rank_that_declines_stops_the_round_on_all():
    """Shows that a changed model is refused on every rank before any has changed a weight."""
    pair = Pair()
    assert pair.run(0, ev.Decline(1, GENESIS, "early")).send == ()
    pair.begin()
    pair.deliver()
    effects = pair.run(0, ev.Decline(1, GENESIS, "other structure"))
    assert effects.persist == ()
    told = [*effects.apply, *pair.deliver()]
    assert told == [ev.Stuck(Phase.DECLINED, GENESIS, ("rank 0: other structure",))] * 2
    assert refusals(pair.run(1, ev.Accept(1, GENESIS, 1)))


def test_that_a_rank_has_declined_outlives_a_crash_of_its_agent():
    """Shows that both go on to say the same, and then nothing: a decline is in no journal."""
    pair = Pair()
    pair.begin()
    pair.deliver()
    pair.run(0, ev.Decline(1, GENESIS, "other structure"))
    pair.deliver()
    pair.reboot(0)
    pair.settle()
    assert pair.members[0].recovery == pair.members[1].recovery
    assert pair.members[0].recovery.declined
    assert [gossip.restless(m) for m in pair.members] == [0, 0]


# --- saves


@pytest.mark.parametrize(
    ("epoch", "why"),
    [
        (Epoch(2, 10), "generation 1 is the present one"),
        (Epoch(1, 0), "step 0 was saved or restored before it"),
    ],
)
def test_an_image_that_does_not_fit_is_refused(epoch, why):
    pair = Pair().opened()
    (refused,) = pair.run(0, ev.Captured(epoch)).apply
    assert (refused.reason, refused.by) == (why, ())


def test_nothing_is_saved_before_the_restore():
    (refused,) = Pair().run(0, ev.Captured(E1)).apply
    assert "restore first" in refused.reason


def test_a_step_is_saved_once_and_in_order():
    pair = Pair().opened()
    assert pair.run(0, ev.Captured(E2)).apply == (ev.Persist(E2),)
    for epoch in (E1, E2):
        assert isinstance(pair.run(0, ev.Captured(epoch)).apply[0], ev.Refuse)
    assert pair.run(0, ev.Persisted(E1, "x")).persist == ()
    assert pair.run(0, ev.Failed(E1, "x")).persist == ()


def test_a_full_window_names_who_is_late():
    pair = Pair().opened()
    for epoch in (E1, E2):
        pair.run(0, ev.Captured(epoch))
    (refused,) = pair.run(0, ev.Captured(E3)).apply
    assert refused.by == ("a",)
    for epoch in (E1, E2):
        pair.run(0, ev.Persisted(epoch, "x"))
    (refused,) = pair.run(0, ev.Captured(E3)).apply
    assert refused.by == ("b",)
    assert "2 epochs are saved and have not converged" in refused.reason


def test_a_skip_makes_room_in_the_window():
    pair = Pair().opened()
    for epoch in (E1, E2):
        pair.run(0, ev.Captured(epoch))
        pair.run(0, ev.Persisted(epoch, "x"))
    pair.run(1, ev.Captured(E1))
    assert pair.run(1, ev.Failed(E1, "full")).persist == (Skipped(1, E1, "full"),)
    pair.deliver()
    assert pair.run(0, ev.Captured(E3)).apply == (ev.Persist(E3),)


def saved(pair, who, *epochs):
    for epoch in epochs:
        assert pair.run(who, ev.Captured(epoch)).apply == (ev.Persist(epoch),)
        pair.run(who, ev.Persisted(epoch, "x"))
    pair.deliver()


def test_tries_at_different_steps_block_nobody_and_the_next_step_converges():
    """Shows that failed saves that each rank tries again at its own step fill no window for ever:
    whoever has voted beyond an epoch is not awaited for it."""
    pair = Pair(window=1).opened()
    saved(pair, 0, Epoch(1, 21))
    assert pair.run(0, ev.Captured(Epoch(1, 30))).apply[0].by == ("b",)
    saved(pair, 1, Epoch(1, 22))
    assert view(pair.members[0]).blocked_by == ("a",)  # which might still save 22
    for who in (0, 1):
        saved(pair, who, Epoch(1, 30))
    assert [m.tallies[0].line.epoch for m in pair.members] == [Epoch(1, 30)] * 2


def test_whoever_skipped_a_later_epoch_may_still_be_persisting_this_one():
    """Shows that a rank whose disk is slow is named, also once it leaves epochs out."""
    pair = Pair().opened()
    saved(pair, 0, E1)
    pair.run(1, ev.Captured(E1))
    pair.run(1, ev.Forgone(E2, "busy"))
    pair.deliver()
    assert view(pair.members[0]).blocked_by == ("b",)
    assert view(pair.members[0]).phase == "converging"
    pair.run(1, ev.Persisted(E1, "x"))
    pair.deliver()
    assert pair.members[0].tallies[0].line.epoch == E1


def test_ranks_that_never_save_the_same_step_are_told_before_the_disk_is_full():
    """Shows that what will never converge is bounded, too, and that the other rank is named."""
    pair = Pair(window=1).opened()
    for at in range(10, 50, 10):
        saved(pair, 0, Epoch(1, at))
        saved(pair, 1, Epoch(1, at + 1))
    (refused,) = pair.run(0, ev.Captured(Epoch(1, 50))).apply
    assert refused.by == ("b",)
    assert refused.reason == (
        "4 epochs are saved that others have passed by: do all ranks save alike?"
    )


def test_a_rank_that_does_not_save_says_so_and_nobody_waits():
    """Shows that `save` by the policy "skip" leaves the others' windows free."""
    pair = Pair().opened()
    assert pair.run(0, ev.Forgone(E1, "busy")).persist == (Skipped(0, E1, "busy"),)
    (refused,) = pair.run(0, ev.Forgone(E1, "again")).apply
    assert "step 10 was saved" in refused.reason
    pair.deliver()
    for epoch in (E1, E2):
        pair.run(1, ev.Captured(epoch))
        pair.run(1, ev.Persisted(epoch, "x"))
    assert pair.run(1, ev.Captured(E3)).apply == (ev.Persist(E3),)
    full = pair.run(1, ev.Forgone(Epoch(1, 40), "window"))
    assert full.persist[0] == Skipped(1, Epoch(1, 40), "window")


# --- what peers say


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"sender": 7}, "no member sent it: 7"),
        ({"sender": -1}, "no member sent it: -1"),
        ({"sender": 0}, "no member sent it: 0"),
        ({"generation": 0}, "generation 0 is past: 1"),
        ({"configuration": "beef"}, "of configuration beef"),
        ({"round": "r9"}, "another round of generation 1"),
        ({"incarnation": 0}, "incarnation 0 of b is past"),
    ],
)
def test_a_message_that_does_not_belong_here_changes_nothing(other, why):
    pair = Pair().opened()
    before = pair.members[0]
    message = pair.word(Staged(1, E1, "x"), **other)
    effects = pair.run(0, ev.Received(message))
    assert why in refusals(effects)[0]
    assert (effects.persist, pair.members[0].tallies) == ((), before.tallies)


def test_a_later_generation_is_reported_and_not_joined():
    pair = Pair().opened()
    effects = pair.run(0, ev.Received(pair.word(Staged(1, E1, "x"), generation=4)))
    assert effects.apply == (ev.Overtaken(4),)


def test_a_member_without_a_configuration_is_deaf():
    pair = Pair()
    pair.begin(1)
    state, effects = step(boot("a", 1, []), ev.Received(pair.word()))
    assert (state, effects) == (boot("a", 1, []), ev.Effects())


LINE = Certificate("run", ROSTER.digest, "dir", E1, "x")


@pytest.mark.parametrize(
    ("fact", "why"),
    [
        (Staged(1, Epoch(2, 10), "x"), "a vote on 2/10 in generation 1"),
        (Staged(5, E1, "x"), "a vote on 1/10"),
        (Staged(1, E1, "other"), "b voted twice"),
        (Converged(replace(LINE, configuration="beef")), "a certificate of configuration beef"),
        (Converged(replace(LINE, tier="mem")), "a certificate of configuration"),
    ],
)
def test_a_fact_that_can_not_be_is_refused(fact, why):
    pair = Pair().opened()
    pair.run(0, ev.Received(pair.word(Staged(1, E1, "x"))))
    assert why in refusals(pair.run(0, ev.Received(pair.word(fact))))[0]


def test_a_restore_certificate_of_another_round_is_refused():
    pair = Pair().opened()
    held = pair.members[0].restored
    other = Restored(replace(held, round="r9"))
    assert "a restore certificate of generation 1" in refusals(
        pair.run(0, ev.Received(pair.word(other)))
    )[0]  # fmt: skip
    assert pair.run(0, ev.Received(pair.word(Restored(held)))).persist == ()


def test_facts_of_no_member_are_refused_and_of_another_generation_passed_over():
    pair = Pair()
    pair.begin()
    assert refusals(pair.run(0, ev.Received(pair.word(Valid(9, 1, E1))))) == ["a fact of no member"]
    assert refusals(pair.run(0, ev.Received(pair.word(Accepted(9, 1, E1, 0))))) == [
        "a fact of no member"
    ]
    before = pair.members[0].recovery
    pair.run(0, ev.Received(pair.word(Valid(1, 9, E1))))
    assert pair.members[0].recovery == before


def test_nobody_else_speaks_for_a_member():
    """Shows that a member believes its own journal, not what others say that it said."""
    pair = Pair().opened()
    pair.run(0, ev.Received(pair.word(Staged(0, E1, "x"))))
    assert pair.members[0].tallies[0].ballots == ()
    pair.begin(0, generation=2)
    pair.run(1, begin(2, "r2"))
    pair.run(0, ev.Received(pair.word(Bad(0, 2, GENESIS, "x"), Accepted(0, 2, GENESIS, 0))))
    assert pair.members[0].recovery.checks == ()
    assert pair.members[0].recovery.accepted == (None, None)


def test_a_certificate_of_a_peer_is_taken_once_and_only_while_it_leads():
    pair = Pair().opened()
    effects = pair.run(0, ev.Received(pair.word(Converged(LINE))))
    assert effects.persist[0] == Converged(LINE)
    assert effects.apply[0] == ev.Publish(LINE)
    assert pair.run(0, ev.Received(pair.word(Converged(LINE)))).persist == ()
    orphan = replace(LINE, epoch=Epoch(0, 90))
    assert pair.run(0, ev.Received(pair.word(Converged(orphan)))).persist == ()
    pair.begin(0, generation=2)
    pair.begin(1, generation=2)
    higher = Converged(replace(LINE, epoch=E2))
    assert pair.run(0, ev.Received(pair.word(higher))).persist == ()


def test_a_greeting_asks_and_tells():
    pair = Pair().opened()
    (send,) = pair.run(0, ev.Greet(1)).send
    assert send.message.hello
    (reply,) = pair.run(1, ev.Received(send.message)).send
    assert not reply.message.hello
    assert Pair().run(0, ev.Greet(1)).send == ()
