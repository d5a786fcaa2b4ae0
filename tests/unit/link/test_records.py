"""Shows that what a link must not forget outlives its process, and a power cut at any moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linkkit import A, B

from handfast.core.lattice import Epoch
from handfast.errors import Damaged, SaveFailed
from handfast.link import records as room
from handfast.link.life import Node
from handfast.link.records import Records, recall
from handfast.link.session import Bound, Offered, Record, Taking
from handfast.link.switch import Spoken
from handfast.store.files import Posix

ME = Node("me", "boot", 1)


def bound(peer: str, life: int) -> Bound:
    """A session with a life of a peer."""
    return Bound(bytes([life]) * 16, ME, Node(peer, "boot", life), A)


ANY = st.one_of(
    st.builds(bound, st.sampled_from("abc"), st.integers(1, 4)),
    st.builds(lambda n: Offered(Node("me", "boot", n), (A, B)), st.integers(1, 3)),
    st.builds(lambda b: Taking(bytes(16), (B,) if b else (A, B)), st.booleans()),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(ANY, max_size=12), st.integers(1, 4))
def test_a_file_says_what_all_its_records_say(said: list[Record], few: int) -> None:
    """However often it was opened anew, and written anew with what counts alone."""
    path = f"/dev/shm/handfast-records-{os.getpid()}"
    before, room.FEW = room.FEW, few
    try:
        for at, record in enumerate(said):
            held = Records(path)
            held(record)
            held(record)
            held.close()
            held = Records(path)
            assert (held.spoken, held.known) == recall(said[: at + 1])
            held.close()
    finally:
        room.FEW = before
        if os.path.lexists(path):
            os.unlink(path)


def test_it_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of sessions with one peer: what is superseded goes."""
    monkeypatch.setattr(room, "FEW", 50)
    path = tmp_path / "records"
    held = Records(str(path))
    for life in range(1, 400):
        held(Bound(bytes(16), ME, Node("a", "boot", life), A))
    assert held.known == {"a": Node("a", "boot", 399)}
    assert path.stat().st_size < 20_000
    held.close()


def test_a_process_that_is_killed_has_lost_nothing_that_it_was_told_is_durable(
    tmp_path: Path,
) -> None:
    """It says each life only when the call has returned."""
    path = tmp_path / "records"
    script = (
        "import sys; from handfast.core.lattice import Epoch; from handfast.link.life import Node;"
        "from handfast.link.records import Records; from handfast.link.session import Bound;"
        "from handfast.link.switch import Spoken; held = Records(sys.argv[1]);"
        "[(held(Bound(bytes(16), Node('me', 'b', 1), Node('a', 'b', n), Spoken(Epoch(1, 1), 'x'))),"
        "print(n, flush=True)) for n in range(1, 10**6)]"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        said = [child.stdout.readline() for _ in range(40)]
        child.send_signal(signal.SIGKILL)
        said += child.stdout.readlines()
    last = int([line for line in said if line.endswith("\n")][-1])
    held = Records(str(path))
    assert held.known["a"].counter >= last
    held.close()


class Full(Posix):
    """A disk that is full from some moment on."""

    full = False

    def fdatasync(self, fd: int) -> None:
        if self.full:
            raise OSError(28, "No space left on device")
        super().fdatasync(fd)


def test_what_can_t_be_written_is_never_taken_for_durable(tmp_path: Path) -> None:
    """Not the second time either, when it is the same; the next process finds what was durable."""
    path, disk = str(tmp_path / "records"), Full()
    held = Records(path, disk)
    held(bound("a", 1))
    disk.full = True
    for _ in range(2):
        with pytest.raises(SaveFailed):
            held(bound("a", 2))
        assert held.known["a"].counter == 1
    disk.full = False
    held(bound("a", 3))
    held.close()
    again = Records(path)
    assert again.known["a"].counter == 3
    again.close()


def test_a_life_is_never_followed_by_an_earlier_one(tmp_path: Path) -> None:
    """Whichever handshake is recorded last."""
    held = Records(str(tmp_path / "records"))
    held(bound("a", 9))
    held(bound("a", 3))
    assert held.known["a"].counter == recall([bound("a", 9), bound("a", 3)])[1]["a"].counter == 9
    held.close()


def test_to_meet_again_writes_nothing(tmp_path: Path) -> None:
    """Nor is there a file before there is something to record."""
    path = tmp_path / "records"
    held = Records(str(path))
    assert not path.exists()
    held(bound("a", 1))
    before = path.stat().st_size
    for session in range(5):
        again = Bound(bytes([session]) * 16, ME, Node("a", "boot", 1), A)
        assert not held.news(again)
        held(again)
    assert path.stat().st_size == before
    held.close()


def test_a_file_that_was_taken_away_is_written_anew(tmp_path: Path) -> None:
    """By whoever tidies /tmp: with all that counts."""
    path = tmp_path / "records"
    held = Records(str(path))
    held(bound("a", 1))
    path.unlink()
    held(bound("b", 1))
    held.close()
    assert set(Records(str(path)).known) == {"a", "b"}


def test_who_is_known_may_be_asked_while_records_are_written(tmp_path: Path) -> None:
    """In the loop, while threads write: nothing changes under the reader."""
    held = Records(str(tmp_path / "records"))
    seen: list[int] = []

    def write(first: int) -> None:
        for n in range(first, first + 60):
            held(bound(f"p{n}", 1))

    threads = [threading.Thread(target=write, args=(n * 100,)) for n in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen.append(len([*held.known.values()]))
    assert len(held.known) == 180
    assert seen == sorted(seen)
    held.close()


def test_damage_and_strangers_are_named(tmp_path: Path) -> None:
    """With what to do; nothing is begun anew by itself."""
    path = tmp_path / "records"
    path.write_bytes(b"what is this?" * 9)
    with pytest.raises(Damaged, match=r"records.*What to do: take the link down"):
        Records(str(path))
    assert path.read_bytes() == b"what is this?" * 9
    path.unlink()
    held = Records(str(path))
    held(bound("a", 1))
    assert held._journal is not None
    held._journal.append(b"\xc1")
    held._journal.sync()
    held.close()
    with pytest.raises(Damaged, match="What to do"):
        Records(str(path))


def test_what_one_died_over_is_in_nobodys_way(tmp_path: Path) -> None:
    """Half a new file beside the old one."""
    path = tmp_path / "records"
    held = Records(str(path))
    held(Offered(ME, (Spoken(Epoch(1, 1), "x"),)))
    held.close()
    (tmp_path / "records.tmp").write_bytes(b"half")
    held = Records(str(path))
    assert held.spoken == (Spoken(Epoch(1, 1), "x"),)
    held(bound("a", 1))
    held.close()
    assert os.listdir(tmp_path) == ["records"]
