"""Shows that a process which ends while it is looked at is gone, and makes nothing unknown."""

from __future__ import annotations

import builtins
import ctypes
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from inventorykit import machine

from handfast.fleet.inventory import host as module
from handfast.fleet.inventory.collect import take
from handfast.fleet.inventory.fabric import FABRIC_MANAGER, IMEX
from handfast.fleet.inventory.facts import State, Tier
from handfast.fleet.inventory.host import Host, here, mapped_files
from handfast.fleet.inventory.machine import PROC

pytestmark = pytest.mark.xdist_group("nv-fabricmanager")  # each sees the others' processes

CLONE3 = 435  # of all architectures (asm-generic/unistd.h)
CHURN = """
import os
while True:
    pids = [os.fork() or os._exit(0) for _ in range(20)]
    for pid in pids: os.waitpid(pid, 0)
"""
RESTLESS = """
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>
static int number(const char *name) {
    int read = 0; FILE *file = fopen(name, "r");
    if (file) { fscanf(file, "%d", &read); fclose(file); }
    return read;
}
static void note(const char *name, int value) {
    FILE *file = fopen(name, "w"); fprintf(file, "%d\\n", value); fclose(file);
}
int main(int count, char **words) {
    int times = number("times"), to[2]; char up;
    if (count > 1 && !times) { puts("Fabric Manager version is : 580.65.06"); return 0; }
    if (count > 1) {
        struct pollfd gone = {syscall(SYS_pidfd_open, number("pid"), 0), POLLIN, 0};
        kill(number("pid"), SIGKILL); poll(&gone, 1, 10000); note("times", times - 1);
    }
    pipe(to);
    if (!fork()) {
        prctl(PR_SET_NAME, "nv-fabricmanager");
        setsid(); close(0); close(1); close(2);
        note("pid", getpid()); write(to[1], "x", 1);
        for (;;) pause();
    }
    read(to[0], &up, 1);
    return count > 1;
}
"""


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process of ours that does nothing."""
    with subprocess.Popen(["sleep", "60"]) as running:
        yield running
        running.kill()


def end(running: subprocess.Popen[bytes]) -> None:
    """Kill it and reap it, so that nothing of it is left."""
    running.kill()
    running.wait(10)


@pytest.fixture
def ends_once_opened(
    monkeypatch: pytest.MonkeyPatch, sleeper: subprocess.Popen[bytes]
) -> Callable[[], None]:
    """Have the process end between a file's open and its read, from now on."""

    def opening(*arguments: Any, **named: Any) -> Any:
        file = builtins.open(*arguments, **named)  # noqa: SIM115 - whoever asked closes it
        end(sleeper)
        return file

    return lambda: monkeypatch.setattr(module, "open", opening, raising=False)


@pytest.mark.parametrize("name", ["comm", "status", "stat", "limits"])
def test_a_process_that_ends_between_open_and_read_is_gone(
    name: str, sleeper: subprocess.Popen[bytes], ends_once_opened: Callable[[], None]
) -> None:
    """The kernel says ESRCH then, and ENOENT to who opens it later."""
    host, path = here(), f"/proc/{sleeper.pid}/{name}"
    assert host.data(path, PROC)
    ends_once_opened()
    assert host.data(path, PROC) is None
    assert sleeper.returncode == -signal.SIGKILL
    assert host.data(path, PROC) is None
    assert host.names(f"/proc/{sleeper.pid}/ns", PROC) is None


def test_the_environment_of_a_process_that_ends_is_empty(
    sleeper: subprocess.Popen[bytes], ends_once_opened: Callable[[], None]
) -> None:
    """The kernel knows no error there."""
    host, path = here(), f"/proc/{sleeper.pid}/environ"
    ends_once_opened()
    assert not host.data(path, PROC)
    assert host.data(path, PROC) is None


def test_a_directory_of_a_process_that_has_ended_is_gone(
    sleeper: subprocess.Popen[bytes],
) -> None:
    """Also where it was found while there was somebody."""
    fd = os.open(f"/proc/{sleeper.pid}", os.O_RDONLY | os.O_DIRECTORY)
    try:
        through = Host(root=f"/proc/self/fd/{fd}")
        assert through.names("/ns", "/")
        assert through.data("/comm", "/")
        end(sleeper)
        assert through.names("/task", "/") is None
        assert through.data("/comm", "/") is None
    finally:
        os.close(fd)


def test_the_maps_of_a_process_that_ends_are_an_error_of_the_system(
    sleeper: subprocess.Popen[bytes], ends_once_opened: Callable[[], None]
) -> None:
    """As the function says; the inventory itself asks for its own maps alone."""
    ends_once_opened()
    with pytest.raises(ProcessLookupError):
        mapped_files(str(sleeper.pid))
    with pytest.raises(FileNotFoundError):
        mapped_files(str(sleeper.pid))


