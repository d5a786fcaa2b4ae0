"""Shows that an agent stays below the training, and within the limits that it was given."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from handfast.agent.manners import SMALL, Manners, Paced, Pacer
from handfast.errors import HandfastError
from handfast.store.files import Posix, closing

NAMES = ("HANDFAST_NICE", "HANDFAST_WRITE_MBPS", "HANDFAST_CPUS")


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where nobody has set anything."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_what_is_set_is_what_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows the defaults, and each variable's meaning."""
    assert Manners.told() == Manners(nice=5, rate=None, cpus=None)
    monkeypatch.setenv("HANDFAST_NICE", "0")
    monkeypatch.setenv("HANDFAST_WRITE_MBPS", "1.5")
    monkeypatch.setenv("HANDFAST_CPUS", "0-2, 7")
    assert Manners.told() == Manners(0, 1.5e6, frozenset({0, 1, 2, 7}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("HANDFAST_NICE", told) for told in ("-1", "20", "low", "1.5")),
        *(("HANDFAST_WRITE_MBPS", told) for told in ("0", "-3", "fast", "inf", "nan")),
        *(("HANDFAST_CPUS", told) for told in ("all", "1-", "2-1", ",", "0,x")),
    ],
)
def test_what_means_nothing_is_named(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that no setting is taken for another one, or left out in silence."""
    monkeypatch.setenv(name, value)
    with pytest.raises(HandfastError, match=f"{name}='{value}'.*What to do: set"):
        Manners.told()


def test_a_process_keeps_its_manners() -> None:
    """Shows it of a real one: as nice as was said, also as a group, and on the processors that it
    was given; threads that it starts afterwards, too."""
    cpu = min(os.sched_getaffinity(0))
    body = (
        "import os, threading\n"
        "from handfast.agent.manners import Manners\n"
        "before = os.nice(0)\n"
        f"Manners(3, None, frozenset({{{cpu}}})).keep()\n"
        "def show():\n"
        "    print(os.nice(0) - before, sorted(os.sched_getaffinity(0)))\n"
        "    print(open('/proc/self/autogroup').read() if os.path.exists('/proc/self/autogroup')"
        " else 'nice 3')\n"
        "thread = threading.Thread(target=show); thread.start(); thread.join()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", body], capture_output=True, text=True, check=True,
        start_new_session=True,
    )  # fmt: skip
    assert done.stdout.startswith(f"3 [{cpu}]\n")
    assert done.stdout.rstrip().endswith(f"nice {os.nice(0) + 3}")


def test_processors_that_are_not_there_cost_no_agent(caplog: pytest.LogCaptureFixture) -> None:
    """Shows that a list for another machine is told of, and left out."""
    Manners(0, None, frozenset({4095})).keep()
    assert "HANDFAST_CPUS is ignored" in caplog.text


class Clock:
    """A clock that moves when somebody sleeps."""

    now = 100.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_limit_is_kept_over_time() -> None:
    """Shows that bytes wait for their turn, that the first go at once, and that a pause earns no
    more than what was let pass."""
    clock = Clock()
    pacer = Pacer(1000.0, lambda: clock.now, clock.sleep)
    for _ in range(4):
        pacer.take(500)
    assert clock.now == 101.5  # the last one's half second is still to come
    clock.now += 60
    pacer.take(500)
    assert clock.now == 161.5
    pacer.take(500)
    assert clock.now == 162.0


def test_images_are_paced_and_votes_are_not(tmp_path: Path) -> None:
    """Shows that what is written is whole, and that only what is large has waited."""
    clock = Clock()
    files = Paced(Pacer(float(SMALL), lambda: clock.now, clock.sleep))
    with closing(files, files.create(str(tmp_path / "file"))) as fd:
        for number in range(3):
            files.pwrite(fd, bytes([number]) * SMALL, number * SMALL)
        files.pwrite(fd, b"vote", 3 * SMALL)
    assert clock.now == 102.0
    assert (tmp_path / "file").read_bytes()[SMALL - 1 :: SMALL] == b"\0\1\2"
    assert type(Manners().files()) is Posix
    assert type(Manners(rate=1e6).files()) is Paced
