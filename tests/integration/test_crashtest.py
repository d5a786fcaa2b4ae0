"""Shows what ``handfast crashtest`` says of a storage: of a sound one, of memory, of one that lies.

The lying ones are real: a file system of our own that loses what was not synced when its power is
cut (`tests/crash/lossyfs.py`), and doors to the disk that break one promise each.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from handfast.cli.main import app
from handfast.errors import Damaged, HandfastError
from handfast.store.files import Posix
from handfast.store.pins import Holder, _start_of
from handfast.testing import storage, writer
from handfast.testing.medium import medium

sys.path.insert(0, str(Path(__file__).parents[1] / "crash"))
import lossyfs


@pytest.fixture(autouse=True)
def _few(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer rounds than users get: a fork of this process takes long."""
    if request.node.name != test_a_disk_is_trusted_with_killed_processes_and_no_more.__name__:
        monkeypatch.setattr(storage, "ROUNDS", 8)
        monkeypatch.setattr(storage, "REPLACED", 100)


def crashtest(*argv: object) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(app, ["crashtest", *map(str, argv)])


@pytest.mark.parametrize(
    "wrong", [["--plug", "--kills", "3"], ["--after", "1", "--seed", "2"], ["--plug", "--json"]]
)
def test_what_does_not_go_together_is_wrong_usage(tmp_path: Path, wrong: list[str]) -> None:
    """Shows that no option is passed over in silence, and that nothing is written."""
    told = CliRunner().invoke(app, ["crashtest", str(tmp_path), *wrong])
    assert told.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_a_disk_is_trusted_with_killed_processes_and_no_more(tmp_path: Path) -> None:
    """Shows that all trials hold on a plain disk, and that power losses are not claimed."""
    found = crashtest(tmp_path, "--kills", 3)
    assert found.exit_code == 0, found.output
    assert found.output.count("holds") == len(storage.TRIALS) + 1
    assert "can be trusted with: processes that are killed" in found.output
    assert "was not tried: power loss" in found.output
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="there is no /dev/shm to write to")
def test_memory_is_never_trusted_with_a_restart() -> None:
    """Shows that what holds on tmpfs does not make it a place for checkpoints."""
    found = crashtest("/dev/shm", "--json", "--kills", 1)
    assert found.exit_code == 1
    answer = json.loads(found.output)
    assert answer["kind"] == "tmpfs"
    assert all(trial["holds"] for trial in answer["trials"])
    assert not answer["trustworthy"]
    assert "memory" in answer["may_not"][0]
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(storage.PREFIX)]


def mounts(argv: list[str]) -> bool:
    return subprocess.run(["mount", *argv], capture_output=True, check=False).returncode == 0


def test_an_overlay_that_ignores_syncs_is_not_trusted(tmp_path: Path) -> None:
    """Shows that the file system of most containers is told by its name and its options."""
    for name in ("lower", "upper", "work", "both"):
        (tmp_path / name).mkdir()
    options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    both = str(tmp_path / "both")
    if not mounts(["-t", "overlay", "overlay", "-o", f"{options},volatile", both]):
        pytest.skip("no overlay can be mounted here")
    try:
        found = crashtest(both, "--json", "--kills", 1)
    finally:
        subprocess.run(["umount", both], check=True)
    answer = json.loads(found.output)
    assert answer["kind"] == "overlay"
    assert all(trial["holds"] for trial in answer["trials"])
    assert (found.exit_code, answer["trustworthy"]) == (1, False)


def overwrites(_: Posix, path: str) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT)


def takes_away_first(_: Posix, source: str, target: str) -> None:
    os.unlink(target)
    os.sched_yield()
    os.rename(source, target)


def makes_anyway(path: str, mode: int = 0o777) -> None:
    os.makedirs(path, exist_ok=True)


def links_anyway(source: str, target: str) -> None:
    os.path.lexists(target) or os.symlink(source, target)


BROKEN: list[tuple[str, object, str, Callable[..., object]]] = [
    ("exclusive files", Posix, "create", overwrites),
    ("exclusive links", storage.os, "link", links_anyway),
    ("renames replace", Posix, "rename", takes_away_first),
    ("syncs", Posix, "fsync_dir", lambda *_: os.close(-1)),
    ("locks", fcntl, "flock", lambda *_: None),
    ("names lead back", Posix, "leads_to", lambda *_: False),
    ("seen at once", storage, "write_file", lambda *_: None),
]


