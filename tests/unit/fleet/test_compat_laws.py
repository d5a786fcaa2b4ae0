"""Show that rules mean one thing: read naively, compiled to constraints, judged, and chosen by."""

import random
from itertools import chain, product

from hypothesis import event, given
from hypothesis import settings as profile
from hypothesis import strategies as st

from handfast.core.lattice import violated
from handfast.fleet.compat.choose import Choice, choose
from handfast.fleet.compat.judge import judge
from handfast.fleet.compat.meaning import answer, reads, results
from handfast.fleet.compat.plan import compiled
from handfast.fleet.compat.rules import (
    ABSENT,
    Adjacent,
    Exact,
    Level,
    Matrix,
    Minimum,
    MustProbe,
    Place,
    Probed,
    Rule,
    Rules,
    Scope,
)
from handfast.fleet.compat.versions import sort_key

# Few versions and few facts, so that equal ones and adjacent ones are common. In the last no
# field 2 is, and no list has it.
VERSIONS = ("1.1", "1.2", "1.2.1", "2.1", "3")
FACTS = ("a", "b")
WIDE = (Scope.LINK, Scope.GROUP, Scope.FABRIC, Scope.FLEET)

fact = st.sampled_from(FACTS)
version = st.sampled_from(VERSIONS)
wide = st.sampled_from(WIDE)
releases = st.sampled_from([("1.1", "1.2", "2.1"), ("1", "2"), ("1.2", "2.1")])
scale = (
    st.fixed_dictionaries({"releases": releases}) | st.just({"field": 2}) | st.just({"field": 1})
)
width = st.integers(0, 1)
pairs = st.lists(st.tuples(version | st.just("*"), version), max_size=3).map(tuple)


def rule(scope, body):
    """A rule without a name."""
    modes = st.sampled_from([Level.REFUSE] * 5 + [Level.WARN])
    return st.builds(Rule, st.just(""), st.just("s"), scope, body, modes, st.booleans())


node = st.just(Scope.NODE)
ordered = st.one_of(
    rule(node, st.just(Exact(FACTS))),
    rule(wide, st.builds(Exact, fact.map(lambda f: (f,)), st.booleans())),
    rule(node | wide, st.builds(lambda w, n, s: Adjacent(FACTS, w, never_ahead=n, **s), width,
                                st.booleans(), scale)),
    rule(wide, st.builds(lambda f, w, s: Adjacent((f,), w, **s), fact, width, scale)),
    rule(node, st.builds(Minimum, fact, version)),
    rule(
        node,
        st.builds(
            lambda rows: Minimum("a", None, "b", rows),
            st.dictionaries(version, version, min_size=1, max_size=2),
        ),
    ),
)  # fmt: skip
paired = st.one_of(
    rule(node | wide, st.builds(Matrix, st.just("a"), st.just("b"), pairs, pairs)),
    rule(wide, st.builds(Matrix, fact, fact, pairs, pairs)),
    rule(node | wide, st.builds(MustProbe, st.just("p"), st.sampled_from([("a",), FACTS]))),
    rule(wide, st.builds(MustProbe, st.just("p"), st.just(FACTS), fact.map(lambda f: (f,)))),
)


def named(drawn):
    """Give rules their names."""
    return Rules("f", tuple(
        Rule(f"r{n}", r.source, r.scope, r.body, r.mode, r.require_known)
        for n, r in enumerate(drawn)
    ))  # fmt: skip


