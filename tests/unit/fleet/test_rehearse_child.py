"""Show that a process is never lost to an interrupt, and that none fills the disk by talking."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from rehearsalkit import job, python

from handfast.fleet.rehearse.child import MOST, Child, tail
from handfast.fleet.rehearse.fleet import Fleet, Found, Outcome
from handfast.fleet.rehearse.reading import load

NOISE = "noise of a library, and again"
FLOODS = f"""
import os, sys, time
while os.fstat(1).st_size <= {MOST}:
    os.write(1, b"{NOISE}\\n" * 50_000)
while os.fstat(1).st_size > {MOST}:
    time.sleep(0.0001)
print("the last word", flush=True)
"""


class Interrupted(list[Child]):
    """A list whose owner is told to end, by a real signal, whenever it is changed."""

    def append(self, child: Child) -> None:
        signal.raise_signal(signal.SIGINT)
        super().append(child)

    def remove(self, child: Child) -> None:
        signal.raise_signal(signal.SIGINT)
        super().remove(child)


def started(tmp_path: Path, among: list[Child], *argv: str) -> Child:
    """Start a process in a directory, where it says what it says."""
    said = str(tmp_path / "said")
    return Child(argv, among, env=dict(os.environ), cwd=str(tmp_path), out=said, err=said)


def fleet_of(tmp_path: Path, text: str) -> Fleet:
    """Make a fleet of one node."""
    path = job(tmp_path, text, nodes="a")
    return Fleet(load(path), str(tmp_path / "fleet"), ("1",))


def said(tmp_path: Path, name: str) -> Path:
    """The file of what a process of the fleet said."""
    (path,) = (tmp_path / "fleet" / "said").glob(f"???-{name}")
    return path


def test_an_interrupt_at_a_start_loses_no_process(tmp_path: Path) -> None:
    """It waits until the process is known, so that whoever clears up can end it."""
    among = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        started(tmp_path, among, "sleep", "600")
    (child,) = among
    child.ask_to_stop()
    assert child.wait(60)
    with pytest.raises(KeyboardInterrupt):
        child.end()


def test_an_interrupt_at_an_end_waits_for_all_of_it(tmp_path: Path) -> None:
    """Else it is ended again by whoever clears up, when its number is somebody else's."""
    among = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        started(tmp_path, among, "sleep", "600")
    with pytest.raises(KeyboardInterrupt):
        among[0].end()
    assert among == []


def test_a_probe_that_floods_is_told_and_only_its_end_is_kept(tmp_path: Path) -> None:
    """It says `y` until its time is over: gigabytes, were they kept."""
    fleet = fleet_of(tmp_path, "probe: {each: fleet, run: ['yes']}\nprobe-s: 1")
    try:
        (found,) = fleet.probe().values()
    finally:
        fleet.close()
    sentence = "the probe gave no answer within 1 s and said more than 16 MiB: y"
    assert found == Found(Outcome.HANGS, sentence, ("y",) * 5)
    assert said(tmp_path, "probe").stat().st_size <= MOST
    assert said(tmp_path, "probe.before").stat().st_size == 1 << 16


def test_a_flood_is_let_go_of_while_it_goes_on_and_the_last_words_count(tmp_path: Path) -> None:
    """Not only when it has ended: this one waits for that, and then refuses in a sentence.

    It says it the very moment that its file is empty, when the end of that is not yet put away.
    """
    argv = python(f"{FLOODS}\nsys.exit(96)")
    fleet = fleet_of(tmp_path, f"probe: {{each: fleet, run: {argv}}}\nprobe-s: 60")
    try:
        (found,) = fleet.probe().values()
    finally:
        fleet.close()
    assert (found.outcome, found.sentence) == (Outcome.REFUSES, "the last word")


def test_a_node_that_logs_much_is_not_ended_for_it(tmp_path: Path) -> None:
    """Its file is emptied while it is another one that is waited for, and it serves on."""
    wait = "import os, time\nwhile not os.path.exists('go'): time.sleep(0.01)"
    node = python(f"{wait}\n{FLOODS}\nopen('done', 'w').close(); time.sleep(600)")
    asks = "probe: {each: fleet, run: [sh, -c, 'touch go; until test -e done; do sleep 0.1; done']}"
    fleet = fleet_of(tmp_path, f"run: {node}\nready: ['true']\n{asks}\nprobe-s: 60\n")
    try:
        assert fleet.start().outcome is Outcome.WORKS
        assert [found.outcome for found in fleet.probe().values()] == [Outcome.WORKS]
        assert fleet.lost().outcome is Outcome.WORKS
        assert said(tmp_path, "a-1").read_text() == "the last word\n"
        assert f"\n{NOISE}\n" in said(tmp_path, "a-1.before").read_text()
    finally:
        fleet.close()


def test_a_flood_that_nobody_has_looked_at_is_let_go_of_at_its_end(tmp_path: Path) -> None:
    """What is kept of a fleet that broke is no longer for that, and its last line is still told."""
    times = 2 * MOST // len(NOISE)
    program = f"print('{NOISE}\\n' * {times} + 'the end', flush=True); open('done', 'w')"
    child = started(tmp_path, [], sys.executable, "-IS", "-c", program)
    while not (tmp_path / "done").exists():
        time.sleep(0.01)
    child.end()
    assert (tmp_path / "said").stat().st_size == 0
    assert tail(child.out) == (*[NOISE] * 4, "the end")
