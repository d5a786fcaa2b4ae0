"""Show the edge between two members: it only moves forward, and the order of news is all one."""

import itertools

import pytest

from handfast.core.link import TRANSITIONS, Edge, Heard, advance, edge

NEWS = {"offered": Heard.OFFER, "theirs": Heard.THEIRS, "echoed": Heard.ECHO}


@pytest.mark.parametrize(
    ("facts", "state"),
    [
        ((), Edge.NONE),
        (("theirs",), Edge.NONE),
        (("offered",), Edge.OFFERED),
        (("offered", "theirs"), Edge.HEARD),
        (("offered", "echoed"), Edge.ECHOED),
        (("offered", "theirs", "echoed"), Edge.REFLECTED),
        (("skipped",), Edge.VOID),
        (("offered", "theirs", "echoed", "skipped"), Edge.VOID),
    ],
)
def test_an_edge_is_a_function_of_the_facts(facts, state):
    names = ("offered", "theirs", "echoed", "skipped")
    assert edge(**{name: name in facts for name in names}) is state


@pytest.mark.parametrize("order", [(Heard.THEIRS, Heard.ECHO), (Heard.ECHO, Heard.THEIRS)])
def test_after_the_offer_the_order_of_news_does_not_matter(order):
    state = Edge.OFFERED
    for heard in (*order, *order):
        state = advance(state, heard)
    assert state is Edge.REFLECTED


def test_no_edge_ever_moves_back():
    rank = {state: i for i, state in enumerate(Edge)}
    for (state, _), after in TRANSITIONS.items():
        assert rank[after] > rank[state]
    for state, heard in itertools.product(Edge, Heard):
        assert advance(advance(state, heard), heard) is advance(state, heard)
