"""What no rule, and no two of them together, can have meant: found before any node is judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

from handfast.fleet.compat.rules import (
    Adjacent,
    Body,
    Exact,
    Matrix,
    Minimum,
    MustProbe,
    Rule,
    Scope,
)
from handfast.fleet.compat.versions import compare, read, within

__all__ = ["alone", "together"]


def alone(rule: Rule) -> str:
    """What is wrong with a rule, and what to do; empty where nothing is."""
    body, node = rule.body, rule.scope is Scope.NODE
    if isinstance(body, Exact):
        return _exact(body, node)
    if isinstance(body, Adjacent):
        return _adjacent(body, rule.scope)
    if isinstance(body, Minimum):
        return _minimum(body, node)
    if isinstance(body, Matrix):
        return _matrix(body, node)
    return _probe(body, node)


def together(rules: Sequence[Rule]) -> Iterator[tuple[str, str]]:
    """Find rules that contradict each other: a rule's name, what is wrong, and what to do."""
    for one, other in combinations(rules, 2):
        if what := _orders(one.body, other.body):
            yield other.name, f"{what} in rule {one.name}. What to do: settle one order"
        for low, high in ((one, other), (other, one)):
            if what := _out_of_reach(low.body, high.body):
                yield high.name, f"{what} rule {low.name} needs. What to do: correct one of them"


def _exact(body: Exact, node: bool) -> str:
    if len(set(body.facts)) < len(body.facts):
        return "it names a fact twice. What to do: name each once"
    if node and len(body.facts) < 2:
        return "on one node a fact equals itself. What to do: name two, or give a wider scope"
    wild = any(fact.endswith("*") for fact in body.facts)
    if node and wild:
        return (
            "on one node a pattern does not say which facts equal which. What to do: name the "
            "facts, or give a wider scope"
        )
    if not node and not wild and len(body.facts) > 1:
        return (
            "over several nodes it would not say which facts equal which. What to do: write a "
            "rule for each fact, or a pattern (env.NCCL_*) that they fit"
        )
    if node and body.absent_differs:
        return "absent-differs is for rules over several nodes. What to do: take it out"
    return ""


def _adjacent(body: Adjacent, scope: Scope) -> str:
    if (body.field is None) == (not body.releases):
        return "it needs either a field or a list of releases. What to do: give one of the two"
    if len(body.facts) == 1 and scope is Scope.NODE:
        return "on one node it needs two facts. What to do: name both, or give a wider scope"
    if len(set(body.facts)) < len(body.facts):
        return "it names a fact twice. What to do: name it once; that stands for both sides"
    if body.never_ahead and len(body.facts) == 1 and scope is not Scope.LINK:
        return (
            "each node would have to be behind each other one. What to do: name two facts, give "
            "the scope link, or take never-ahead out"
        )
    for one, other in combinations(body.releases, 2):
        if within(one, other) or within(other, one):
            return f"the releases {one} and {other} overlap. What to do: keep one of them"
    return ""


def _minimum(body: Minimum, node: bool) -> str:
    if not node:
        return "a minimum is each node's own. What to do: give it the scope node"
    if (body.version is None) == (body.by is None) or bool(body.versions) != bool(body.by):
        return "it needs either a version, or by and versions. What to do: give one of the two"
    if body.by == body.fact:
        return "it measures a fact by itself. What to do: name another fact under by"
    for text in (body.version or "0", *body.versions, *body.versions.values()):
        if read(text) is None:
            return f"{text!r} can't be ordered. What to do: give numbers between dots"
    for one, other in combinations(body.versions, 2):
        if compare(one, other) in (None, 0):
            return f"{one} and {other} can't be ordered. What to do: keep one of them"
    return ""


def _matrix(body: Matrix, node: bool) -> str:
    pairs = [*body.allow, *body.deny]
    if not pairs:
        return "it has no pair. What to do: list pairs under allow or deny"
    if node and body.client == body.server:
        return "on one node it needs two facts. What to do: name both, or give a wider scope"
    for one, other in combinations(pairs, 2):
        if one == other:
            both = one in body.allow and one in body.deny
            what = "is both allowed and denied" if both else "stands twice"
            return f"[{', '.join(one)}] {what}. What to do: keep it in one place"
    return ""


def _probe(body: MustProbe, node: bool) -> str:
    if len(set(body.facts)) < len(body.facts):
        return "it names a fact twice. What to do: name each once"
    if body.about and node:
        return "on one node nothing differs. What to do: take about out, or give a wider scope"
    if lost := sorted(set(body.about) - set(body.facts)):
        return f"it is about {lost[0]}, which is none of its facts. What to do: name it there, too"
    return ""


def _orders(one: Body, other: Body) -> str:
    """Whether two lists of releases of a fact have two of them in opposite orders."""
    if not (isinstance(one, Adjacent) and isinstance(other, Adjacent)):
        return ""
    if not set(one.facts) & set(other.facts):
        return ""
    common = [release for release in one.releases if release in other.releases]
    for a, b in combinations(common, 2):
        if other.releases.index(a) > other.releases.index(b):
            return f"it has release {b} before {a}, which is the other way round"
    return ""


def _out_of_reach(low: Body, listed: Body) -> str:
    """Whether every release that a rule lists of a fact is below what another needs at least."""
    if not isinstance(low, Minimum) or low.version is None:
        return ""
    names: tuple[str, ...] = ()
    if isinstance(listed, Adjacent) and low.fact in listed.facts:
        names = listed.releases
    elif isinstance(listed, Matrix) and low.fact in (listed.client, listed.server):
        side = 0 if low.fact == listed.client else 1
        names = () if listed.deny else tuple(pair[side] for pair in listed.allow)
    below = [
        name for name in names if compare(name, low.version) == -1 and not within(low.version, name)
    ]
    if names and len(below) == len(names):
        return f"every release of {low.fact} that it lists is below the {low.version} that"
    return ""
