"""Show the lattice as one member sees it: who is how far, and who is awaited, by name."""

from test_member import E1, E2, Pair, begin

from handfast.core import events as ev
from handfast.core.lattice import Epoch
from handfast.core.link import Edge
from handfast.core.member import boot
from handfast.core.messages import Lost
from handfast.core.view import Lattice, left_behind, view


def test_a_member_that_has_not_begun_shows_nothing():
    assert view(boot("a", 1, [])) == Lattice({})


def test_a_recovery_names_who_has_not_come():
    pair = Pair()
    pair.begin(0)
    shown = view(pair.members[0])
    assert (shown.phase, shown.blocked_by, shown.generation) == ("freezing", ("b",), 1)
    assert shown.skew == 0


def test_a_save_that_waits_for_a_peer_names_it():
    pair = Pair().opened()
    pair.run(0, ev.Captured(E1))
    shown = view(pair.members[0])
    assert (shown.domains["a"].staged, shown.domains["a"].persisted) == (E1, Epoch(0, 0))
    pair.run(0, ev.Persisted(E1, "x"))
    shown = view(pair.members[0])
    assert (shown.phase, shown.blocked_by, shown.skew) == ("converging", ("b",), 10)
    assert shown.domains["a"].edge is Edge.NONE
    assert shown.domains["b"].edge is Edge.OFFERED


def test_an_edge_shows_how_far_two_have_come():
    pair = Pair().opened()
    pair.run(0, ev.Captured(E1))
    pair.run(0, ev.Persisted(E1, "x"))
    pair.deliver()
    pair.run(1, ev.Tick())
    pair.deliver()
    assert view(pair.members[0]).domains["b"].edge is Edge.ECHOED
    assert view(pair.members[1]).domains["a"].edge is Edge.NONE


def test_a_skip_blocks_nobody():
    pair = Pair().opened()
    for at in (0, 1):
        pair.run(at, ev.Captured(E1))
    pair.run(0, ev.Persisted(E1, "x"))
    pair.run(1, ev.Failed(E1, "full"))
    pair.deliver()
    shown = view(pair.members[0])
    assert (shown.phase, shown.blocked_by) == ("converged", ())
    assert shown.domains["b"].edge is Edge.VOID


def test_what_converged_is_certified_here_and_there():
    pair = Pair().opened()
    pair.save(E1)
    shown = view(pair.members[0])
    assert (shown.converged, shown.phase, shown.skew) == (E1, "converged", 0)
    assert shown.domains["a"].certified == shown.domains["b"].certified == E1


def test_a_member_between_two_configurations_is_idle():
    pair = Pair()
    pair.begin()
    pair.members[0] = boot("a", 1, pair.journals[0][:1])
    assert view(pair.members[0]).phase == "idle"


# --- what a recovery steps below


def parted(told: list, *, want: int | None = None, lost: tuple[Lost, ...] = ()) -> Pair:
    """Two epochs converged; then a starts from what is left of its journal, and b as it was."""
    pair = Pair().opened()
    pair.save(E1)
    pair.save(E2)
    left = [r for r in pair.journals[0] if r not in told]
    pair.members[0] = boot("a", 2, left, lost)
    pair.members[1] = boot("b", 2, pair.journals[1])
    for at in (0, 1):
        pair.run(at, begin(2, "r2", want=want))
    pair.deliver()
    return pair


def test_a_copy_that_is_gone_is_left_behind_with_its_reason():
    pair = parted([], lost=(Lost(E2, "its manifest is missing"),))
    for member in pair.members:
        assert left_behind(member, E1) == ("1/20 had converged (a: its manifest is missing)",)
        assert left_behind(member, E2) == ()


def test_a_disk_that_was_put_back_is_left_behind_by_name():
    whole = Pair().opened()
    whole.save(E1)
    before = list(whole.journals[0])
    whole.save(E2)
    pair = parted(whole.journals[0][len(before) :])
    assert [copy.epoch for copy in pair.members[0].retained][-1:] == [E1]
    assert left_behind(pair.members[1], E1) == ("1/20 had converged (a: has no copy)",)


def test_a_copy_whose_bytes_are_bad_is_left_behind_with_what_was_found():
    pair = parted([])
    pair.run(0, ev.Checked(2, E2, "chunk 3 differs from its hash"))
    pair.run(1, ev.Checked(2, E2))
    pair.deliver()
    said = ("1/20 had converged (a: chunk 3 differs from its hash)",)
    assert [left_behind(member, E1) for member in pair.members] == [said, said]


def test_what_was_asked_for_leaves_nothing_behind():
    pair = parted([], want=10)
    assert left_behind(pair.members[0], E1) == ()


def test_without_a_recovery_nothing_is_left_behind():
    assert left_behind(boot("a", 1, []), E1) == ()
    pair = Pair()
    assert left_behind(pair.opened().members[0], E1) == ()
