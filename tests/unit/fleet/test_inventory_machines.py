"""Shows what is found on recorded machines, and on this one."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from inventorykit import RECORDED, machine, told

from handfast.fleet.inventory.collect import take
from handfast.fleet.inventory.facts import Kind, State, Tier
from handfast.fleet.inventory.host import Host, Unsure, here, mapped_files

SERVICE = """
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>
int main(int count, char **words) {
    if (count > 1) {
        close(creat("MARKER", 0600)); puts("Fabric Manager version is : VERSION"); return 0;
    }
    puts("up"); fflush(stdout);
    for (;;) pause();
}
"""


@pytest.mark.parametrize("name", RECORDED)
def test_no_recorded_machine_breaks_a_collector(name: str, tmp_path: Path) -> None:
    """None is ended, none crashes, and each fact is one that was announced."""
    taken = told(name, tmp_path, Tier.HOST, Tier.FABRIC)
    assert not [fact.problem for fact in taken.facts if fact.problem.startswith("collector ")]
    assert not [fact for fact in taken.facts if fact.name.startswith("collector.")]
    assert len(taken.facts) >= 21


def test_a_virtual_machine_has_no_gpu_and_says_so(tmp_path: Path) -> None:
    """Known to be absent, which is something else than unknown."""
    taken = told("cpu-vm", tmp_path, Tier.HOST, Tier.FABRIC)
    for name in ("gpu.driver", "gpu.count", "gpu.vbios", "fabric-manager.version", "nic",
                 "ofed.version", "board.serial", "ethernet.virtio_net.firmware"):  # fmt: skip
        assert taken.get(name).state is State.ABSENT, name
    assert taken.get("kernel.release").value == "6.12.9-amd64"
    assert taken.get("cpu.vendor").value == "GenuineIntel"
    assert taken.get("board.model").value == "Standard PC (Q35 + ICH9, 2009)"
    assert taken.get("ethernet").value == "virtio_net"
    assert taken.unknown(Tier.HOST) == taken.unknown(Tier.FABRIC) == ()


def test_a_node_with_eight_gpus_is_read_whole(tmp_path: Path) -> None:
    """Driver, firmware of GPUs and NICs, Fabric Manager; one value where all devices agree."""
    taken = told("hgx", tmp_path, Tier.HOST, Tier.FABRIC)
    values = {fact.name: fact.value for fact in taken.facts if fact.value is not None}
    assert values["gpu.driver"] == values["gpu.driver-on-disk"] == "580.65.06"
    assert values["gpu.driver-flavour"] == "open"
    assert values["gpu.count"] == "8"
    assert values["gpu.model"] == "NVIDIA H100 80GB HBM3"
    assert values["gpu.vbios"] == "96.00.99.00.01"
    assert values["gpu.gsp"] == "580.65.06"
    assert values["fabric-manager.version"] == "580.65.06"
    assert values["nic"] == "MT_0000000838 (8), MT_0000000884 (1)"
    assert values["nic.MT_0000000838.firmware"] == "28.39.1002"
    assert values["nic.MT_0000000884.firmware"] == "32.39.2048"
    assert values["ethernet.mlx5_core.firmware"] == "32.39.2048 (MT_0000000884)"
    assert values["ofed.version"] == "24.10-0.7.0"
    assert taken.get("imex.version").state is State.ABSENT
    assert taken.unknown(Tier.HOST) == taken.unknown(Tier.FABRIC) == ()


def test_one_gpu_of_other_firmware_is_a_mixture_in_the_node(tmp_path: Path) -> None:
    """It can't be taken for a version."""
    host = machine("hgx", tmp_path)
    path = tmp_path / "proc/driver/nvidia/gpus/0000:39:00.0/information"
    path.write_text(path.read_text().replace("96.00.99.00.01", "96.00.9F.00.04"))
    value = take(host, tiers=[Tier.HOST]).get("gpu.vbios").value
    assert value == "96.00.99.00.01 (7), 96.00.9F.00.04 (1)"


def test_a_driver_that_was_upgraded_on_the_disk_is_not_the_one_that_runs(tmp_path: Path) -> None:
    """The loaded module's version counts; what is on the disk is told, and changes no digest."""
    before = told("hgx", tmp_path / "before", Tier.HOST)
    after = told("upgraded-on-disk", tmp_path / "after", Tier.HOST)
    assert after.get("gpu.driver").value == "580.65.06"
    disk = after.get("gpu.driver-on-disk")
    assert (disk.value, disk.kind) == ("590.48.01", Kind.IGNORED)
    assert after.digest(Tier.HOST) == before.digest(Tier.HOST)


def test_a_manager_whose_file_was_replaced_is_asked_itself(tmp_path: Path) -> None:
    """And the answer says that its file is another one by now."""
    found = told("manager-replaced", tmp_path, Tier.FABRIC).get("fabric-manager.version")
    assert found.value == "580.65.06"
    assert "replaced since" in found.source


