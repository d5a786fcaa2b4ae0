"""Shows that a rank's libraries are asked themselves, the loaded before any that could be."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import handfast
from handfast.fleet.inventory.collect import take
from handfast.fleet.inventory.collector import OURS
from handfast.fleet.inventory.facts import Fact, Inventory, State, Tier
from handfast.fleet.inventory.host import Host, here

SOURCE = str(Path(handfast.__file__).parents[1])
CALLS = {
    "nccl": "int ncclGetVersion(int *v) { *v = %s; return 0; }",
    "broken": "int ncclGetVersion(int *v) { return %s; }",
    "crash": "int ncclGetVersion(int *v) { return *(int *)%s; }",
    "ucx": 'const char *ucp_get_version_string(void) { return "%s"; }',
    "libfabric": 'const char *fi_tostr(const void *d, int t) { return t == 18 ? "%s" : "?"; }',
    "cudart": "int cudaRuntimeGetVersion(int *v) { *v = %s; return 0; }",
    "empty": "int nothing = %s;",
}

Build = Callable[[str, str, str], Path]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Compile a library that answers one call: by path, kind of call, and answer."""
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")

    def make(path: str, call: str, answer: str) -> Path:
        library = tmp_path / path
        library.parent.mkdir(parents=True, exist_ok=True)
        source = CALLS[call] % answer
        command = ["cc", "-shared", "-fPIC", "-w", "-x", "c", "-", "-o", library]
        subprocess.run(command, input=source, text=True, check=True, timeout=60)
        return library

    return make


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let children find what these tests build, and nothing that this machine has besides."""
    monkeypatch.syspath_prepend(str(tmp_path / "wheels"))
    monkeypatch.setenv("PYTHONPATH", SOURCE)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path / "system"))
    for kind in ("NET", "GIN", "RMA", "TUNER", "PROFILER", "ENV"):
        monkeypatch.delenv(f"NCCL_{kind}_PLUGIN", raising=False)


def ask(*maps: Path | str, **environ: str) -> Inventory:
    """The job tier of a process that has these files mapped, and these variables."""
    host = Host(environ={**os.environ, **environ}, maps=tuple(map(str, maps)))
    return take(host, entries=[entry for entry in OURS if "libraries" in entry.target])


def fact(name: str, *maps: Path | str) -> Fact:
    """One fact of it."""
    return ask(*maps).get(name)


def test_what_is_mapped_wins_over_what_would_be_loaded(build: Build) -> None:
    """A rank that has loaded NCCL talks with that one, whatever lies beside it."""
    loaded = build("elsewhere/libnccl.so.2.21.5", "nccl", "22105")
    build("wheels/nvidia/nccl/lib/libnccl.so.2", "nccl", "22703")
    assert fact("nccl.version").value == "2.27.3"
    found = fact("nccl.version", loaded)
    assert found.value == "2.21.5"
    assert found.source == f"mapped in the process: {loaded}"


def test_two_versions_that_could_be_loaded_are_no_answer(build: Build) -> None:
    """Nobody can say which the process will take; once it has, it is known."""
    build("system/libnccl.so.2", "nccl", "22105")
    assert fact("nccl.version").value == "2.21.5"
    wheel = build("wheels/nvidia/nccl/lib/libnccl.so.2", "nccl", "22703")
    found = fact("nccl.version")
    assert found.state is State.UNKNOWN
    assert "2.27.3" in found.problem
    assert "2.21.5" in found.problem
    assert "load it, then ask again" in found.problem
    assert fact("nccl.version", wheel).value == "2.27.3"


def test_a_library_that_was_replaced_since_can_not_be_asked(build: Build) -> None:
    """What is at its path now is another one."""
    newer = build("elsewhere/libnccl.so.2", "nccl", "22703")
    found = fact("nccl.version", f"{newer} (deleted)")
    assert found.state is State.UNKNOWN
    assert "was replaced since the process loaded it" in found.problem


@pytest.mark.parametrize(
    ("code", "version"), [("2804", "2.8.4"), ("20906", "2.9.6"), ("23203", "2.32.3")]
)
def test_codes_of_nccl_are_read_as_its_header_makes_them(
    code: str, version: str, build: Build
) -> None:
    """They changed with 2.9."""
    assert fact("nccl.version", build("libnccl.so.2", "nccl", code)).value == version


def test_the_other_libraries_are_asked_by_their_own_calls(build: Build) -> None:
    """UCX, libfabric, the CUDA runtime; the driver's user half by its name."""
    build("system/libucp.so.0", "ucx", "1.22.0")
    build("system/libfabric.so.1", "libfabric", "1.17.0")
    build("wheels/nvidia/cuda_runtime/lib/libcudart.so.12", "cudart", "12090")
    real = build("system/libcuda.so.580.65.06", "empty", "1")
    (real.parent / "libcuda.so.1").symlink_to(real.name)
    taken = ask()
    values = {name: taken.get(f"{name}.version").value for name in
              ("ucx", "libfabric", "cuda.runtime", "cuda.driver")}  # fmt: skip
    assert values == {
        "ucx": "1.22.0",
        "libfabric": "1.17.0",
        "cuda.runtime": "12.9",
        "cuda.driver": "580.65.06",
    }
    assert taken.get("cuda.driver.path").value == str(real)