def test_forks_all_around_make_no_manager_unknown() -> None:
    """Thousands of processes begin and end while it is looked for, some between open and read:
    one in 13 looks met one that did."""
    words = (sys.executable, "-c", CHURN)
    churn = [subprocess.Popen(words, start_new_session=True) for _ in range(3)]
    try:
        told = {fact for _ in range(80) for fact in IMEX.collect(here())}
    finally:
        for each in churn:
            os.killpg(each.pid, signal.SIGKILL)
            each.wait(10)
    (found,) = told
    assert found.state is State.ABSENT or "only the processes of a container" in found.problem


def fork_as(pid: int, program: str) -> bool:
    """Run a program as a child with this number; False where another has it already (clone3(2)).

    Raises PermissionError for who may not choose.
    """
    number = (ctypes.c_int * 1)(pid)
    # struct clone_args of linux/sched.h, Linux 6.12: exit_signal, set_tid and set_tid_size are set
    words = (0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, ctypes.addressof(number), 1, 0)
    given = (ctypes.c_uint64 * len(words))(*words)
    child = ctypes.CDLL(None, use_errno=True).syscall(CLONE3, given, ctypes.sizeof(given))
    if child == 0:
        try:
            os.execv(program, [program, "60"])  # noqa: S606 - no shell is wanted
        finally:
            os._exit(1)
    if ctypes.get_errno() == errno.EPERM and child < 0:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
    return child == pid


def test_who_has_a_managers_number_next_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends between the last look at it and its program's run, and a stranger gets its number."""
    run, programs = Host.run, [str(tmp_path / name) for name in ("nv-fabricmanager", "stranger")]
    for program in programs:
        shutil.copy(shutil.which("sleep") or "sleep", program)
    for _ in range(20):  # whoever forks all the while may be first at the number
        manager = subprocess.Popen([programs[0], "60"])
        while not Path(f"/proc/{manager.pid}/comm").read_text().startswith("nv-fabric"):
            time.sleep(0.001)  # Linux closes what Popen waits for before it renames a process
        strangers = []

        def late(
            host: Host, *command: str, manager: Any = manager, strangers: Any = strangers
        ) -> str:
            end(manager)
            strangers.append(fork_as(manager.pid, programs[1]))
            return run(host, *command)

        monkeypatch.setattr(Host, "run", late)
        try:
            (found,) = FABRIC_MANAGER.collect(here())
        except PermissionError:
            pytest.skip("a number of a process can't be chosen here: that takes root")
        finally:
            end(manager)
            if any(strangers):
                os.kill(manager.pid, signal.SIGKILL)
                os.waitpid(manager.pid, 0)
        if strangers != [False]:
            break
    assert strangers == [True]
    assert found.problem == f"`/proc/{manager.pid}/exe --version`: No such process (ESRCH)"


def test_a_manager_that_has_ended_does_not_run(tmp_path: Path) -> None:
    """Its files are gone, or it is a zombie that nobody has reaped yet."""
    host = machine("hgx", tmp_path)
    status = tmp_path / "proc/4242/status"
    status.write_text(status.read_text().replace("State:\tS (sleeping)", "State:\tZ (zombie)"))
    found = take(host, tiers=[Tier.FABRIC]).get("fabric-manager.version")
    assert (found.state, found.problem) == (State.ABSENT, "")
    status.unlink()
    assert take(host, tiers=[Tier.FABRIC]).get("fabric-manager.version").state is State.ABSENT


@pytest.fixture
def restless(tmp_path: Path) -> Iterator[Callable[[int], None]]:
    """Begin a manager that ends, and leaves another one, each time it is asked, so many times."""
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    source, program = tmp_path / "service.c", tmp_path / "nv-fabricmanager"
    source.write_text(RESTLESS)
    subprocess.run(["cc", "-o", program, source], check=True, timeout=60)

    def begin(times: int) -> None:
        (tmp_path / "times").write_text(f"{times}\n")
        subprocess.run([program], cwd=tmp_path, check=True, timeout=10)

    yield begin
    pid = int((tmp_path / "pid").read_text())
    held = os.pidfd_open(pid)
    assert os.readlink(f"/proc/{pid}/exe") == str(program)  # and not who has its number by now
    signal.pidfd_send_signal(held, signal.SIGKILL)
    os.close(held)


def test_a_manager_that_is_restarted_when_it_is_asked_is_asked_again(
    restless: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is there then counts."""
    monkeypatch.chdir(tmp_path)
    restless(1)
    (found,) = FABRIC_MANAGER.collect(here())
    assert found.value == "580.65.06"


def test_a_manager_that_always_ends_when_it_is_asked_is_unknown(
    restless: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked for a few times, and not for ever."""
    monkeypatch.chdir(tmp_path)
    restless(1000)
    (found,) = FABRIC_MANAGER.collect(here())
    assert found.state is State.UNKNOWN
    assert "ended with 1" in found.problem
    assert 990 < int((tmp_path / "times").read_text()) < 1000