few = st.lists(ordered, min_size=1, max_size=3).map(named)
mixed = st.lists(ordered | paired, min_size=2, max_size=5).map(named)
# Rules of which none leaves nothing by itself, so that clashes are of several, and choices split.
TIGHT = [
    Rule("", "s", scope, body)
    for scope, body in (
        (Scope.NODE, Exact(FACTS)),
        (Scope.FLEET, Exact(("a",))),
        (Scope.FLEET, Exact(("b",), absent_differs=True)),
        (Scope.FLEET, Adjacent(FACTS, 0, field=1)),
        (Scope.FLEET, Adjacent(FACTS, 1, releases=("1.1", "1.2", "2.1", "3"), never_ahead=True)),
        (Scope.NODE, Minimum("a", "1.2")),
        (Scope.NODE, Minimum("b", "1.2.1")),
        (Scope.NODE, Minimum("a", None, "b", {"1.2": "1.2.1", "2.1": "2.1"})),
        (Scope.NODE, Matrix("a", "b", (), (("1.2", "1.1"), ("2.1", "2.1")))),
        (Scope.FLEET, Matrix("a", "a", (), (("1.2", "2.1"), ("3", "1")))),
        (Scope.FLEET, Matrix("b", "b", (("1", "1"), ("2.1", "2.1"), ("3", "3")))),
        (Scope.FLEET, MustProbe("p", ("b",))),
    )
]
tight = st.lists(st.sampled_from(TIGHT), min_size=3, max_size=6, unique_by=id).map(named)
more = profile(max_examples=200, deadline=None)
names = st.sampled_from(["x", "xy", "xyz", "xyz"])
two = st.sets(version, min_size=2, max_size=2).map(tuple)
menu = st.one_of(two, two, two, two, version.map(lambda v: (v,)), st.just(()))
long = st.sets(st.sampled_from(VERSIONS[:4]), min_size=2, max_size=3).map(tuple)
tuples = st.tuples(version) | st.tuples(version, version)
probes = st.lists(st.builds(Probed, st.just("p"), tuples, tuples, st.booleans()), max_size=8)


@st.composite
def settings(draw, rules=mixed, menu=menu):
    """Rules, nodes with options, places among them, what was probed, and what nodes have."""
    options = {n: {f: draw(menu) for f in FACTS} for n in draw(names)}
    some = st.lists(st.sampled_from(sorted(options)), unique=True, min_size=1).map(tuple)
    places = [
        Place(scope, f"p{n}", draw(some), draw(some) if scope is Scope.LINK else ())
        for n, scope in enumerate(draw(st.sampled_from([WIDE[:3], WIDE[:3], WIDE[:1] * 2, ()])))
    ]
    nodes = {n: draw(st.dictionaries(fact, version | st.none())) for n in options}
    return draw(rules), options, places, draw(probes), nodes


def instances(rules, nodes, places):
    """Every rule at every pair of nodes that it speaks of, as the rule says."""
    for each in rules.rules:
        if each.scope is Scope.NODE:
            yield from ((each, n, n) for n in nodes)
        elif each.scope is Scope.FLEET:
            yield from ((each, a, b) for a, b in product(nodes, nodes))
        for place in places:
            if place.scope is each.scope:
                ends = product(set(place.nodes), set(place.servers or place.nodes))
                yield from ((each, a, b) for a, b in ends)


def naive(each, first, second, probed):
    """Read one rule at two nodes' values."""
    left, right = reads(each)
    return answer(each, [first.get(f, ABSENT) for f in left],
                  [second.get(f, ABSENT) for f in right], results(probed))  # fmt: skip


def keeps(parts, values, probed):
    """Whether nodes' values keep all of these rules at these pairs."""
    return all(naive(each, values[a], values[b], probed).holds for each, a, b in parts)


def assignments(options):
    """Every way to take one of its options for each node's facts."""
    menus = [(n, f, menu) for n, facts in options.items() for f, menu in facts.items() if menu]
    for taken in product(*(menu for _, _, menu in menus)):
        values = {n: {} for n in options}
        for (n, f, _), value in zip(menus, taken, strict=True):
            values[n][f] = value
        yield values


def refusing(rules):
    """The rules that count for a choice."""
    return Rules("f", tuple(r for r in rules.rules if r.mode is Level.REFUSE))


@more
@given(settings(few))
def test_constraints_accept_what_the_rules_accept(setting):
    """Exactly, for every version that each kind of node could have."""
    rules, options, places, _, _ = setting
    plan = compiled(rules.rules, options, places)
    edges = [*plan.chains, *chain.from_iterable(tie.edges for tie in plan.ties)]
    parts = list(instances(rules, options, places))
    menus = list(plan.menus)
    accepted = 0
    for index in product(*(range(len(menu.options)) for menu in menus)):
        at = {menu.at: i for menu, i in zip(menus, index, strict=True)}
        values = {
            name: {f: menu.options[at[menu.at]] for f, menu in each.menus.items()}
            for each in plan.flocks
            for name in each.names
        }
        kept = keeps(parts, values, ())
        assert (not violated(plan.cuts(at), edges)) == kept
        accepted += kept
    event("accepted: " + ("all" if accepted > 1 else "some" if accepted else "none"))


