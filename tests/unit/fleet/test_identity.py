"""Shows who a node is, that no number is used twice, and what gives a clone away."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inventorykit import inventory

import handfast
from handfast.errors import Blocked, Damaged, FormatError, HandfastError, Refused
from handfast.fleet import identity
from handfast.fleet.identity import (
    Clone,
    Key,
    Sighting,
    clones,
    enroll,
    life,
    load,
    read_statement,
    sign,
    verify,
)
from handfast.fleet.inventory.facts import Inventory, gather
from handfast.link.life import Node

crypto = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.rsa")

SOURCE = str(Path(handfast.__file__).parents[1])
KEY, OTHER = "ab" * 32, "cd" * 32


def seen(counter: int, boot: str, serial: str = "", asked: int = 0, heard: int = 0) -> Sighting:
    """An incarnation of one key, somewhere."""
    return Sighting(Node(KEY, boot, counter), serial, asked, heard, f"host-{boot}")


def lived(home: str, key: Key, boot: str) -> Node:
    """A life that is over."""
    with life(home, key, boot) as node:
        return node


# The key


def test_a_node_is_enrolled_once(tmp_path: Path) -> None:
    """The key is for its owner alone, stays the same, and a second enrolment changes nothing."""
    home = str(tmp_path / "a" / "state")
    before = os.umask(0)
    try:
        key = enroll(home)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(f"{home}/node.key").st_mode) == 0o600
    with pytest.raises(Refused, match="this node is enrolled already"):
        enroll(home)
    assert load(home).id == key.id
    assert sorted(os.listdir(home)) == ["counter", "node.key"]
    assert enroll(str(tmp_path / "b")).id != key.id


def test_a_reimaged_node_is_another_one(tmp_path: Path) -> None:
    """No key: not enrolled. A directory that has lost its key is not used for another."""
    home = str(tmp_path)
    with pytest.raises(Refused, match=r"not enrolled.*handfast fleet enroll"):
        load(home)
    lived(home, enroll(home), "boot")
    os.unlink(f"{home}/node.key")
    with pytest.raises(Refused, match="a counter and no key"):
        enroll(home)
    assert not os.path.exists(f"{home}/node.key")


def test_an_enrolment_that_was_cut_short_is_done_again(tmp_path: Path) -> None:
    """A counter at 0 was nobody's yet."""
    (tmp_path / "counter").write_text("0\n")
    key = enroll(str(tmp_path))
    assert lived(str(tmp_path), key, "boot").counter == 1


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    """Whoever read it is the node as well."""
    enroll(str(tmp_path))
    os.chmod(tmp_path / "node.key", 0o640)
    with pytest.raises(Refused, match="mode 0640"):
        load(str(tmp_path))


def test_what_is_no_key_of_ours_is_refused(tmp_path: Path) -> None:
    """Damage, and a key of another kind."""
    enroll(str(tmp_path))
    path = tmp_path / "node.key"
    path.write_bytes(b"not a key")
    with pytest.raises(Damaged, match="no private key"):
        load(str(tmp_path))
    from cryptography.hazmat.primitives import serialization as to

    other = crypto.generate_private_key(65537, 2048)
    kind = (to.Encoding.PEM, to.PrivateFormat.PKCS8, to.NoEncryption())
    path.write_bytes(other.private_bytes(*kind))
    with pytest.raises(FormatError, match="not a key of Ed25519"):
        load(str(tmp_path))


def test_a_directory_that_can_not_be_used_is_named(tmp_path: Path) -> None:
    """A file in its place; a key's path that is a directory."""
    (tmp_path / "file").touch()
    with pytest.raises(HandfastError, match=r"file.*ENOTDIR.*What to do"):
        enroll(str(tmp_path / "file" / "state"))
    (tmp_path / "node.key").mkdir()
    with pytest.raises(HandfastError, match=r"EISDIR.*What to do"):
        load(str(tmp_path))


def test_without_the_extra_it_is_said_how_to_get_it(tmp_path: Path) -> None:
    """An error with a remedy, in a process that can't import it."""
    program = (
        "import sys; sys.modules['cryptography'] = None\n"
        "from handfast.fleet.identity import enroll\n"
        f"enroll({str(tmp_path / 'x')!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": SOURCE},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert "pip install 'handfast[fleet]'" in done.stderr
    assert not (tmp_path / "x").exists()


# The counter


