"""Show what nodes could run together, and which needs can't be met, at examples."""

from itertools import permutations

import pytest

from handfast.errors import FormatError, Refused
from handfast.fleet.compat import choose as module
from handfast.fleet.compat.choose import Choice, Clash, choose
from handfast.fleet.compat.reading import parse
from handfast.fleet.compat.rules import Place, Probed, Scope

FACTS = "format: 1\nfacts: {driver: driver, fm: FM, cuda: CUDA, ucx: UCX, low: low, high: high}\n"
EQUAL = "  equal: {source: s, scope: node, exact: [driver, fm]}\n"
ONE = "  one: {source: s, scope: fleet, exact: [driver]}\n"
CUDA = (
    "  cuda: {source: s, scope: node, minimum: {fact: driver, by: cuda, versions: {12: 525, 13: "
    "580}}}\n"
)
NEAR = (
    "  near: {source: s, scope: link, adjacent: {facts: [low, high], field: 2, width: 1, "
    "never-ahead: true}}\n"
)
PAIRS = "  pairs: {source: s, scope: group, matrix: {client: ucx, server: ucx, deny: [[1, 2]]}}\n"


def rules(*bodies):
    return parse((FACTS + "rules:\n" + "".join(bodies)).encode(), "compat.yaml")


def test_the_greatest_that_all_can_have():
    """A node without the newest Fabric Manager holds its own driver back, and all drivers."""
    options = {
        "a": {"driver": ["570", "580", "590"], "fm": ["570", "580"]},
        "b": {"driver": ["590", "580", "570"]},
        "c": {"fm": ["1"]},
    }
    assert choose(rules(EQUAL), options) == Choice(
        {
            "a": {"driver": "580", "fm": "580"},
            "b": {"driver": "590"},
            "c": {"fm": "1"},
        },
        greatest=True,
    )
    assert choose(rules(EQUAL, ONE), options) == Choice(
        {
            "a": {"driver": "580", "fm": "580"},
            "b": {"driver": "580"},
            "c": {"fm": "1"},
        },
        greatest=True,
    )


def test_a_client_waits_for_its_server():
    """Patch releases of the one minor version are all the same to the rule: the newest is taken."""
    options = {
        "w": {"low": ["1.33.1", "1.34.0", "1.34.7", "1.35.0"]},
        "v": {"low": ["1.32.9"]},
        "s": {"high": ["1.33.0", "1.34.2"]},
    }
    links = [Place(Scope.LINK, "x", ("w", "v"), ("s",))]
    found = choose(rules(NEAR), options, places=links)
    assert isinstance(found, Choice)
    assert found.greatest
    assert found.values == {
        "w": {"low": "1.33.1"},
        "v": {"low": "1.32.9"},
        "s": {"high": "1.33.0"},
    }
    found = choose(rules(NEAR), {**options, "v": {"low": ["1.33.0"]}}, places=links)
    assert isinstance(found, Choice)
    assert found.values["w"] == {"low": "1.34.7"}


def test_a_clash_names_rules_and_nodes_and_nothing_that_can_be_spared():
    """CUDA 13 wants a driver that no Fabric Manager is there for; others are left out."""
    options = {
        "a": {"driver": ["570", "580"], "fm": ["570"], "cuda": ["13.0"]},
        "b": {"driver": ["570", "580"], "fm": ["580"]},
    }
    found = choose(rules(EQUAL, CUDA, NEAR), options)
    assert isinstance(found, Clash)
    assert [(part.rule, part.nodes) for part in found.parts] == [
        ("cuda", ("a",)),
        ("equal", ("a",)),
    ]
    assert found.sentence == (
        "no versions that are at hand keep all of this: a: driver at least 580 from CUDA 13 on, of "
        "driver 570 or 580 with CUDA 13.0 [rule cuda: s]; a: both equal, of driver 570 or 580 with "
        "FM 570 [rule equal: s]"
    )
    found = choose(
        rules(EQUAL, CUDA, ONE), {**options, "a": {"driver": ["580"]}, "c": {"driver": ["570"]}}
    )
    assert isinstance(found, Clash)
    assert [part.rule for part in found.parts] == ["one"]
    assert {*found.parts[0].nodes, *found.parts[0].others} == {"a", "c"}
    assert found.parts[0].place == "fleet"


