"""Shows the lemma of Conv on the real member: what converged is retained until superseded.

Over whole storms, with crashes, overlapping launches and rollbacks: for every certificate that any
journal holds there is an instant from which on its tier retains the epoch, to the end of the trace
or until a higher epoch of that tier has converged.
"""

import pytest
from world import storm

from handfast.core.messages import Converged, Released
from handfast.laws.truth import Truth
from handfast.model.conv import Conv, Snap, retained_from


@pytest.mark.parametrize("seed", range(6))
def test_what_converged_is_retained_until_superseded(seed: int) -> None:
    """Each certificate of a storm, against all that was synced in it."""
    truth = storm(seed).truth()
    found = {record.certificate for _, record in truth.records(Converged)}
    assert found
    for certificate in found:
        assert retained_from(Conv(certificate), truth) is not None


def test_a_storm_shows_what_a_snap_can_not() -> None:
    """Most instants of a storm have no Snap; the certificates stand all the same."""
    truth = storm(1).truth()
    apart = 0
    for at in range(len(truth.journal) + 1):
        try:
            Snap(truth, at)
        except ValueError:
            apart += 1
    assert 0 < apart < len(truth.journal)


def test_a_release_that_nothing_allows_breaks_it() -> None:
    """The lemma is no tautology: where all release what converged last it fails."""
    truth = storm(2).truth()
    newest = max((r.certificate for _, r in truth.records(Converged)), key=lambda c: c.epoch)
    everybody = {w.domain: w for w in truth.journal}
    gone = [type(w)(d, w.incarnation, Released((newest.epoch,))) for d, w in everybody.items()]
    spoilt = Truth(truth.rosters, (*truth.journal, *gone))
    assert retained_from(Conv(newest), spoilt) is None