def test_each_start_has_a_number_of_its_own(tmp_path: Path) -> None:
    """Across boots, and across processes that start at once."""
    home, key = str(tmp_path), enroll(str(tmp_path))
    assert lived(home, key, "one") == Node(key.id, "one", 1)
    program = (
        "from handfast.fleet.identity import life, load\n"
        f"home = {home!r}; key = load(home)\n"
        "print('ready', flush=True); input()\n"
        "for _ in range(100):\n"
        "    with life(home, key, 'two') as node: print(node.counter)"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": SOURCE},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    for each in running:
        assert each.stdout is not None
        assert each.stdout.readline() == "ready\n"
    for each in running:
        assert each.stdin is not None
        each.stdin.write("\n")
        each.stdin.flush()
    numbers = [int(n) for each in running for n in each.communicate(timeout=60)[0].split()]
    assert sorted(numbers) == list(range(2, 302))
    assert lived(home, key, "three").counter == 302


def test_one_process_at_a_time_is_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For as long as it says so: who else would be it is told by which process, and may be later.

    Else an older incarnation could answer when a newer one has spoken, and look like a clone.
    """
    monkeypatch.setattr(identity, "WAIT_S", 0.1)
    home, key = str(tmp_path), enroll(str(tmp_path))
    with life(home, key, "boot") as node:
        assert node.counter == 1
        with pytest.raises(Blocked, match=r"another process is this node.*--challenge") as refused:
            lived(home, key, "boot")
        assert refused.value.by == (f"process {os.getpid()}",)
    assert lived(home, key, "boot").counter == 2
    (tmp_path / "lock").write_text("no number")  # whatever lies there, the kernel's lock counts
    holder = os.open(f"{home}/lock", os.O_RDWR)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(Blocked, match="blocked by: nobody known"):
            lived(home, key, "boot")
    finally:
        os.close(holder)
    assert lived(home, key, "boot").counter == 3


def test_no_number_is_used_twice_whenever_the_process_dies(tmp_path: Path) -> None:
    """Killed again and again in the middle: what was told once is never told again."""
    home, key = str(tmp_path), enroll(str(tmp_path))
    program = (
        "from handfast.fleet.identity import life, load\n"
        f"home = {home!r}; key = load(home)\n"
        "while True:\n"
        "    with life(home, key, 'boot') as node: print(node.counter, flush=True)"
    )
    told: list[int] = []
    for round_ in range(6):
        with subprocess.Popen(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": SOURCE},
            stdout=subprocess.PIPE, text=True,
        ) as running:  # fmt: skip
            assert running.stdout is not None
            told += [int(running.stdout.readline()) for _ in range(3 + round_ * 7)]
            running.send_signal(signal.SIGKILL)
            told += [int(line) for line in running.stdout if line.endswith("\n")]
    assert told == sorted(set(told))
    assert lived(home, key, "boot").counter > told[-1]


@pytest.mark.parametrize("text", ["", "seven", "-1", "\xff"])
def test_a_counter_that_can_not_be_read_is_never_begun_anew(text: str, tmp_path: Path) -> None:
    """Nor one that is gone: numbers would be used twice."""
    key = enroll(str(tmp_path))
    (tmp_path / "counter").write_bytes(text.encode("latin-1"))
    with pytest.raises(Damaged, match="is no number"):
        lived(str(tmp_path), key, "boot")
    (tmp_path / "counter").unlink()
    with pytest.raises(Damaged, match="the counter is missing"):
        lived(str(tmp_path), key, "boot")


def test_what_a_start_that_died_left_is_in_nobodys_way(tmp_path: Path) -> None:
    """A temporary file under the lock."""
    key = enroll(str(tmp_path))
    (tmp_path / "counter.tmp").write_text("9")
    assert lived(str(tmp_path), key, "boot").counter == 1


# Statements


def stated(home: Path) -> tuple[Inventory, str]:
    """An inventory that names the node enrolled there, and its key's id."""
    key = enroll(str(home))
    node = lived(str(home), key, "boot")
    return gather(inventory(driver="580.65.06").facts, node), key.id


def test_a_statement_is_read_by_whoever_asked(tmp_path: Path) -> None:
    """Over JSON; it answers one challenge and no other."""
    taken, _ = stated(tmp_path)
    data = msgspec.json.encode(sign(load(str(tmp_path)), taken, b"\x01\x02"))
    statement = read_statement(data, "node-3")
    assert verify(statement, "node-3") == verify(statement, "node-3", b"\x01\x02") == taken
    with pytest.raises(Refused, match=r"node-3: it answers another challenge"):
        verify(statement, "node-3", b"\x01")


def test_a_statement_that_was_changed_is_refused(tmp_path: Path) -> None:
    """Its body, its challenge, its signature, or the key that it names."""
    taken, _ = stated(tmp_path / "a")
    other = enroll(str(tmp_path / "b"))
    statement = sign(load(str(tmp_path / "a")), taken, b"\x01")
    body = json.loads(statement.body)
    body["node"]["key"] = other.id
    for change in (
        {"body": statement.body.replace("580.65.06", "580.65.07")},
        {"challenge": "02"},
        {"challenge": ""},
        {"signature": statement.signature[::-1]},
        {"signature": ""},
        {"body": json.dumps(body)},
    ):
        with pytest.raises(Refused, match="not signed by the node that it names"):
            verify(msgspec.structs.replace(statement, **change), "node-3")


def test_only_a_node_itself_speaks_in_its_name(tmp_path: Path) -> None:
    """What names nobody, or another, is not signed; and what names nobody is no answer."""
    taken, _ = stated(tmp_path / "a")
    other = enroll(str(tmp_path / "b"))
    for wrong in (taken, gather(taken.facts)):
        with pytest.raises(ValueError, match="does not name the node of this key"):
            sign(other, wrong)
    statement = sign(load(str(tmp_path / "a")), taken)
    nobody = msgspec.structs.replace(statement, body='{"format":1,"node":null,"facts":[]}')
    with pytest.raises(FormatError, match="names no node"):
        verify(nobody, "x")
    for data in (b"{}", b"\xff", b'{"body":"","challenge":"0","signature":""}'):
        with pytest.raises(FormatError, match=r"x: no statement of a node"):
            read_statement(data, "x")


# Clones


def test_a_life_of_reboots_and_restarts_is_no_clone() -> None:
    """Nor is a disk that was moved into another machine, nor a message that came late."""
    life = [
        seen(1, "a", "S1", 1, 2),
        seen(2, "a", "S1", 3, 4),
        seen(2, "a", "S1", 5, 6),
        seen(3, "b", "S1", 7, 8),
        seen(4, "c", "S2", 9, 10),
        seen(2, "a", "S1", 0, 11),
    ]
    assert clones(life) == ()


def test_an_answer_on_the_way_when_the_next_one_speaks_is_no_clone() -> None:
    """Challenge 3 was put before the new incarnation was heard, so the old one may answer it."""
    assert clones([seen(1, "a", asked=3, heard=5), seen(2, "b", asked=2, heard=6)]) == ()


@pytest.mark.parametrize(
    ("sightings", "words"),
    [
        ([seen(7, "a"), seen(7, "b")], "number 7 was used under 2 boot ids: a, b"),
        ([seen(1, "a"), seen(2, "b"), seen(3, "a")], "boot a speaks again with number 3"),
        ([seen(1, "a", "S1"), seen(2, "a", "S2")], "boot a was seen on the serials S1, S2"),
        ([seen(1, "a", asked=9, heard=10), seen(2, "b", asked=1, heard=2)],
         "number 1 answers a challenge that was put after a later one was heard"),
    ],
)  # fmt: skip
def test_two_live_holders_of_a_key_are_both_refused(sightings: list[Sighting], words: str) -> None:
    """By each kind of evidence; everybody who used the key is named, and no other key's holder."""
    honest = Sighting(Node(OTHER, "z", 1), where="honest")
    (found,) = clones([honest, *sightings])
    assert found.key == KEY
    assert words in found.why
    assert found.where == tuple(sorted({each.where for each in sightings}))


sightings = st.builds(
    seen,
    st.integers(1, 4),
    st.sampled_from("abc"),
    st.sampled_from(["", "S1", "S2"]),
    st.integers(0, 6),
    st.integers(1, 7),
)


@given(st.lists(sightings, max_size=6), sightings, st.randoms())
def test_evidence_only_grows(seen_: list[Sighting], more: Sighting, random: object) -> None:
    """More sightings never clear a key; order and repetition make no difference."""
    found = clones(seen_)
    shuffled = [*seen_, *seen_]
    random.shuffle(shuffled)  # Hypothesis' own kind of Random
    assert clones(shuffled) == found
    assert not found or clones([*seen_, more])


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=12))
def test_one_machine_never_incriminates_itself(steps: list[tuple[bool, bool]]) -> None:
    """Whatever it does: restart, reboot, answer at once."""
    told, counter, boot, clock = [], 1, 0, 0
    for reboots, restarts in steps:
        boot += reboots
        counter += reboots or restarts
        told.append(seen(counter, f"b{boot}", "S", clock + 1, clock + 2))
        clock += 2
    assert clones(told) == ()


def test_a_copied_directory_is_found_when_both_have_started_again(tmp_path: Path) -> None:
    """Two real directories, one copied from the other: both take the same next number."""
    import shutil

    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    lived(one, enroll(one), "b0")
    shutil.copytree(one, two)
    told = [Sighting(lived(home, load(home), boot), where=home) for home, boot in
            ((one, "b1"), (two, "b2"))]  # fmt: skip
    (found,) = clones(told)
    assert isinstance(found, Clone)
    assert found.where == (one, two)


def test_the_earliest_of_all_later_numbers_counts_and_not_the_next_ones() -> None:
    """Number 2 answers late, what it was asked in time; number 3 was heard long before number 1."""
    late = [seen(2, "a", asked=4, heard=20), seen(3, "a", asked=1, heard=5)]
    assert clones(late) == ()
    (found,) = clones([seen(1, "a", asked=10, heard=11), *late])
    assert found.why == "number 1 answers a challenge that was put after a later one was heard"
