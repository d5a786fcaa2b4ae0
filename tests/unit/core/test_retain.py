"""Show what may be released: what the protocol allows first, then what the user pays for."""

import pytest

from handfast.core.lattice import GENESIS, Epoch
from handfast.core.messages import Branch, Copy
from handfast.core.retain import Keep, releasable

TIMELINE = (Branch(1, GENESIS),)


def steps(*numbers: int) -> list[Epoch]:
    return [Epoch(1, n) for n in numbers]


NEWEST = Keep(1)


def gone(held, *, line, keep=NEWEST, timeline=TIMELINE, torn=(), pinned=(), void=(), doubted=()):
    copies = [Copy(epoch, "x") for epoch in held]
    known = [epoch for epoch in held if epoch not in torn]
    return list(
        releasable(
            copies, line=line, timeline=timeline, converged=known, keep=keep, pinned=pinned,
            void=void, doubted=doubted,
        )
    )  # fmt: skip


def test_nothing_goes_before_anything_converged():
    """Shows that keep-last-k alone never deletes: two domains could keep different ones."""
    assert gone([GENESIS, *steps(10, 20, 30)], line=None) == []
    assert gone(steps(10, 20, 30), line=None, void=steps(20)) == []


def test_what_lies_below_the_line_goes_but_the_newest():
    held = [GENESIS, *steps(10, 20, 30, 40)]
    assert gone(held, line=Epoch(1, 30)) == [GENESIS, *steps(10, 20)]
    assert gone(held, line=Epoch(1, 30), keep=Keep(2)) == [GENESIS, *steps(10)]
    assert gone(held, line=Epoch(1, 30), keep=Keep(9)) == [GENESIS]
    assert gone(held, line=GENESIS) == []


def test_what_never_converged_is_not_kept_in_the_place_of_what_did():
    """Shows that a torn save costs nobody history: it stays beside the newest, not for one."""
    held, line = steps(10, 20, 30, 40), Epoch(1, 40)
    assert gone(held, line=line, keep=Keep(2), torn=steps(30)) == steps(10)
    assert gone(held, line=line, keep=Keep(3), torn=steps(30)) == []
    assert gone(held, line=line, keep=Keep(2), torn=steps(10)) == steps(10, 20)
    assert gone(held, line=line, torn=steps(10, 20, 30)) == steps(10, 20, 30)


def test_every_nth_step_is_kept():
    assert gone(steps(10, 20, 30, 40, 50), line=Epoch(1, 50), keep=Keep(1, every=20)) == steps(
        10, 30
    )


def test_a_line_that_is_not_held_here_releases_nothing():
    """Shows that another domain's copy is no licence to delete one's own (S8)."""
    assert gone(steps(10, 20), line=Epoch(1, 30)) == []
    assert gone(steps(10, 20, 30), line=Epoch(1, 30), doubted=steps(30)) == []


def test_a_damaged_copy_is_not_worth_keeping():
    assert gone(steps(10, 20, 30), line=Epoch(1, 30), keep=Keep(2), doubted=steps(20)) == steps(20)


def test_orphans_go_once_the_line_has_passed_them():
    """Shows that an abandoned timeline is kept until the new one has converged above it."""
    timeline = (Branch(2, Epoch(1, 10)), Branch(1, GENESIS))
    held = [*steps(10, 20, 30), Epoch(2, 20)]
    assert gone(held, line=Epoch(1, 10), timeline=timeline) == []
    assert gone(held, line=Epoch(2, 20), timeline=timeline, keep=Keep(2)) == steps(20, 30)


def test_what_a_reader_holds_stays():
    assert gone(steps(10, 20, 30), line=Epoch(1, 30), pinned=steps(10)) == steps(20)
    assert gone(steps(10, 20), line=Epoch(1, 10), pinned=steps(20), void=steps(20)) == []


def test_a_void_epoch_goes_at_once():
    """Shows that one full disk does not fill all the others (L6)."""
    assert gone(steps(10, 20, 30), line=Epoch(1, 10), void=steps(20)) == steps(20)
    assert gone(steps(20, 30), line=Epoch(1, 10), void=steps(20)) == steps(20)


@pytest.mark.parametrize("wrong", [{"newest": 0}, {"every": 0}, {"newest": -1, "every": 3}])
def test_keeping_nothing_is_refused(wrong):
    with pytest.raises(ValueError, match="an epoch must stay"):
        Keep(**wrong)
