"""``handfast fleet``: what runs on a node, and in what the nodes of a fleet differ."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import click
from rich.markup import escape

from handfast.cli.compat import choose, judge
from handfast.cli.console import (
    DAMAGED,
    NO_LOOK,
    Number,
    answer,
    answering,
    as_json,
    out,
    tabulate,
)
from handfast.cli.rehearse import rehearse
from handfast.errors import HandfastError
from handfast.fleet.compat.known import known_facts
from handfast.fleet.compat.options import load_probed
from handfast.fleet.compat.reading import load as load_rules
from handfast.fleet.compat.reading import start as start_rules
from handfast.fleet.compat.rules import Level
from handfast.fleet.gate.ask import ask as ask_node
from handfast.fleet.gate.ask import ask_signed
from handfast.fleet.gate.node import PATH, write_node
from handfast.fleet.gate.node import admit as judge_node
from handfast.fleet.gate.serve import FRESH_S, serve
from handfast.fleet.gate.wire import CHALLENGE, SOCKET
from handfast.fleet.identity import Key, life, load, sign
from handfast.fleet.identity import enroll as make_key
from handfast.fleet.inventory.collect import LIMIT_S, take
from handfast.fleet.inventory.facts import Fact, Inventory, Kind, State, Tier
from handfast.fleet.inventory.host import here
from handfast.fleet.inventory.spelling import labels as as_labels
from handfast.fleet.inventory.spelling import metrics as as_metrics
from handfast.fleet.skew import Skew, TierSkew, read_fleet
from handfast.fleet.skew import skew as compare
from handfast.gate import EXIT
from handfast.link.life import Node, boot_id

__all__ = ["fleet"]

SHOWN = 8  # nodes of a group that are named; --json names all
ON_NODE = [Tier.HOST, Tier.FABRIC]  # the tiers that a node tells its ranks
COLOURS = {State.KNOWN: "", State.ABSENT: "[dim]", State.UNKNOWN: "[yellow]"}


root = click.option(
    "--root", default="/", metavar="DIR", help="Where the machine's files are seen."
)
limit = click.option(
    "--limit",
    type=Number(min=0.1, max=600),
    default=LIMIT_S,
    show_default=True,
    metavar="SECONDS",
    help="When a collector that does not answer is ended.",
)


@click.group()
def fleet() -> None:
    """Say what runs on the nodes of a fleet, and in what they differ.

    All of it only reads, but: `enroll` makes a key, and signing raises its counter; `admit` and
    `node` write below /run/handfast; `rehearse` runs what its file says.
    """


for command in (choose, judge, rehearse):
    fleet.add_command(command)


@fleet.command()
@click.option(
    "--tier",
    "tiers",
    type=click.Choice([str(tier) for tier in Tier]),
    multiple=True,
    help="Of some tiers only: of a node host and fabric, of a rank job.",
)
@root
@limit
@click.option("--state", metavar="DIR", help="Sign as the node enrolled here; begins a life of it.")
@as_json
@click.option("--labels", is_flag=True, help="Write labels for `kubectl label node`.")
@click.option("--metrics", is_flag=True, help="Write metrics for a textfile collector.")
def inventory(
    tiers: tuple[str, ...],
    root: str,
    limit: float,
    state: str | None,
    as_json: bool,
    labels: bool,
    metrics: bool,
) -> None:
    """List what runs on this node, not what is installed on it.

    What nobody can tell is unknown, with the reason; what is known not to be there is absent. Both
    are exit code 0.
    """
    if as_json + labels + metrics > 1:
        raise click.UsageError("--json, --labels, --metrics: one at a time")
    if state is not None and not as_json:
        raise click.UsageError("--state signs what --json writes: give both")
    with answering(as_json), _life(state) as (key, node):
        chosen = [Tier(tier) for tier in tiers] or list(Tier)
        found = take(here(root), tiers=chosen, node=node, limit_s=limit)
        if key is not None:
            answer(sign(key, found))
        elif as_json:
            digests = {tier: found.digest(tier).hex() for tier in chosen}
            answer(found, digests=digests)
        elif labels:
            for name, value in as_labels(found).items():
                click.echo(f"{name}={value}")
        elif metrics:
            click.echo(as_metrics(found), nl=False)
        else:
            _show(found, chosen)


@contextmanager
def _life(state: str | None) -> Iterator[tuple[Key | None, Node | None]]:
    """Be the node that is enrolled in a directory; nobody where none is given."""
    if state is None:
        yield None, None
        return
    key = load(state)
    with life(state, key, boot_id()) as node:
        yield key, node


@fleet.command("node")
@click.option("--at", default=SOCKET, show_default=True, metavar="SOCKET", help="Where it answers.")
@root
@limit
@click.option("--state", metavar="DIR", help="Sign as the node enrolled here; begins a life of it.")
@click.option(
    "--fresh",
    type=Number(min=0, max=3600),
    default=FRESH_S,
    show_default=True,
    metavar="SECONDS",
    help="How long facts count that were just collected.",
)
def serve_node(at: str, root: str, limit: float, state: str | None, fresh: float) -> None:
    """Tell this node's ranks what it runs.

    It answers at a socket, in the foreground, until SIGTERM. Any local user may ask; `ask` shows
    what is answered, and a job's gate asks by itself.
    """
    with answering(as_json=False), _life(state) as (key, node):

        def collect() -> Inventory:
            return take(here(root), tiers=ON_NODE, node=node, limit_s=limit)

        def ready() -> None:
            click.echo(f"handfast node: answers at {at}")

        asyncio.run(serve(at, collect, fresh_s=fresh, key=key, ready=ready))


def _hex(_: click.Context, __: click.Parameter, text: str | None) -> bytes | None:
    """Read a challenge; anything else is wrong usage (exit code 2)."""
    if text is None:
        return None
    if re.fullmatch(f"(?:[0-9a-fA-F]{{2}}){{1,{CHALLENGE}}}", text) is None:
        raise click.BadParameter(
            f"{text[:80]!r} is no challenge: give 2 to {2 * CHALLENGE} hex digits, an even number, "
            "as `openssl rand -hex 32` prints"
        )
    return bytes.fromhex(text)


@fleet.command()
@click.argument("at", default=SOCKET, metavar="[SOCKET]")
@click.option(
    "--challenge", metavar="HEX", callback=_hex, help="Have the node sign its answer over this."
)
@as_json
def ask(at: str, challenge: bytes | None, as_json: bool) -> None:
    """Ask what this node's ranks would be told.

    A challenge has 1 to 64 bytes. That the answer is signed says that the node of that key spoke
    after the challenge was made, and not that the asker is on it.
    """
    if challenge is not None and not as_json:
        raise click.UsageError("--challenge asks for what --json writes: give both")
    with answering(as_json):
        if challenge is not None:
            answer(ask_signed(at, challenge))
        elif as_json:
            answer(ask_node(at))
        else:
            _show(ask_node(at), ON_NODE)


@fleet.command()
@click.argument("directory")
@as_json
def enroll(directory: str, as_json: bool) -> None:
    """Make this node's key in DIRECTORY, once; that key is what the node is from now on.

    Keep DIRECTORY out of disk images: two machines with one key are both refused.
    """
    with answering(as_json):
        key = make_key(directory)
        if as_json:
            answer({"key": key.id})
        else:
            out().print(f"enrolled as {key.id}")


@fleet.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False))
@as_json
def skew(directory: str, as_json: bool) -> None:
    """Compare the inventories in DIRECTORY, a file NODE.json for each node.

    Nodes that differ are no fault (exit code 0). Exit code 1: a key that two inventories name, so
    that neither is counted; 3: a file can't be counted.
    """
    with answering(as_json):
        nodes, unread = read_fleet(directory)
        found = compare(nodes)
        if as_json:
            answer(found, unread=unread, sound=found.sound and not unread)
        else:
            _show_skew(found, unread)
        if not found.sound:
            raise click.exceptions.Exit(DAMAGED)
        if unread or not nodes:
            raise click.exceptions.Exit(NO_LOOK)


@fleet.command()
@root
@click.option("--rules", metavar="FILE", help="The rules; else those that are shipped.")
@click.option(
    "--into", default=PATH, show_default=True, metavar="FILE", help="Where ranks read it."
)
@click.option("--ask", "asked", metavar="SOCKET", help="Ask the node's service; write no file.")
@click.option("--probed", metavar="FILE", help="What was probed, for rules of must-probe.")
@click.option(
    "--enforce", is_flag=True, help="End with 96 where a rule is broken, with 3 on error."
)
def admit(
    root: str, rules: str | None, into: str, asked: str | None, probed: str | None, enforce: bool
) -> None:
    """Judge this node, and leave its host and fabric facts for the gates of its ranks.

    For a Slurm Prolog or an init container. A Prolog that fails drains its node, so the exit code
    is 0 whatever was found, unless --enforce is given.
    """
    try:
        found = ask_node(asked) if asked else take(here(root), tiers=ON_NODE)
        if not asked:
            write_node(into, found)
        read = load_rules(rules, known_facts()) if rules else start_rules()
        tried = load_probed(probed, read) if probed else ()
        verdicts = judge_node(read, found, socket.gethostname(), tried)
    except (HandfastError, OSError) as error:
        click.echo(f"handfast admit: not judged: {error}", err=True)
        raise click.exceptions.Exit(NO_LOOK if enforce else 0) from None
    for ruling in verdicts.rulings:
        click.echo(f"handfast admit: {ruling.level}: {' '.join(ruling.sentence.split())}", err=True)
    if verdicts.level is Level.REFUSE and enforce:
        raise click.exceptions.Exit(EXIT)


def _show(found: Inventory, tiers: list[Tier]) -> None:
    for tier in tiers:
        out().print(f"[bold]{tier}[/] {found.digest(tier).hex()[:16]}")
        facts = [fact for fact in found.facts if fact.tier is tier]
        if facts:
            tabulate(("fact", "value", "", "from"), map(_row, facts), words=range(4))


def _row(fact: Fact) -> tuple[str, ...]:
    colour = COLOURS[fact.state]
    kind = "" if fact.kind is Kind.EXACT else str(fact.kind)
    why = fact.problem or fact.source
    return f"  {fact.name}", f"{colour}{escape(str(fact))}", f"[dim]{kind}", f"[dim]{escape(why)}"


def _show_skew(found: Skew, unread: dict[str, str]) -> None:
    console = out()
    for node, why in unread.items():
        console.print(f"[bold red]not counted[/] {escape(node)}: {escape(why)}")
    for holders in found.refused:
        names = escape(", ".join(holders.nodes))
        why = holders.why or "they may be of one node, which was asked more than once"
        what = f"all name the key {holders.key[:16]}: {escape(why)}"
        console.print(f"[bold red]refused[/] {names}: {what}")
    if not found.nodes:
        console.print("no inventory to compare: a file NODE.json for each node is looked for")
    for tier in found.tiers:
        _show_tier(tier)


def _show_tier(tier: TierSkew) -> None:
    console = out()
    if len(tier.groups) == 1:
        console.print(f"[bold]{tier.tier}[/]: {len(tier.groups[0].nodes)} nodes say the same")
    elif tier.groups:
        sizes = ", ".join(str(len(group.nodes)) for group in tier.groups[:SHOWN])
        more = ", ..." if len(tier.groups) > SHOWN else ""
        console.print(f"[bold]{tier.tier}[/]: {len(tier.groups)} groups, of {sizes}{more} nodes")
    for difference in tier.differences:
        rows = [
            (
                f"  {difference.name}" if at == 0 else "",
                escape(reading.value or reading.state),
                str(len(reading.nodes)),
                escape(_names(reading.nodes)),
            )
            for at, reading in enumerate(difference.readings)
        ]
        tabulate((), rows, words=(0, 1, 3))
    if unknown := sorted({name for group in tier.groups for name in group.unknown}):
        console.print(f"  [yellow]unknown to some:[/] {escape(_names(tuple(unknown)))}")


def _names(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
