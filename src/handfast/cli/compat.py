"""``handfast fleet judge`` and ``choose``: what the rules of compatibility say of a whole fleet."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from itertools import chain

import click
import msgspec
from rich.markup import escape

from handfast.cli.console import DAMAGED, NO_LOOK, answer, answering, as_json, out, tabulate
from handfast.errors import FormatError
from handfast.fleet.compat.choose import Choice, Clash
from handfast.fleet.compat.choose import choose as find
from handfast.fleet.compat.judge import Verdicts, natural
from handfast.fleet.compat.judge import judge as hold
from handfast.fleet.compat.known import known_facts
from handfast.fleet.compat.meaning import expanded, reads
from handfast.fleet.compat.options import Asked, load_probed
from handfast.fleet.compat.options import load as load_options
from handfast.fleet.compat.plan import ordered
from handfast.fleet.compat.reading import load, start
from handfast.fleet.compat.rules import ABSENT, Level, Place, Probed, Rules, Scope
from handfast.fleet.inventory.facts import Fact, Inventory, State, look
from handfast.fleet.inventory.facts import Kind as Compared
from handfast.fleet.skew import read_fleet, skew

__all__ = ["choose", "judge"]

SHOWN = 8  # names of nodes, and sentences of one rule; --json has all
IN_SENTENCE = 4  # nodes that a sentence names
PLACES = (Scope.GROUP, Scope.LINK, Scope.FABRIC)
COLOURS = {Level.REFUSE: "[bold red]", Level.WARN: "[yellow]"}


class Chosen(msgspec.Struct, frozen=True):
    """What was chosen for a fact; ``now`` and ``move`` are empty where nothing is said of today."""

    fact: str
    now: str
    to: str
    move: str


class Kind(msgspec.Struct, frozen=True):
    """Nodes whose versions are the same, today and chosen."""

    nodes: tuple[str, ...]
    facts: tuple[Chosen, ...]


with_rules = click.option("--rules", metavar="FILE", help="The rules; else those that are shipped.")
with_probed = click.option(
    "--probed", metavar="FILE", help="What was probed, a JSON object a line; else nothing was."
)
with_places = click.option(
    "--place",
    "spelled",
    multiple=True,
    metavar="SCOPE:NAME=NODES",
    help="A group, link or fabric: group:decode=b*,c-17. Else all nodes are one of each.",
)


@click.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False))
@with_rules
@with_probed
@with_places
@as_json
def judge(
    directory: str, rules: str | None, probed: str | None, spelled: tuple[str, ...], as_json: bool
) -> None:
    """Say which rules the nodes of a fleet break, by the inventories in DIRECTORY.

    A file NODE.json for each node. Exit code 1: a rule that refuses is broken; 3: a file can't be
    counted, or there is none. Warnings are exit code 0.
    """
    with answering(as_json):
        read, results = _read(rules, probed)
        nodes, unread = read_fleet(directory)
        for holders in skew(nodes).refused:
            unread |= dict.fromkeys(holders.nodes, f"it and others name the key {holders.key[:16]}")
        counted = {name: nodes[name] for name in nodes if name not in unread}
        places = _places(spelled, counted)
        every = expanded(read, _exact(counted.values()))
        found = hold(every, _told(every, counted), places=places, probed=results)
        if as_json:
            answer(found, level=found.level, unread=unread, rules=read.name)
        else:
            _show(found, unread, {place.name: len(place.nodes) for place in places}, read)
        if found.level is Level.REFUSE:
            raise click.exceptions.Exit(DAMAGED)
        if unread or not counted:
            raise click.exceptions.Exit(NO_LOOK)


@click.command()
@click.argument("options", type=click.Path(exists=True, dir_okay=False))
@with_rules
@with_probed
@with_places
@as_json
def choose(
    options: str, rules: str | None, probed: str | None, spelled: tuple[str, ...], as_json: bool
) -> None:
    """Find the greatest versions that all nodes could run together, or why there are none.

    OPTIONS is a file that says what each node could have. Exit code 1: these needs can't be met
    together, or there are too many ways to look through.
    """
    with answering(as_json):
        read, results = _read(rules, probed)
        asked = load_options(options, read)
        places = _places(spelled, asked.options)
        found = find(read, asked.options, places=places, probed=results)
        if isinstance(found, Clash):
            _show_clash(found, as_json)
            raise click.exceptions.Exit(DAMAGED)
        kinds = _kinds(read, asked, found)
        if as_json:
            answer({"rules": read.name, "greatest": found.greatest, "kinds": kinds})
        else:
            _show_choice(read, found, kinds)


def _read(rules: str | None, probed: str | None) -> tuple[Rules, tuple[Probed, ...]]:
    read = load(rules, known_facts()) if rules else start()
    return read, load_probed(probed, read) if probed else ()


def _places(spelled: Iterable[str], nodes: Iterable[str]) -> list[Place]:
    """Read places; of a scope that none was given of, all nodes are one. Raises UsageError."""
    names = tuple(nodes)
    found = []
    for text in spelled:
        scope, _, rest = text.partition(":")
        name, _, patterns = rest.partition("=")
        if scope not in PLACES:
            what = f"{scope!r} is no scope that has places: it is one of {', '.join(PLACES)}"
            raise click.UsageError(f"--place {text}: {what}, as in group:decode=b*,c-17")
        if not name or not patterns:
            raise click.UsageError(f"--place {text}: write group:decode=b*,c-17")
        inside = [n for n in names if any(fnmatchcase(n, each) for each in patterns.split(","))]
        if not inside:
            raise click.UsageError(f"--place {text}: no node has such a name")
        found.append(Place(Scope(scope), name, tuple(inside)))
    given = {place.scope for place in found}
    return found + [Place(scope, "fleet", names) for scope in PLACES if scope not in given]


def _told(rules: Rules, nodes: Mapping[str, Inventory]) -> dict[str, dict[str, str | None]]:
    """Give what nodes say of the rules' facts.

    What one inventory lists, or its family, and another does not is unknown there; what none lists
    is not judged.
    """
    facts = sorted({fact for rule in rules.rules for fact in chain(*reads(rule))})
    seen = {}
    for name, inventory in nodes.items():
        have = {fact.name: fact for fact in inventory.facts}
        seen[name] = {fact: look(have, fact) for fact in facts}
    listed = {fact for has in seen.values() for fact, found in has.items() if found is not None}
    return {name: {fact: _value(has[fact]) for fact in listed} for name, has in seen.items()}


def _exact(nodes: Iterable[Inventory]) -> set[str]:
    """Name the facts that have to be equal, which patterns stand for."""
    facts = chain.from_iterable(inventory.facts for inventory in nodes)
    return {fact.name for fact in facts if fact.kind is Compared.EXACT}


def _value(fact: Fact | None) -> str | None:
    if fact is None:
        return None
    return ABSENT if fact.state is State.ABSENT else fact.value


def _kinds(rules: Rules, asked: Asked, found: Choice) -> list[Kind]:
    """Put nodes together whose versions are the same, today and chosen."""
    alike: dict[tuple[Chosen, ...], list[str]] = defaultdict(list)
    move = lru_cache(partial(_move, rules))
    for node in natural(found.values):
        now = asked.now[node]
        facts = [(fact, now.get(fact, ""), to) for fact, to in found.values[node].items()]
        alike[tuple(Chosen(*each, move(*each)) for each in facts)].append(node)
    return [Kind(tuple(nodes), facts) for facts, nodes in alike.items()]


def _move(rules: Rules, fact: str, now: str, to: str) -> str:
    """Say whether a version is raised, lowered or, where nobody can tell, changed."""
    if now in ("", to):
        return ""
    try:
        return "raised" if ordered(rules.rules, fact, {now, to}, ("it",))[-1] == to else "lowered"
    except FormatError:
        return "changed"


def _show(
    found: Verdicts, unread: Mapping[str, str], sizes: Mapping[str, int], rules: Rules
) -> None:
    console = out()
    for node, why in unread.items():
        console.print(f"[bold red]not counted[/] {escape(node)}: {escape(why)}")
    if not found.nodes:
        console.print("no inventory to judge: a file NODE.json for each node is looked for")
    said: Counter[str] = Counter()
    for each in found.rulings:
        said[each.rule] += 1
        if said[each.rule] <= SHOWN:
            told = escape(" ".join(each.sentence.split()))
            console.print(f"{COLOURS[each.level]}{each.level}[/]: {told}")
            if IN_SENTENCE < len(each.nodes) < sizes.get(each.place, found.nodes):
                console.print(f"  {len(each.nodes):,} nodes: {escape(_names(each.nodes))}")
    for rule, times in said.items():
        if times > SHOWN:
            console.print(f"  and {times - SHOWN:,} sentences more of rule {rule}: see --json")
    if found.unjudged:
        console.print(f"[dim]nothing to judge: {', '.join(found.unjudged)}[/]")
    counts = Counter(each.level for each in found.rulings)
    console.print(
        f"{found.nodes:,} nodes, {found.distinct:,} kinds of them, {len(rules.rules)} rules of "
        f"{escape(rules.name)}: {counts[Level.REFUSE]:,} refused, {counts[Level.WARN]:,} warnings"
    )


def _show_clash(found: Clash, as_json: bool) -> None:
    if as_json:
        answer(found)
        return
    out().print("[bold red]no choice[/] keeps all of these; without any one of them there is one:")
    for part in found.parts:
        out().print(f"  {escape(part.sentence)}")


def _show_choice(rules: Rules, found: Choice, kinds: Iterable[Kind]) -> None:
    console = out()
    if found.greatest:
        console.print("[bold]the greatest choice[/]: no other has any version higher")
    else:
        console.print("[bold]a choice[/]: another with a version higher has another one lower")
    for kind in kinds:
        console.print(escape(_names(kind.nodes)))
        rows = [
            (f"  {escape(rules.word(f.fact))}", escape(f.fact), escape(f.now), escape(f.to), f.move)
            for f in kind.facts
        ]
        tabulate(("", "fact", "now", "choice", ""), rows, words=range(5))


def _names(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
