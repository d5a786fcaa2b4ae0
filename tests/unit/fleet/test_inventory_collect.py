"""Shows that a collector which hangs, crashes or lies costs its own facts, and nobody else's."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import awkward
import pytest

from handfast.fleet.inventory.collect import take
from handfast.fleet.inventory.collector import BMC_URL, GROUP, OURS, Entry, found
from handfast.fleet.inventory.facts import Fact, Inventory, State, Tier
from handfast.fleet.inventory.host import Host, here

KERNEL = next(entry for entry in OURS if entry.name == "kernel")


def ask(name: str, limit_s: float = 30.0, **environ: str) -> Inventory:
    """Take an inventory by one of the awkward collectors and one of ours."""
    host = here(environ=environ)
    entries = [Entry(name, f"awkward:{name.upper()}"), KERNEL]
    taken = take(host, entries=entries, limit_s=limit_s)
    assert taken.get("kernel.release").state is State.KNOWN  # whatever the other one did
    return taken


def lost(taken: Inventory, *names: str) -> str:
    """The reason why these facts are unknown; they and no others are."""
    unknown = [fact for fact in taken.facts if fact.state is State.UNKNOWN]
    assert {fact.name for fact in unknown} == set(names)
    (problem,) = {fact.problem for fact in unknown}
    return problem


def test_one_that_goes_well_is_heard_through_its_libraries_noise() -> None:
    """What it announced and did not report is unknown; a member of a family has a clean name."""
    taken = ask("well")
    assert taken.get("test.one").value == "1"
    assert taken.get("test.family.a_b").value == "2"
    assert taken.get("test.family.c").state is State.ABSENT
    assert lost(taken, "test.two") == "collector well did not report it"


def test_one_that_hangs_is_ended_at_the_limit() -> None:
    """Its facts are unknown, also the one that it had found: the answer was not whole."""
    problem = lost(ask("hangs", limit_s=2.0), "test.one", "test.two")
    assert problem == "collector hangs: it gave no answer within 2 s and was ended"


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Path]:
    """Where a collector writes the numbers of its children; those that are left are ended."""
    file = tmp_path / "pids"
    yield file
    for pid in map(int, file.read_text().split()):
        with suppress(ProcessLookupError, FileNotFoundError):
            held = os.pidfd_open(pid)
            ours = Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1] == awkward.SLEEP
            if ours:  # and not who has its number by now
                signal.pidfd_send_signal(held, signal.SIGKILL)
            os.close(held)


def alive(pid: int) -> bool:
    """Whether a process runs, and is no mere entry of a table."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("waits", ["", "1"])
def test_what_a_collector_started_is_ended_with_it(waits: str, children: Path) -> None:
    """Whether it ends by itself or at the limit. What has left its group does not hold us up."""
    taken = ask("breeds", 2.0 if waits else 30.0, AWKWARD_PIDS=str(children), AWKWARD_WAITS=waits)
    assert (taken.get("test.one").state is State.UNKNOWN) is bool(waits)
    inside, outside = map(int, children.read_text().split())
    while alive(inside):  # the kernel takes its time; pytest's own limit ends this
        time.sleep(0.01)
    assert alive(outside)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dies", "it died of SIGSEGV"),
        ("raises", "it ended with 1: RuntimeError: the driver is of another planet"),
        ("strays", "it reported what it never said it would: gpu.driver"),
        ("elsewhere", "it reported what it never said it would: test.one"),
        ("stutters", "it reported a fact twice"),
    ],
)
def test_one_that_goes_wrong_is_told_with_the_reason(name: str, words: str) -> None:
    """By signal, by error, by what it says."""
    assert words in lost(ask(name), "test.one", "test.two")


def test_one_that_ends_without_a_word_has_reported_nothing() -> None:
    """An exit code of 0 is no answer."""
    assert lost(ask("leaves"), "test.one", "test.two") == "collector leaves did not report it"


@pytest.mark.parametrize(("name", "words"), [("floods", "more than 10000 facts"),
                                             ("bloats", "File too large")])  # fmt: skip
def test_one_that_has_no_end_is_stopped(name: str, words: str) -> None:
    """So many facts and so many bytes, and no more."""
    assert words in lost(ask(name), "test.one", "test.family")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("awkward:BABBLES", "it said nonsense"),
        ("awkward:EMPTY", "it reports nothing"),
        ("awkward:NO_COLLECTOR", "TypeError: awkward:NO_COLLECTOR is no Collector"),
        ("awkward:MISSING", "AttributeError"),
        ("no_such_package:X", "ModuleNotFoundError"),
    ],
)
def test_one_of_which_nothing_is_known_is_unknown_as_a_whole(target: str, words: str) -> None:
    """By its name, since nobody can say what it would have reported."""
    taken = take(here(), entries=[Entry("odd one", target), KERNEL])
    assert words in lost(taken, "collector.odd_one")
    assert taken.get("kernel.release").state is State.KNOWN


def test_two_that_report_one_fact_are_not_mixed() -> None:
    """The first keeps it; the other is unknown as a whole."""
    entries = [Entry("well", "awkward:WELL"), Entry("again", "awkward:RAISES")]
    taken = take(here(), entries=entries)
    assert taken.get("test.one").value == "1"
    assert "another collector reports that" in taken.get("collector.again").problem


def test_only_the_tiers_that_are_asked_for_are_looked_at() -> None:
    """A rank asks for its own tier, and pays for no other."""
    taken = take(here(), tiers=[Tier.JOB])
    assert {fact.tier for fact in taken.facts} == {Tier.JOB}
    assert not {entry.name for entry in OURS if entry.tiers == {Tier.JOB}} & {"kernel", "driver"}


def test_other_packages_bring_collectors_by_an_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an installed distribution names it; asked like ours."""
    record = tmp_path / "awkward-1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: awkward\nVersion: 1.0\n")
    (record / "entry_points.txt").write_text(f"[{GROUP}]\nthird = awkward:WELL\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = found(Host())[-1]
    assert (entry.name, entry.target, entry.tiers) == ("third", "awkward:WELL", frozenset(Tier))
    values: dict[str, Fact] = {fact.name: fact for fact in take(here(), tiers=[Tier.HOST]).facts}
    assert values["test.one"].value == "1"


def test_the_management_controller_is_asked_where_its_address_is_given() -> None:
    """And nowhere else."""
    assert [entry.name for entry in found(Host()) if entry.name == "bmc"] == []
    host = Host(environ={BMC_URL: "http://127.0.0.1:1"})
    assert [entry.name for entry in found(host) if entry.name == "bmc"] == ["bmc"]


def test_what_prints_as_python_starts_is_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sitecustomize that prints a line cost all facts, and nobody missed them at the gate."""
    (tmp_path / "sitecustomize.py").write_text("print('welcome to this image', flush=True)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert ask("well").get("test.one").value == "1"


def test_a_place_on_the_path_that_is_no_text_is_handed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some programs put a Path there."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path, tmp_path])
    assert ask("well").get("test.one").value == "1"