def test_no_library_is_absent_and_a_bad_one_unknown(build: Build) -> None:
    """One without the call, one whose call fails, one that takes its process down, no library."""
    assert fact("nccl.version").state is State.ABSENT
    for call, answer, words in (
        ("empty", "1", "ncclGetVersion"),
        ("broken", "3", "ncclGetVersion returned 3"),
        ("crash", "0", "died of SIGSEGV"),
    ):
        taken = ask(build("elsewhere/libnccl.so.2", call, answer))
        assert words in taken.get("nccl.version").problem
        assert taken.get("ucx.version").state is State.ABSENT
    system = build("system/libnccl.so.2", "empty", "1")
    system.write_bytes(b"no library")
    assert "is there and can't be loaded" in fact("nccl.version").problem
    assert "has no version of a driver" in fact("cuda.driver.version", "/x/libcuda.so").problem


def test_nccl_within_torch_is_unknown_and_not_absent() -> None:
    """A torch that is loaded and brings no library of that name may have NCCL linked in."""
    found = fact("nccl.version", "/torch/lib/libtorch_cuda.so")
    assert "may be a part of torch's own library" in found.problem


def test_a_process_finds_its_own(build: Build, tmp_path: Path) -> None:
    """A real process that has loaded one library and could load another."""
    loaded = build("elsewhere/libnccl.so.2", "nccl", "22105")
    build("system/libnccl.so.2", "nccl", "22703")
    program = f"""
import ctypes, json
from handfast.fleet.inventory.collect import take
from handfast.fleet.inventory.collector import OURS
from handfast.fleet.inventory.facts import Tier
from handfast.fleet.inventory.host import here
before = take(here(), tiers=[Tier.JOB]).get("nccl.version").value
ctypes.CDLL({str(loaded)!r})
after = take(here(), tiers=[Tier.JOB]).get("nccl.version").value
print(json.dumps([before, after]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(done.stdout) == ["2.27.3", "2.21.5"]


def test_plugins_are_known_by_their_content(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """They tell no version. Looked for under the names that NCCL tries; `none` is none."""
    default = build("system/libnccl-net.so", "empty", "1")
    assert fact("nccl.plugin.net").value == "libnccl-net"
    first = fact("nccl.plugin.net.content").value or ""
    assert re.fullmatch("sha256:[0-9a-f]{16}", first)
    build("system/libnccl-net.so", "empty", "2")
    assert fact("nccl.plugin.net").value == "libnccl-net"
    assert fact("nccl.plugin.net.content").value != first
    build("system/libnccl-net-ofi.so", "empty", "3")
    for name in ("ofi", "libnccl-net-ofi.so", str(default.parent / "libnccl-net-ofi.so")):
        monkeypatch.setenv("NCCL_NET_PLUGIN", name)
        assert fact("nccl.plugin.net").value == "libnccl-net-ofi"
    assert fact("nccl.plugin.net", default).value == "libnccl-net"
    for name in ("none", "gone"):
        monkeypatch.setenv("NCCL_NET_PLUGIN", name)
        assert fact("nccl.plugin.net").state is State.ABSENT
    for name in ("nccl.plugin.net", "nccl.plugin.net.content"):
        assert "replaced" in fact(name, f"{default} (deleted)").problem


def test_a_process_with_nccl_and_no_plugin_says_so(build: Build) -> None:
    """`none` is what NCCL uses then; a process without NCCL has no plugin, and not even none."""
    assert fact("nccl.plugin.net").state is State.ABSENT
    assert fact("nccl.plugin.net", "/torch/lib/libtorch_cuda.so").value == "none"
    loaded = build("elsewhere/libnccl.so.2", "nccl", "22105")
    assert fact("nccl.plugin.net", loaded).value == "none"
    build("system/libnccl.so.2", "nccl", "22703")
    assert fact("nccl.plugin.net").value == "none"
    assert fact("nccl.plugin.net.content").state is State.ABSENT


VERSION = """from typing import Optional
__version__ = '2.9.1+cu128'
debug = False
cuda: Optional[str] = '12.8'
git_version = '5811a8d7da873dd699ff6687092c225caffcf1bb'
hip: Optional[str] = None
"""


def test_torch_is_read_without_being_run(tmp_path: Path) -> None:
    """Its own record of its build; a torch that is loaded wins over the one on the disk."""
    package = tmp_path / "wheels/torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('torch was run')\n")
    (package / "version.py").write_text(VERSION)
    taken = ask()
    assert taken.get("torch.version").value == "2.9.1+cu128"
    assert taken.get("torch.cuda").value == "12.8"
    assert (taken.get("torch.git").value or "").startswith("5811a8d7")
    other = take(Host(modules={"torch": "2.8.0"}), tiers=[Tier.JOB])
    assert other.get("torch.version").value == "2.8.0"
    assert "2.9.1+cu128 is on the disk" in other.get("torch.cuda").problem
    same = take(Host(modules={"torch": "2.9.1+cu128"}), tiers=[Tier.JOB])
    assert same.get("torch.cuda").value == "12.8"
    for text, words in (("x = = 1", "invalid syntax"), ("x = 1", "names no version")):
        (package / "version.py").write_text(text)
        assert words in fact("torch.version").problem


def test_a_torch_without_cuda_has_none(tmp_path: Path) -> None:
    """As its wheels for processors say."""
    package = tmp_path / "wheels/torch"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "version.py").write_text(VERSION.replace("'12.8'", "None"))
    assert fact("torch.cuda").state is State.ABSENT


def test_libraries_of_another_root_are_unknown(tmp_path: Path) -> None:
    """A node's agent can't look into a rank's container."""
    taken = take(Host(root=str(tmp_path)), tiers=[Tier.JOB])
    for name in ("nccl.version", "nccl.plugin.net", "torch.version", "cuda.driver.version"):
        assert "on the machine itself only" in taken.get(name).problem, name


