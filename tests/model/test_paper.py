"""Shows the paper's claim of its own processes: no instant is a boundary, and what makes it so."""

import pytest

from handfast.model.network import Network
from handfast.model.paper import checkpoint, torn_at
from handfast.model.process import transitions

INSTANTS = range(13)
FIRST = 4  # step, save, begin, durable: before it nothing can be durable anywhere


@pytest.mark.parametrize("domains", [2, 3])
def test_every_instant_from_the_first_durable_epoch_on_is_torn(domains: int) -> None:
    """Whatever number of events one waits for, some run stands at different epochs after it."""
    assert [k for k in INSTANTS if torn_at(domains, k)] == list(range(FIRST, len(INSTANTS)))


def test_one_domain_is_never_torn() -> None:
    """It takes a composition: one domain is at one epoch."""
    assert not any(torn_at(1, k) for k in INSTANTS)


def test_one_event_shared_by_all_would_be_a_boundary() -> None:
    """If all became durable in one event, no instant would be torn: asynchrony is the cause."""
    assert not any(torn_at(3, k, together=True) for k in INSTANTS)


def test_domains_share_nothing_but_what_is_handed_to_them() -> None:
    """The processes are those of the page: a domain may begin while another has not."""
    network = Network(checkpoint(2, 1), {})
    term = network.term()
    for event in ("step.1", "save.1", "begin.1.1", "durable.1.1", "begin.0.1"):
        (term,) = (after for a, after in transitions(term) if a == event)
    assert {a for a, _ in transitions(term)} == {"durable.0.1", "attest.1.1", "crash"}
