"""What a fleet's nodes, ranks and operators send: the decoders, and what each may raise."""

from __future__ import annotations

from typing import Any

import msgspec

from handfast.errors import FormatError, HandfastError
from handfast.fleet.compat import options, reading
from handfast.fleet.compat.reading import start
from handfast.fleet.gate import overrides, stack, wire
from handfast.fleet.gate import round as gate
from handfast.fleet.identity import Statement, read_statement
from handfast.fleet.inventory import collect, facts
from handfast.fleet.inventory.facts import Fact, Kind, State, Tier, Want
from handfast.fleet.rehearse import reading as rehearsal
from handfast.link.life import Node

RULES = start()
NODE = Node("ab" * 32, "boot", 3)
DRIVER = Fact("gpu.driver", Tier.HOST, Kind.EXACT, State.KNOWN, "580.65", source="a file")
INVENTORY = facts.encode(facts.gather([DRIVER], NODE))
STATEMENT = Statement(INVENTORY.decode(), "00ff", "ab" * 64)
STACK = stack.encode({"gpu.driver": "580.65", "nccl.version": None})
POSTED = gate.Posted(gate.Seat(0, 2, "host", 0, 2), stack.digest(STACK))
COLLECTED = (
    msgspec.json.encode([Want("gpu.driver", Tier.HOST)]) + b"\n" + msgspec.json.encode([DRIVER])
)
PROBED = b'{"probe":"ucx","client":["1.13"],"server":["1.14"],"passed":true}\n'
OPTIONS = b"format: 1\nnodes:\n  gpu-[01-08]:\n    could:\n      gpu.driver: ['570', '580']\n"

RULE = b"""format: 1
facts: {gpu.driver: driver}
brought: {kubelet: kubelet, apiserver: kube-apiserver}
rules:
  driver: {source: a, scope: fabric, mode: warn, exact: [gpu.driver]}
  kube:
    {source: b, scope: fleet, adjacent: {facts: [kubelet, apiserver], releases: ['1.28', '1.29']}}
"""
REHEARSAL = b"""rehearsal: r
versions: {'1': {bin: '{here}/a'}, '2': {bin: '{version}'}}
run: ['{bin}', '{{x}}', '{port}']
ready: [ask, '{node}']
probe: {each: pair, run: ['{client.bin}']}
record: {probe: p, facts: {ucx.version: '{version}'}}
"""
OVERRIDES = b"""overrides:
  - {name: n, rule: nccl, who: ada, why: canary, until: 2026-12-24T00:00:00Z}
"""


def read_stack(data: bytes) -> Any:
    """A stack of a rank, under its own digest."""
    text = data.decode(errors="replace")
    return stack.decode(text, stack.digest(text))


def read_posted(data: bytes) -> Any:
    """What a rank of a round posts."""
    return gate._read(data.decode(errors="replace"), gate.Posted)


FLEET: dict[str, tuple[Any, tuple[type[Exception], ...], tuple[bytes, ...]]] = {
    "inventory": (lambda data: facts.decode(data, "x"), (FormatError,), (INVENTORY,)),
    "statement": (
        lambda data: read_statement(data, "x"),
        (FormatError,),
        (msgspec.json.encode(STATEMENT),),
    ),
    "collected": (lambda data: collect._read(data, ""), (), (COLLECTED,)),
    "stack": (read_stack, (FormatError,), (STACK.encode(),)),
    "posted": (read_posted, (FormatError,), (msgspec.json.encode(POSTED),)),
    "node-request": (wire.read_request, (FormatError,), (b"handfast.node/1 00ff\n",)),
    "node-reply": (
        lambda data: wire.read_reply(data, "x"),
        (HandfastError,),
        (wire.reply(STATEMENT), wire.reply(facts.gather([DRIVER], NODE))),
    ),
    "probed": (
        lambda data: options.parse_probed(data, "x", RULES),
        (FormatError,),
        (PROBED,),
    ),
    "options": (lambda data: options.parse(data, "x", RULES), (FormatError,), (OPTIONS,)),
    "rules": (lambda data: reading.parse(data, "x"), (FormatError,), (RULE,)),
    "rehearsal": (
        lambda data: rehearsal.parse(data, "x", "/", {}),
        (FormatError,),
        (REHEARSAL,),
    ),
    "overrides": (lambda data: overrides.parse(data, "x"), (FormatError,), (OVERRIDES,)),
}