def test_a_container_does_not_take_what_it_can_not_see_for_absent(tmp_path: Path) -> None:
    """No /sys: nothing is known of NICs. Its own processes only: nothing of Fabric Manager."""
    taken = told("container", tmp_path, Tier.HOST, Tier.FABRIC)
    for name, reason in (
        ("nic", "/sys/class can't be seen"),
        ("nic.MT_0000000838.firmware", "/sys/class can't be seen"),
        ("ethernet", "/sys/class can't be seen"),
        ("ofed.version", "/sys/module can't be seen"),
        ("board.bios", "/sys/class can't be seen"),
        ("fabric-manager.version", "only the processes of a container"),
        ("imex.version", "only the processes of a container"),
    ):
        fact = taken.get(name)
        assert fact.state is State.UNKNOWN, name
        assert reason in fact.problem, name
    assert taken.get("gpu.driver").value == "580.65.06"


def test_a_program_of_another_user_is_not_run(tmp_path: Path) -> None:
    """Anybody may call his process so. Beside root's own it counts for nothing."""
    host = machine("hgx", tmp_path)
    other = tmp_path / "proc/666"
    shutil.copytree(tmp_path / "proc/4242", other, symlinks=True)
    (other / "status").write_text("Uid:\t0\t4001\t0\t0\n")
    assert take(host, tiers=[Tier.FABRIC]).get("fabric-manager.version").value == "580.65.06"
    shutil.rmtree(tmp_path / "proc/4242")
    problem = take(host, tiers=[Tier.FABRIC]).get("fabric-manager.version").problem
    assert "process 666 is of another user than root" in problem
    (other / "status").write_text("Name:\tnv-fabricmanage\n")
    problem = take(host, tiers=[Tier.FABRIC]).get("fabric-manager.version").problem
    assert "names no user" in problem


def test_processes_that_are_hidden_are_not_taken_for_absent(tmp_path: Path) -> None:
    """/proc mounted with hidepid shows not even the first one."""
    host = machine("cpu-vm", tmp_path)
    shutil.rmtree(tmp_path / "proc/1")
    assert "hidepid" in take(host, tiers=[Tier.FABRIC]).get("imex.version").problem


@pytest.mark.parametrize(
    ("line", "driver", "flavour"),
    [
        ("NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023",
         "535.129.03", "proprietary"),
        ("NVIDIA UNIX Open Kernel Module for aarch64  580.65.06  Release Build  (b@c)",
         "580.65.06", "open"),
    ],
)  # fmt: skip
def test_both_flavours_of_the_driver_are_read(
    line: str, driver: str, flavour: str, tmp_path: Path
) -> None:
    """The open modules word their version otherwise."""
    host = machine("hgx", tmp_path)
    (tmp_path / "proc/driver/nvidia/version").write_text(f"NVRM version: {line}\n")
    taken = take(host, tiers=[Tier.HOST])
    assert taken.get("gpu.driver").value == driver
    assert taken.get("gpu.driver-flavour").value == flavour


def test_what_has_no_meaning_is_unknown(tmp_path: Path) -> None:
    """A version that can't be read, a GPU that was not initialised, a module without a version."""
    host = machine("hgx", tmp_path)
    home = tmp_path / "proc/driver/nvidia"
    (home / "version").write_text("NVRM version: something new\n")
    path = home / "gpus/0000:09:00.0/information"
    text = path.read_text().replace("96.00.99.00.01", "??.??.??.??.??")
    path.write_text("".join(line for line in text.splitlines(True) if "GPU Firmware" not in line))
    taken = take(host, tiers=[Tier.HOST])
    assert "can't be read as a driver's version" in taken.get("gpu.driver").problem
    assert "not initialised" in taken.get("gpu.vbios").problem
    assert "has no line `GPU Firmware`" in taken.get("gpu.gsp").problem
    assert taken.get("gpu.model").value == "NVIDIA H100 80GB HBM3"
    (home / "version").unlink()
    problem = take(host, tiers=[Tier.HOST]).get("gpu.driver").problem
    assert "the module is loaded" in problem


def test_a_gpu_that_uses_no_gsp_has_none(tmp_path: Path) -> None:
    """The driver says N/A."""
    host = machine("hgx", tmp_path)
    for path in (tmp_path / "proc/driver/nvidia/gpus").glob("*/information"):
        path.write_text(path.read_text().replace("580.65.06", "N/A"))
    assert take(host, tiers=[Tier.HOST]).get("gpu.gsp").state is State.ABSENT


def test_the_kernels_own_network_driver_is_no_ofed(tmp_path: Path) -> None:
    """It has no version, or the kernel's."""
    host = machine("hgx", tmp_path)
    path = tmp_path / "sys/module/mlx5_core/version"
    path.write_text("6.8.0-60-generic\n")
    assert take(host, tiers=[Tier.FABRIC]).get("ofed.version").value == "of the kernel"
    path.unlink()
    assert take(host, tiers=[Tier.FABRIC]).get("ofed.version").value == "of the kernel"