def test_a_rule_that_only_warns_holds_nobody_back():
    """It is no reason to run less than could be run."""
    warned = EQUAL.replace("source: s", "source: s, mode: warn")
    options = {"a": {"driver": ["570", "580"], "fm": ["570"]}}
    assert choose(rules(warned, ONE), options) == Choice({"a": {"driver": "580"}}, greatest=True)


def test_a_matrix_lowers_one_side_or_the_other():
    """So there is no greatest, and the choice says so."""
    options = {"a": {"ucx": ["1", "1.5"]}, "b": {"ucx": ["1", "2"]}}
    text = PAIRS.replace("[[1, 2]]", "[[1, 2], [2, 1]]")
    places = [Place(Scope.GROUP, "g", ("a", "b"))]
    found = choose(rules(text), options, places=places)
    assert found == Choice({"a": {"ucx": "1.5"}, "b": {"ucx": "1"}}, greatest=False)
    options["b"] = {"ucx": ["2"]}
    found = choose(rules(text), options, places=places)
    assert isinstance(found, Clash)
    assert len(found.parts) == 1
    assert found.sentence.startswith(
        "no versions that are at hand keep all of this: b with a: a pair that its matrix allows"
    )


def test_two_rules_that_only_together_leave_nothing():
    """A matrix forbids what a minimum asks for; both are named."""
    low = "  low: {source: s, scope: node, minimum: {fact: ucx, version: 2}}\n"
    deny = PAIRS.replace("[[1, 2]]", "[[2, 2]]")
    places = [Place(Scope.GROUP, "g", ("a",))]
    found = choose(rules(deny, low), {"a": {"ucx": ["1", "2"]}}, places=places)
    assert isinstance(found, Clash)
    assert [part.rule for part in found.parts] == ["low", "pairs"]


def test_a_choice_asks_for_what_was_probed():
    """Two versions side by side only with both directions tried; else one version for all."""
    probe = "  tried: {source: s, scope: group, must-probe: {probe: tag, facts: [ucx]}}\n"
    options = {"a": {"ucx": ["1", "2"]}, "b": {"ucx": ["1"]}}
    places = [Place(Scope.GROUP, "g", ("a", "b"))]
    found = choose(rules(probe), options, places=places)
    assert found == Choice({"a": {"ucx": "1"}, "b": {"ucx": "1"}}, greatest=False)
    both = [Probed("tag", pair, pair[::-1], passed=True) for pair in permutations(("1", "2"))]
    tried = [Probed("tag", (p.client[0],), (p.server[0],), passed=True) for p in both]
    found = choose(rules(probe), options, places=places, probed=tried)
    assert found == Choice({"a": {"ucx": "2"}, "b": {"ucx": "1"}}, greatest=True)


def test_what_can_not_be_judged_is_not_chosen():
    """A version outside of a rule's list is passed over, though it may be the newest."""
    listed = (
        "  near: {source: s, scope: fleet, adjacent: {facts: [low], releases: [23.11, 24.05]}}\n"
    )
    found = choose(rules(listed), {"a": {"low": ["23.11.1", "24.05.2", "25.05"]}})
    assert found == Choice({"a": {"low": "24.05.2"}}, greatest=True)
    found = choose(rules(listed), {"a": {"low": ["25.05"]}})
    assert isinstance(found, Clash)
    found = choose(rules(CUDA), {"a": {"driver": ["580", "590-rc1"], "cuda": ["13", "14"]}})
    assert found == Choice({"a": {"driver": "590-rc1", "cuda": "14"}}, greatest=True)
    found = choose(rules(CUDA), {"a": {"driver": ["570", "580-rc1"], "cuda": ["12", "13"]}})
    assert found == Choice({"a": {"driver": "570", "cuda": "12"}}, greatest=True)


def test_a_list_of_releases_orders_what_versions_do_not():
    """Names in their order, patch releases within them by number."""
    listed = (
        "  near: {source: s, scope: fleet, adjacent: {facts: [low], releases: [zed, ada, 3]}}\n"
    )
    options = {"a": {"low": ["ada", "zed", "3.1", "3.2"]}, "b": {"low": ["ada"]}}
    found = choose(rules(listed), options)
    assert found == Choice({"a": {"low": "3.2"}, "b": {"low": "ada"}}, greatest=True)