@more
@given(settings() | settings(tight, long))
def test_a_choice_is_the_greatest_or_none_is_above_it(setting):
    """And there is one exactly where some assignment keeps the rules, node by node."""
    rules, options, places, probed, _ = setting
    parts = list(instances(refusing(rules), options, places))
    read = {f for r in refusing(rules).rules for side in reads(r) for f in side}
    options = {n: {f: m for f, m in menu.items() if f in read} for n, menu in options.items()}
    good = [values for values in assignments(options) if keeps(parts, values, probed)]
    found = choose(rules, options, places=places, probed=probed)
    event(type(found).__name__)
    if not isinstance(found, Choice):
        assert not good
        return
    assert found.values in good

    def above(one, other):
        return all(sort_key(one[n][f]) >= sort_key(other[n][f]) for n in one for f in one[n])

    event(f"greatest: {found.greatest}")
    if found.greatest:
        assert all(above(found.values, other) for other in good)
    assert [other for other in good if above(other, found.values)] == [found.values]


@more
@given(settings(tight, long))
def test_nothing_in_a_clash_can_be_spared(setting):
    """Together its parts leave nothing; without any one of them, something."""
    rules, options, places, probed, _ = setting
    found = choose(rules, options, places=places, probed=probed)
    event(type(found).__name__)
    if isinstance(found, Choice):
        return
    by_name = {r.name: r for r in rules.rules}

    def keepable(parts):
        spread = [
            (by_name[part.rule], a, b)
            for part in parts
            for a, b in (
                zip(part.nodes, part.others, strict=True)
                if by_name[part.rule].scope is Scope.NODE
                else product(part.nodes, part.others)
            )
        ]
        return any(keeps(spread, values, probed) for values in assignments(options))

    event(f"parts: {len(found.parts)}")
    assert not keepable(found.parts)
    for n in range(len(found.parts)):
        assert keepable(found.parts[:n] + found.parts[n + 1 :])


@more
@given(settings() | settings(tight, long), st.randoms(use_true_random=False))
def test_the_order_of_rules_nodes_and_places_changes_nothing(setting, rng: random.Random):
    """Neither what is chosen or clashes, nor what is said."""
    rules, options, places, probed, nodes = setting

    def mixed_up(things):
        things = list(things)
        rng.shuffle(things)
        return things

    other = Rules("f", tuple(mixed_up(rules.rules)))
    turned = [
        Place(p.scope, p.name, tuple(mixed_up(p.nodes)), tuple(mixed_up(p.servers)))
        for p in mixed_up(places)
    ]
    menus = {
        n: {f: mixed_up(options[n][f]) for f in mixed_up(options[n])} for n in mixed_up(options)
    }
    assert choose(rules, options, places=places, probed=probed) == choose(
        other, menus, places=turned, probed=mixed_up(probed)
    )
    shuffled = {n: nodes[n] for n in mixed_up(nodes)}
    assert judge(rules, nodes, places=places, probed=probed) == judge(
        other, shuffled, places=turned, probed=mixed_up(probed)
    )


@more
@given(settings())
def test_what_is_judged_by_distinct_values_is_what_every_pair_says(setting):
    """The same rules are found broken, or not to be told, as by looking at all n^2 pairs."""
    rules, _, places, probed, nodes = setting
    worst = dict.fromkeys((r.name for r in rules.rules), Level.FINE)
    ranks = [Level.FINE, Level.WARN, Level.REFUSE]
    for each, a, b in instances(rules, nodes, places):
        holds = naive(each, nodes[a], nodes[b], probed).holds
        if not holds:
            bad = Level.WARN if holds is None and not each.require_known else each.mode
            worst[each.name] = max(worst[each.name], bad, key=ranks.index)
    found = judge(rules, nodes, places=places, probed=probed)
    said = dict.fromkeys(worst, Level.FINE)
    for ruling in found.rulings:
        said[ruling.rule] = max(said[ruling.rule], ruling.level, key=ranks.index)
    assert said == worst
    assert not set(found.unjudged) & {ruling.rule for ruling in found.rulings}