@pytest.mark.parametrize(("trial", "where", "name", "broken"), BROKEN, ids=lambda x: str(x)[:20])
def test_each_trial_can_fail(
    trial: str,
    where: object,
    name: str,
    broken: Callable[..., object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shows that a storage without one of the promises is found out, and by which."""
    monkeypatch.setattr(where, name, broken)
    (tmp_path / "home").mkdir()
    try:
        holds, seen = storage.TRIALS[trial][0](str(tmp_path / "home"))
    except OSError:  # as `try_out` has it
        holds, seen = False, "it failed"
    assert not holds, seen


def test_a_directory_that_several_may_make_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows the same of exclusive directories, whose call the test itself needs."""
    trial = storage.TRIALS["exclusive directories"][0]
    for name in ("sound", "broken"):
        (tmp_path / name).mkdir()
    assert trial(f"{tmp_path}/sound")[0]
    held, seen = storage._race(f"{tmp_path}/broken", makes_anyway)
    assert not held, seen


def test_an_epoch_that_a_killed_writer_had_attested_is_missed(tmp_path: Path) -> None:
    """Shows that a lost record, a flipped byte and a lost manifest are each found."""
    root = str(tmp_path / "run")
    said: list[int] = []

    def tell(line: str) -> None:
        if line != "writing":
            said.append(int(line))
        if len(said) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        writer.write(root, tell, Posix())
    assert writer.lost(root, 3) == ""
    assert "not in the journals: 96 epochs from 4 on" in writer.lost(root, 99)
    (data,) = tmp_path.glob("**/chunks/*-3.*")
    whole = data.read_bytes()
    data.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(Damaged, match="differs from its hash"):
        writer.lost(root, 3)
    data.write_bytes(whole)
    (manifest,) = tmp_path.glob("**/*-3.manifest")
    manifest.unlink()
    assert "manifest is gone" in writer.lost(root, 3)


def plugged(path: Path, last: int) -> Path:
    """What --plug leaves where it is ended once it has told so many epochs."""

    def tell(line: str) -> None:
        if line == str(last + 1):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        writer.plug(str(path), tell)
    return path / writer.LEFT


def test_after_any_number_that_was_told_a_sound_disk_is_sound(tmp_path: Path) -> None:
    """Shows it for every N: what was released since it was told is no loss. It was called one."""
    home = plugged(tmp_path, 7)
    kept = tmp_path / "kept"
    for n in range(8):
        shutil.copytree(home, kept)
        found = crashtest(tmp_path, "--after", n)
        assert found.exit_code == 0, found.output
        assert not home.exists()
        kept.rename(home)
    found = crashtest(tmp_path, "--after", 9)
    assert found.exit_code == 1
    assert "1 epochs from 9 on, unless 9 is more than was ever told" in found.output


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "of a power loss that shows nothing"),
        ({"boot": "another"}, "behind a restart: a power loss, if the plug was pulled"),
        ({"boot": "another", "host": "elsewhere"}, "seen from another host"),
        (None, "who wrote it can't be read"),
    ],
)
def test_after_says_what_it_shows(
    tmp_path: Path, change: dict[str, str] | None, words: str
) -> None:
    """Shows that a writer which was only ended is no power loss: it was called one."""
    note = plugged(tmp_path, 3) / writer.HOLDER
    wrote = msgspec.json.decode(note.read_bytes(), type=Holder)
    if change is None:
        note.write_bytes(b"[")
    else:
        note.write_bytes(msgspec.json.encode(msgspec.structs.replace(wrote, **change)))
    found = crashtest(tmp_path, "--after", 3)
    assert (found.exit_code, words in " ".join(found.output.split())) == (0, True), found.output


@pytest.mark.parametrize("lost", [6, 7, 8])
def test_after_a_number_that_was_told_a_lost_epoch_is_missed(tmp_path: Path, lost: int) -> None:
    """Shows it for each that was not released, whatever number is asked for."""
    home = plugged(tmp_path, 7)
    (manifest,) = home.glob(f"**/*-{lost}.manifest")
    manifest.unlink()
    for n in range(9):
        found = crashtest(tmp_path, "--after", n)
        assert found.exit_code == 1
        assert f"the manifest is gone: {lost}" in found.output