@pytest.mark.parametrize(
    ("bodies", "options", "match"),
    [
        ([ONE], {"driver": ["1-rc1", "1"]}, "driver of a: '1' and '1-rc1' can't be ordered"),
        ([ONE], {"driver": ["1+a", "1+b"]}, "'1\\+a' and '1\\+b' can't be ordered"),
        ([ONE], {"driver": ["x", "y"]}, "'x' and 'y' can't be ordered"),
        (
            [
                "  n: {source: s, scope: fleet, adjacent: {facts: [driver], releases: [2, 1]}}\n",
                "  m: {source: s, scope: node, minimum: {fact: driver, version: 1.5}}\n",
            ],
            {"driver": ["1", "2"]},
            "rule m: it orders 2, 1 of driver in another way",
        ),
        (
            [
                "  n: {source: s, scope: fleet, adjacent: {facts: [driver], releases: [2, 1]}}\n",
                EQUAL,
            ],
            {"driver": ["1", "2"], "fm": ["1", "2"]},
            "rule equal: it orders 2, 1 of driver in another way",
        ),
        (
            [
                "  n: {source: s, scope: fleet, adjacent: {facts: [driver], releases: [2, 1]}}\n",
                "  o: {source: s, scope: fleet, adjacent: {facts: [driver], field: 1}}\n",
            ],
            {"driver": ["1", "2"]},
            "rule o: it orders 2, 1 of driver in another way",
        ),
    ],
)
def test_without_an_order_there_is_no_greatest(bodies, options, match):
    """It is said, with the ways out, and not guessed."""
    with pytest.raises(FormatError, match=match) as caught:
        choose(rules(*bodies), {"a": options})
    assert "What to do: " in str(caught.value)


def test_a_place_with_a_node_that_has_no_options_is_an_error():
    """To leave it out in silence would choose for somebody else's fleet."""
    with pytest.raises(ValueError, match="link x has the node c, which is not among those"):
        choose(rules(NEAR), {"a": {}}, places=[Place(Scope.LINK, "x", ("a",), ("c",))])


def test_a_pattern_is_chosen_for_fact_by_fact():
    """Each fact that fits is one for all; one that nobody has options for is nothing to choose."""
    text = "  lib: {source: s, scope: fleet, exact: [lib.*]}\n".replace("lib.*", "lib.*, driver")
    facts = FACTS.replace("{driver", "{lib.*: library, driver")
    read = parse(f"{facts}rules:\n{text}".encode(), "compat.yaml")
    options = {
        "a": {"lib.x": ["1", "2"], "lib.y": ["7", "8"], "driver": ["570", "580"]},
        "b": {"lib.x": ["2", "3"], "lib.y": ["6", "7"], "driver": ["570"]},
    }
    same = {"driver": "570", "lib.x": "2", "lib.y": "7"}
    assert choose(read, options) == Choice({"a": same, "b": same}, greatest=True)
    found = choose(read, {"a": {"lib.x": ["1"]}, "b": {"lib.x": ["2"]}})
    assert isinstance(found, Clash)
    assert [part.sentence for part in found.parts] == [
        "b with a: one lib.x for all, of lib.x 2 with lib.x 1 [rule lib: s]"
    ]
    assert choose(read, {"a": {"low": ["1"]}}) == Choice({"a": {}}, greatest=True)


def test_a_search_that_grows_too_long_says_so(monkeypatch):
    """Which versions go together is a hard question in general; an answer in a year is none."""
    monkeypatch.setattr(module, "TRIES", 3)
    text = PAIRS.replace("[[1, 2]]", "[['*', '*']]")
    options = {name: {"ucx": [str(n) for n in range(9)]} for name in "abcd"}
    with pytest.raises(Refused, match=r"more than 3 ways.*What to do: give the nodes fewer"):
        choose(rules(text), options, places=[Place(Scope.GROUP, "g", tuple("abcd"))])


def test_ten_thousand_nodes_with_one_menu_are_chosen_for_at_once():
    """Nodes that could have the same are one kind: the plan has two, and few constraints."""
    menu = {"driver": ["570", "580", "590"], "fm": ["570", "580", "590"], "cuda": ["12.8"]}
    options = {f"n{n}": menu for n in range(10_000)} | {"old": {"driver": ["570", "580"]}}
    found = choose(rules(EQUAL, ONE, CUDA), options)
    assert isinstance(found, Choice)
    assert found.greatest
    assert {tuple(sorted(values.items())) for values in found.values.values()} == {
        (("cuda", "12.8"), ("driver", "580"), ("fm", "580")),
        (("driver", "580"),),
    }
