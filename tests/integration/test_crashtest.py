"""Shows what ``handfast crashtest`` says of a storage: of a sound one, of memory, of one that lies.

The lying ones are real: a file system of our own that loses what was not synced when its power is
cut (`tests/crash/lossyfs.py`), and doors to the disk that break one promise each.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from handfast.cli.main import app
from handfast.errors import Damaged, HandfastError
from handfast.store.files import Posix
from handfast.testing import storage

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
        storage._write(root, tell, Posix())
    assert storage._lost(root, said) == ""
    assert "not in the journals" in storage._lost(root, [*said, 99])
    (data,) = tmp_path.glob("**/chunks/*-3.*")
    whole = data.read_bytes()
    data.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(Damaged, match="differs from its hash"):
        storage._lost(root, said)
    data.write_bytes(whole)
    (manifest,) = tmp_path.glob("**/*-3.manifest")
    manifest.unlink()
    assert "manifest is gone" in storage._lost(root, said)


def test_wrong_use_and_no_look(tmp_path: Path) -> None:
    """Shows the exit codes: 2 for a wrong command, 3 where nothing could be looked at."""
    assert crashtest(tmp_path, "--plug", "--after", 3).exit_code == 2
    assert crashtest(tmp_path, "--kills", 0).exit_code == 2
    assert crashtest(tmp_path / "none").exit_code == 3
    assert crashtest(tmp_path, "--after", 0).exit_code == 3
    assert crashtest(tmp_path, "--after", 7).exit_code == 1  # what was told of is gone


def test_the_kernels_word_on_a_path_with_a_space(tmp_path: Path) -> None:
    """Shows that the file system is found by the place of the mount, whatever stands in it."""
    (tmp_path / "a b").mkdir()
    assert storage.medium(str(tmp_path / "a b")) == storage.medium(str(tmp_path))
    assert storage.medium("/proc").kind == "proc"


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
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            told = [writer.stdout.readline() for _ in range(3)]
            writer.kill()
        lossyfs.cut(point, seed)
        codes.append(crashtest(point, "--after", told[-1].strip()).exit_code)
        subprocess.run(["rm", "-rf", str(point / storage.LEFT)], check=True)
    assert codes == ([1, 1] if lies else [0, 0])


def test_writers_that_attest_nothing_show_nothing(tmp_path: Path) -> None:
    """All of no epochs is whole: on a disk that was too full that was called proof."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, hard))  # half an image
    try:
        with pytest.raises(HandfastError, match=r"ended by itself|no epoch was attested"):
            storage._killed_writers(str(tmp_path / "kills"), 3, seed=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_slow_storage_is_given_more_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until epochs are attested at all; and where none ever is, that is an error."""
    given: list[float] = []

    def slow(home: str, after_s: float) -> list[int]:
        given.append(after_s)
        return []

    monkeypatch.setattr(storage, "_until_killed", slow)
    monkeypatch.setattr(storage, "_lost", lambda home, told: "")
    with pytest.raises(HandfastError, match="no epoch was attested before any of 20 kills"):
        storage._killed_writers(str(tmp_path / "kills"), 12, seed=0)
    assert max(given) > 1.0