def test_a_number_far_above_all_is_told_in_a_line(tmp_path: Path) -> None:
    """Shows that what is missing is counted, not listed: it took memory without end."""
    plugged(tmp_path, 3)
    found = crashtest(tmp_path, "--after", 10**11)
    assert found.exit_code == 1
    assert "99999999996 epochs from 5 on" in found.output
    assert len(found.output) < 1000


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["--plug", "--after", 3], 2, "choose one of --plug and --after N"),
        (["--kills", 0], 2, "'--kills': 0 is not in the range"),
        (["--after", -1], 2, "'--after': -1 is not in the range"),
        (["--after", 0], 3, "is not there: --plug was never begun"),
        (["--after", 7], 3, "or all that it wrote is gone"),
    ],
)
def test_wrong_use_and_no_look(tmp_path: Path, argv: list[object], code: int, said: str) -> None:
    """Shows the exit codes: 2 for a wrong command, 3 where nothing could be looked at."""
    found = crashtest(tmp_path, *argv)
    assert found.exit_code == code
    assert said in found.output


def test_a_place_where_nothing_can_be_made_is_said_to_be_one(tmp_path: Path) -> None:
    """Shows that no trial is begun there, and that it is no verdict."""
    assert crashtest(tmp_path / "none").exit_code == 3
    found = crashtest("/proc")
    assert found.exit_code == 3
    assert "/proc: nothing can be made there" in found.output


@pytest.mark.parametrize("process", ["dead", "alive"])
def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path, process: str) -> None:
    """Shows it where its maker has provably ended, and that a living one's is left alone."""
    with subprocess.Popen(["sleep", "60"]) as other:
        with storage.scratch(str(tmp_path)) as made:
            held = msgspec.json.decode(Path(made, storage.HOLDER).read_bytes(), type=Holder)
            started = _start_of(str(other.pid))
            theirs = msgspec.structs.replace(held, pid=other.pid, started=started)
            left = tmp_path / f"{storage.PREFIX}other"
            left.mkdir()
            (left / storage.HOLDER).write_bytes(msgspec.json.encode(theirs))
        if process == "dead":
            other.kill()
            other.wait()
        with storage.scratch(str(tmp_path)):
            assert left.exists() == (process == "alive")
        other.kill()


def wants_it_writable(fd: int, operation: int) -> None:
    """As NFS has it: an exclusive lock is a write lock of the whole file."""
    mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    if operation & fcntl.LOCK_EX and mode == os.O_RDONLY:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    FLOCK(fd, operation)


def fails_in_children(fd: int, operation: int, here: int = os.getpid()) -> None:
    """A lock that nobody else can ask for."""
    if os.getpid() != here:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    FLOCK(fd, operation)


FLOCK = fcntl.flock