def test_this_process_is_described() -> None:
    """Whatever this machine has."""
    taken = take(here(), tiers=[Tier.JOB])
    assert not [f for f in taken.facts if f.problem.startswith("collector")]


def test_a_preloaded_library_of_another_name_is_no_guess(build: Build) -> None:
    """Calls go to it, whatever it is called, and what lies beside it is not asked."""
    build("wheels/nvidia/nccl/lib/libnccl.so.2", "nccl", "22703")
    other = build("elsewhere/nccl-of-ours.so", "nccl", "22105")
    found = ask(other, LD_PRELOAD=str(other)).get("nccl.version")
    assert found.state is State.UNKNOWN
    assert "is preloaded and has ncclGetVersion: call it libnccl.so.2" in found.problem
    noise = build("elsewhere/libmalloc.so", "ucx", "1.18.0")
    assert ask(noise, LD_PRELOAD=f"{noise}:").get("nccl.version").value == "2.27.3"


def test_torch_with_nccl_built_in_is_not_the_one_that_the_system_has(build: Build) -> None:
    """The system's package would be loaded by nobody then."""
    build("system/libnccl.so.2", "nccl", "21903")
    assert fact("nccl.version").value == "2.19.3"
    found = fact("nccl.version", "/opt/torch/lib/libtorch_cuda.so")
    assert found.state is State.UNKNOWN
    assert "may be a part of torch's own library" in found.problem
