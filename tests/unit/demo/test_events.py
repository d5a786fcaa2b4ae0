"""Shows that a rank killed inside a write harms no reader of its log."""

import math
from pathlib import Path

from handfast.demo.events import Log, Tail


def test_a_reader_gets_every_whole_line_once_in_order_of_time(tmp_path: Path) -> None:
    """Two ranks and two starts write to files of their own; losses come back bit for bit."""
    loss = 0.1 + 0.2
    one, two = Log(str(tmp_path), 1, 0), Log(str(tmp_path), 1, 1)
    tail = Tail(str(tmp_path))
    assert tail.poll() == []
    one.tell("step", 1, loss=loss)
    two.tell("step", 1, loss=2.0)
    one.tell("saving", 1, prints={"model": "ab"})
    found = tail.poll()
    assert [(e.rank, e.kind) for e in found] == [(0, "step"), (1, "step"), (0, "saving")]
    assert found[0].loss == loss
    assert tail.poll() == []
    Log(str(tmp_path), 2, 0).tell("start")
    assert [e.launch for e in tail.poll()] == [2]


def test_a_line_cut_by_a_kill_is_waited_for_and_never_guessed(tmp_path: Path) -> None:
    """The rest may still come; if it never does, the line is not there."""
    log = Log(str(tmp_path), 1, 0)
    log.tell("start")
    (file,) = (tmp_path / "events").iterdir()
    whole = file.read_bytes()
    tail = Tail(str(tmp_path))
    tail.poll()
    file.write_bytes(whole + whole[:20])
    assert tail.poll() == []
    file.write_bytes(whole + whole)
    assert [e.kind for e in tail.poll()] == ["start"]


def test_no_run_yet_is_no_event(tmp_path: Path) -> None:
    """The storm looks before the first rank has made the directory."""
    assert Tail(str(tmp_path / "nowhere")).poll() == []


def test_a_loss_that_is_no_number_is_told_as_none(tmp_path: Path) -> None:
    """JSON has no NaN; the ledger must see that it is not the number that it should be."""
    Log(str(tmp_path), 1, 0).tell("step", 1, loss=math.nan)
    assert [e.loss for e in Tail(str(tmp_path)).poll()] == [None]