@pytest.mark.parametrize(
    ("flock", "holds", "seen"),
    [
        (wants_it_writable, True, "held against others, and given back"),
        (fails_in_children, False, "not tried: another process that asked for it met an error"),
        (lambda *_: None, False, "not held: two had it at once"),
    ],
    ids=["nfs", "errors", "nothing"],
)
def test_a_lock_is_asked_for_as_the_store_does(
    flock: Callable[..., None],
    holds: bool,
    seen: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shows that no error passes for being shut out, and that the words are the verdict's."""
    monkeypatch.setattr(fcntl, "flock", flock)
    assert storage._locks(str(tmp_path)) == (holds, seen)


def test_a_writer_that_ends_by_itself_says_why_in_a_line(tmp_path: Path) -> None:
    """Shows it for one that can't write, and that one whom nobody hears any more just ends."""
    (tmp_path / "domains").write_bytes(b"")
    argv = [sys.executable, "-m", "handfast.testing.writer", str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "make the domain's directory" in done.stderr
    argv[-1] = str(tmp_path / "run")
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as deaf:
        assert deaf.stdout is not None
        assert deaf.stderr is not None
        deaf.stdout.readline()
        deaf.stdout.close()
        assert deaf.stderr.read() == b""
        assert deaf.wait() == 0


def test_where_names_do_not_lead_back_that_is_the_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that a writer that can't work on such storage is one trial more that failed."""

    def ends(*_: object) -> list[int]:
        raise HandfastError("a process that writes there ended by itself")

    monkeypatch.setattr(storage, "_until_killed", ends)
    assert crashtest(tmp_path).exit_code == 3
    monkeypatch.setattr(Posix, "leads_to", lambda *_: False)
    found = crashtest(tmp_path)
    assert found.exit_code == 1
    assert "can't be trusted with: an owner notices" in found.output
    assert "ended by itself" in found.output


def test_the_kernels_word_on_a_path_with_a_space(tmp_path: Path) -> None:
    """Shows that the file system is found by the place of the mount, whatever stands in it."""
    (tmp_path / "a b").mkdir()
    assert medium(str(tmp_path / "a b")) == medium(str(tmp_path))
    assert medium("/proc").kind == "proc"


@pytest.mark.parametrize("seen", [True, False], ids=["seen", "hidden"])
@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="there is no /dev/shm to write to")
def test_an_overlay_on_memory_is_memory(tmp_path: Path, seen: bool) -> None:
    """Shows that the upper directory is followed; and where it can't be seen, that this is said."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        for path in (tmp_path / "lower", tmp_path / "both", Path(memory, "up"), Path(memory, "w")):
            path.mkdir()
        options = f"lowerdir={tmp_path}/lower,upperdir={memory}/up,workdir={memory}/w"
        both = str(tmp_path / "both")
        if not mounts(["-t", "overlay", "overlay", "-o", options, both]):
            pytest.skip("no overlay can be mounted here")
        try:
            if not seen:
                Path(memory, "up").rename(Path(memory, "away"))
            found = medium(both)
        finally:
            subprocess.run(["umount", both], check=True)
    assert found.volatile == seen
    if seen:
        assert str(found) == "overlay (overlay) on tmpfs (tmpfs)"
    else:
        assert "can't be seen from here: whether that is memory is not known" in found.warnings()[0]


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="there is no /dev/shm to write to")
def test_a_loop_device_on_memory_is_memory(tmp_path: Path) -> None:
    """Shows that the file behind a loop device is followed to what that lies on."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as image:
        if not shutil.which("mkfs.ext4"):
            pytest.skip("there is no mkfs.ext4")
        image.truncate(32 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", image.name], check=True)
        if not mounts(["-o", "loop", image.name, str(tmp_path)]):
            pytest.skip("no loop device can be mounted here")
        try:
            found = medium(str(tmp_path))
        finally:
            subprocess.run(["umount", str(tmp_path)], check=True)
    assert found.kind == "ext4"
    assert found.volatile
    assert str(found).endswith("on tmpfs (tmpfs)")


@pytest.fixture(params=[False, True], ids=["honest", "lying"])
def lossy(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, bool]]:
    """A mounted file system that loses what was not synced; or whatever it swore to."""
    if why := lossyfs.unavailable():
        pytest.skip(why)
    with lossyfs.mounted(tmp_path, lies=request.param) as point:
        yield point, request.param


def test_only_a_pulled_plug_finds_a_lie_about_syncs(lossy: tuple[Path, bool]) -> None:
    """Shows that killed writers can't tell a liar from an honest disk, and that --plug does."""
    point, lies = lossy
    if lies:
        found = crashtest(point, "--kills", 1)
        assert found.exit_code == 0, found.output
        assert os.listdir(point) == []
    codes = []
    for seed in range(2):
        argv = [sys.executable, "-m", "handfast", "crashtest", str(point), "--plug"]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            told = [process.stdout.readline() for _ in range(3)]
            process.kill()
        lossyfs.cut(point, seed)
        codes.append(crashtest(point, "--after", told[-1].strip()).exit_code)
        subprocess.run(["rm", "-rf", str(point / writer.LEFT)], check=True)
    # where all is gone, the directory too, nobody can tell that from one that never was
    assert set(codes) <= {1, 3} if lies else codes == [0, 0]


def test_writers_that_attest_nothing_show_nothing(tmp_path: Path) -> None:
    """All of no epochs is whole: on a disk that was too full that was called proof."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, hard))  # half an image
    try:
        with pytest.raises(HandfastError, match=r"ended by itself|no epoch was attested"):
            storage._killed_writers(str(tmp_path / "kills"), 3, seed=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ([[1, 2]], "1 kill, 2 epochs attested"),
        ([[], [1]], "2 kills (1 more than asked for: none was attested), 1 epoch attested"),
    ],
)
def test_more_kills_than_asked_for_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[list[int]], said: str
) -> None:
    """Shows why `--kills 1` may kill twice: a writer that had attested nothing shows nothing."""
    monkeypatch.setattr(storage, "_until_killed", lambda *_: told.pop(0))
    monkeypatch.setattr(storage, "lost", lambda home, told: "")
    assert storage._killed_writers(str(tmp_path / "kills"), 1, seed=0).seen.startswith(said)
    assert "more, while none has attested anything" in " ".join(crashtest("--help").output.split())


def test_slow_storage_is_given_more_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until epochs are attested at all; and where none ever is, that is an error."""
    given: list[float] = []

    def slow(home: str, after_s: float) -> list[int]:
        given.append(after_s)
        return []

    monkeypatch.setattr(storage, "_until_killed", slow)
    monkeypatch.setattr(storage, "lost", lambda home, told: "")
    with pytest.raises(HandfastError, match="no epoch was attested before any of 20 kills"):
        storage._killed_writers(str(tmp_path / "kills"), 12, seed=0)
    assert max(given) > 1.0
