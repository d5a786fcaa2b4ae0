"""What the tests of the inventory share: recorded machines, made out of one text file each."""

from __future__ import annotations

import shutil
from pathlib import Path

from handfast.fleet.inventory.collect import take
from handfast.fleet.inventory.facts import ALL, Fact, Inventory, Kind, Tier, Want, gather
from handfast.fleet.inventory.host import Host

TREES = Path(__file__).parent / "trees"
RECORDED = sorted(path.stem for path in TREES.glob("*.tree"))


def machine(name: str, root: Path) -> Host:
    """Unpack a recorded machine into a directory.

    After `=== ` stands what comes: a path and below it the file's text; `PATH -> TARGET`, a link;
    `PATH/`, an empty directory; `N PATH`, N files whose path has the number; `$ COMMAND` and its
    output; `< FILE`, all of another machine first; `- PATH`, which is not there on this one.
    """
    commands: dict[str, str] = {}
    root.mkdir(exist_ok=True)
    _unpack(name, root, commands)
    return Host(root=str(root), commands=commands)


def _unpack(name: str, root: Path, commands: dict[str, str]) -> None:
    _, *parts = f"\n{(TREES / f'{name}.tree').read_text()}".split("\n=== ")
    for part in parts:
        head, _, text = part.partition("\n")
        if head.startswith("< "):
            _unpack(head[2:].removesuffix(".tree"), root, commands)
        elif head.startswith("$ "):
            commands[head[2:]] = text.strip()
        elif head.startswith("- "):
            shutil.rmtree(f"{root}{head[2:]}")
        elif " -> " in head:
            link, _, target = head.partition(" -> ")
            path = Path(f"{root}{link}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            path.symlink_to(target)
        elif head.endswith("/"):
            Path(f"{root}{head}").mkdir(parents=True)
        else:
            _write(head, text, root)


def _write(head: str, text: str, root: Path) -> None:
    count, _, path = head.rpartition(" ")
    for number in range(int(count or 1)):
        file = Path(f"{root}{path % number if count else path}")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.removesuffix("\n") + "\n")


def told(name: str, root: Path, *tiers: Tier) -> Inventory:
    """Take the inventory of a recorded machine."""
    return take(machine(name, root), tiers=tiers or ALL)


def fact(name: str, value: str, tier: Tier = Tier.HOST, kind: Kind = Kind.EXACT) -> Fact:
    """A fact with a value."""
    return Want(name, tier, kind).known(value, "a test")


def inventory(**values: str | None) -> Inventory:
    """An inventory of host facts; None is one that nobody can tell."""
    wants = {Want(name, Tier.HOST): value for name, value in values.items()}
    return gather(
        want.unknown("a test") if value is None else want.known(value, "a test")
        for want, value in wants.items()
    )