def test_a_nic_that_tells_no_firmware_is_unknown_and_no_other(tmp_path: Path) -> None:
    """Its board is listed all the same."""
    host = machine("hgx", tmp_path)
    (tmp_path / "sys/class/infiniband/mlx5_8/fw_ver").unlink()
    taken = take(host, tiers=[Tier.FABRIC])
    assert "its driver does not say" in taken.get("nic.MT_0000000884.firmware").problem
    assert taken.get("nic.MT_0000000838.firmware").value == "28.39.1002"


def test_a_command_that_was_not_recorded_is_unknown(tmp_path: Path) -> None:
    """As is one that would have to run on another root."""
    host = machine("hgx", tmp_path)
    silent = Host(root=host.root, commands={})
    assert "not recorded" in take(silent, tiers=[Tier.FABRIC]).get("ethernet").problem
    seen = take(here(host.root), tiers=[Tier.FABRIC])
    assert "machine itself only" in seen.get("fabric-manager.version").problem
    assert "machine itself only" in seen.get("ethernet").problem


def test_this_machine_is_described() -> None:
    """The real collectors, on whatever runs these tests."""
    taken = take(here(), tiers=[Tier.HOST, Tier.FABRIC])
    assert taken.get("kernel.release").value == platform.release()
    assert taken.get("host.name").kind is Kind.PER_NODE
    assert taken.get("cpu.vendor").state is not State.UNKNOWN
    lost = [f for f in taken.facts if f.problem.startswith("collector")]
    assert lost == []


def built(place: Path, *versions: str) -> list[Path]:
    """Programs that answer as Fabric Manager does, and leave a file `asked` here when they do."""
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    found = []
    for version in versions:
        source = place / f"{version}.c"
        program = SERVICE.replace("VERSION", version).replace("MARKER", f"{place}/asked")
        source.write_text(program)
        found.append(place / version)
        subprocess.run(["cc", "-o", found[-1], source], check=True, timeout=60)
    return found


@pytest.fixture
def service(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Two versions of a program that is named as Fabric Manager is; the first one runs."""
    older, newer = built(tmp_path, "580.65.06", "590.48.01")
    installed = older.rename(tmp_path / "nv-fabricmanager")
    with subprocess.Popen([installed], stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"up\n"
        yield installed, newer
        running.kill()


ALONE = pytest.mark.xdist_group("nv-fabricmanager")  # each sees the others' processes


@ALONE
def test_a_real_process_is_asked_though_its_file_was_replaced(
    service: tuple[Path, Path],
) -> None:
    """Its own version, not that of the file which has taken its place."""
    installed, newer = service
    before = take(here(), tiers=[Tier.FABRIC]).get("fabric-manager.version")
    assert before.value == "580.65.06"
    assert (installed.parent / "asked").exists()
    newer.rename(installed)
    asked = subprocess.run([installed, "--version"], capture_output=True, text=True, check=True)
    assert "590.48.01" in asked.stdout
    after = take(here(), tiers=[Tier.FABRIC]).get("fabric-manager.version")
    assert after.value == "580.65.06"
    assert "replaced since" in after.source


@ALONE
@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes namespaces")
@pytest.mark.parametrize("apart", ["--mount", "--pid --fork"])
def test_a_root_of_a_container_has_nothing_run_as_the_machines(apart: str, tmp_path: Path) -> None:
    """Its user is 0 as well, and its program would run with the machine's rights and files."""
    (program,) = built(tmp_path, "580.65.06")
    argv = ["unshare", *apart.split(), str(program.rename(tmp_path / "nv-fabricmanager"))]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, start_new_session=True) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"up\n"
        found = take(here(), tiers=[Tier.FABRIC]).get("fabric-manager.version")
        os.killpg(running.pid, signal.SIGKILL)
    assert found.state is State.UNKNOWN
    assert "runs in a container, so its program is not run here" in found.problem
    assert not (tmp_path / "asked").exists()


def test_a_real_interface_is_asked() -> None:
    """The loopback's driver has nothing to say; one that is not there is an error."""
    assert here().firmware("lo") in {("", ""), ("loopback", "")}
    with pytest.raises(Unsure, match=r"no-such0: ETHTOOL_GDRVINFO: No such device \(ENODEV\)"):
        here().firmware("no-such0")


def test_mapped_libraries_are_listed() -> None:
    """Of this process; of one that is gone an error."""
    assert any("libc.so" in path for path in mapped_files())
    assert mapped_files(str(os.getpid())) == mapped_files()
    with pytest.raises(FileNotFoundError):
        mapped_files("4194305")  # above the greatest number of a process on Linux
