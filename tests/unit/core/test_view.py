"""Show the lattice as one member sees it: who is how far, and who is awaited, by name."""

from test_member import Pair

from handfast.core import events as ev
from handfast.core.lattice import Epoch
from handfast.core.link import Edge
from handfast.core.member import boot
from handfast.core.view import Lattice, view

E1 = Epoch(1, 10)


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
