"""Show that rules of must-probe hold in the gate by what was recorded, and else as before."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import pytest

pytest.importorskip("yaml")

from gatekit import ranks, rules_of
from test_gate_node import SAID

from handfast.fleet.compat.rules import Level, MustProbe, Probed, Rule, Rules, Scope
from handfast.fleet.gate.node import admit
from handfast.fleet.gate.round import Mode, Posted, Seat, Verdict, decide
from handfast.fleet.gate.stack import digest, encode

INTEL, AMD = ("GenuineIntel", "2.27.5"), ("AuthenticAMD", "2.27.5")


def judged(probed: Iterable[Probed], *, job: Iterable[dict[str, str]] = ({}, {})) -> Verdict:
    """Two nodes of two vendors, by the rules that are shipped."""
    vendors = ("GenuineIntel", "AuthenticAMD")
    nodes = [
        {"host": vendor[:3], "node": {"cpu.vendor": vendor}, "job": more}
        for vendor, more in zip(vendors, job, strict=True)
    ]
    posted, stacks = {}, {}
    for rank, (host, facts) in enumerate(ranks({"nodes": nodes})):
        name = digest(encode(facts))
        posted[rank], stacks[name] = Posted(Seat(rank, 2, host, rank, 1), name), facts
    world = {"world": (0, 1)}
    return decide(
        rules_of(""), posted, stacks, size=2, mode=Mode.ENFORCE, groups=world, probed=probed
    )


def test_a_shipped_rule_holds_where_its_probe_passed_both_ways() -> None:
    """For these values; without a result, by another probe, or of others, it warns as before."""
    there, back = (
        Probed("nccl-all-reduce", INTEL, AMD, True),
        Probed("nccl-all-reduce", AMD, INTEL, True),
    )
    assert judged([there, back]).level is Level.FINE
    for some in ([], [there], [back], [there, msgspec.structs.replace(back, probe="ucx")],
                 [there, Probed("nccl-all-reduce", ("AuthenticAMD", "2.26.2"), INTEL, True)],
                 [there, back, msgspec.structs.replace(back, passed=False)]):  # fmt: skip
        found = judged(some)
        assert found.level is Level.WARN
        assert "rule nccl-cpu-vendors" in found.line
    (one,) = judged([there]).findings
    assert one.sentence.startswith("rank 1 (Aut) runs CPU vendor AuthenticAMD with NCCL 2.27.5 and")


def test_ucx_is_judged_by_its_direction() -> None:
    """Both rules of must-probe that are shipped read the same file."""
    job = ({"ucx.version": "1.13.1"}, {"ucx.version": "1.22.0"})
    both = [Probed("nccl-all-reduce", *pair, True) for pair in ((INTEL, AMD), (AMD, INTEL))]
    back = Probed("ucx-tag-send", ("1.22.0",), ("1.13.1",), True)
    there = Probed("ucx-tag-send", ("1.13.1",), ("1.22.0",), False)
    (one,) = judged([*both, back, there], job=job).findings
    assert (one.rule, one.level) == ("ucx", Level.WARN)
    assert "rank 0 (Gen) runs UCX 1.13.1 and talks to rank 1 (Aut), which runs UCX 1.22.0" in (
        one.sentence
    )
    there = msgspec.structs.replace(there, passed=True)
    assert judged([*both, back, there], job=job).level is Level.FINE


def test_a_node_is_admitted_by_what_was_probed_on_such_a_one() -> None:
    """A rule about one node asks for the same values at both ends."""
    rule = Rule("tried", "us", Scope.NODE, MustProbe("p2p", ("gpu.driver",)))
    rules = Rules("a test", (rule,))
    assert admit(rules, SAID, "a").level is Level.REFUSE
    passed = [Probed("p2p", ("580.65.06",), ("580.65.06",), True)]
    assert admit(rules, SAID, "a", passed).level is Level.FINE
