"""What the tests of the gate share: fleets out of one text file each, and rounds in memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from handfast.fleet.compat.reading import load, start
from handfast.fleet.compat.rules import Rules
from handfast.fleet.gate.keys import Keys, Memory
from handfast.fleet.gate.round import Mode, Seat, Verdict, arrive, attend, decide, ranks_of
from handfast.fleet.gate.stack import Stack, stack
from handfast.fleet.inventory.facts import Fact, Inventory, Kind, Tier, Want, gather
from handfast.fleet.inventory.variables import classify

FLEETS = Path(__file__).parent / "fleets"
FABRIC = ("fabric-manager", "imex", "nic", "ethernet", "ofed")
JOB = {"nccl.version": "2.27.5", "torch.version": "2.8.0", "cuda.runtime.version": "12.8",
       "cuda.driver.version": "580.65.06", "nccl.plugin.net": "none",
       "nccl.plugin.net.content": "-", "env": "read", "ucx.version": "-"}  # fmt: skip
NODE = {"gpu.driver": "580.65.06", "fabric-manager.version": "580.65.06", "imex.version": "-",
        "cpu.vendor": "GenuineIntel", "gpu.model": "H200", "kernel.release": "6.8.0-45-generic",
        "nic": "read"}  # fmt: skip


def rules_of(name: str) -> Rules:
    """The rules of a fleet: those that are shipped, or a site's."""
    return load(str(FLEETS / f"{name}.rules")) if name else start()


def ranks(fleet: dict[str, Any]) -> list[tuple[str, Stack]]:
    """The host and the stack of each rank of a fleet, in order."""
    found = []
    for each in fleet["nodes"]:
        job = _inventory(JOB | each.get("job", {}), each.get("env", {}))
        told = each.get("node", {})
        node = None if told == "none" else _inventory(NODE | told)
        found += [(each["host"], stack(job, node))] * int(each.get("ranks", 1))
    return found


def read(path: Path) -> dict[str, Any]:
    """A fleet; all of its values are texts."""
    plain = yaml.BaseLoader
    found: dict[str, Any] = yaml.load(path.read_text(), plain)  # noqa: S506 - texts only
    return found


def meet(
    members: list[tuple[str, Stack]],
    rules: Rules,
    *,
    groups: str = "",
    mode: Mode = Mode.ENFORCE,
    keys: Keys | None = None,
    away: tuple[int, ...] = (),
) -> list[Verdict]:
    """Hold a round in memory, rank by rank; what each rank that came has heard."""
    store, size = keys or Memory(), len(members)
    place, seats = "", []
    local = Counter(host for host, _ in members)
    firsts: dict[str, int] = {}
    for rank, (host, facts) in enumerate(members):
        firsts.setdefault(host, rank)
        if rank not in away:
            seats.append(Seat(rank, size, host, firsts[host], local[host]))
            place = arrive(store, "0", seats[-1], facts)
    store.set(f"{place}/heard/all", "1")  # rank 0 is asked before the others here

    def court(posted: Any, stacks: Any) -> Verdict:
        of = ranks_of(groups, size)
        return decide(rules, posted, stacks, size=size, mode=mode, groups=of, whose="job 17")

    return [attend(store, place, seat, 0.01, court, mode) for seat in seats]


def _inventory(values: dict[str, str], env: dict[str, str] | None = None) -> Inventory:
    variables = {f"env.{name}": (value, classify(name)) for name, value in (env or {}).items()}
    facts = {name: (value, Kind.EXACT) for name, value in values.items()} | variables
    return gather(_fact(name, value, kind or Kind.IGNORED) for name, (value, kind) in facts.items())


def _fact(name: str, value: str, kind: Kind) -> Fact:
    of = name.partition(".")[0]
    tier = Tier.FABRIC if of in FABRIC else Tier.JOB if name in JOB or of == "env" else Tier.HOST
    want = Want(name, tier, kind)
    if value == "?":
        return want.unknown("a test")
    return want.absent("a test") if value == "-" else want.known(value, "a test")
