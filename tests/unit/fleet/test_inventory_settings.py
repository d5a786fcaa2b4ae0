"""Shows which settings count, and that it makes no difference where they are set."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from handfast.fleet.inventory.collect import take
from handfast.fleet.inventory.collector import OURS
from handfast.fleet.inventory.facts import Inventory, Kind, State, Tier
from handfast.fleet.inventory.host import Host
from handfast.fleet.inventory.variables import TABLE, classify


def ask(root: Path, directory: str = "/job", **environ: str) -> Inventory:
    """The job tier of a process at home in /people/u, on a machine below a directory."""
    (root / "etc").mkdir(exist_ok=True)
    host = Host(root=str(root), environ=environ, home="/people/u", directory=directory, commands={})
    return take(host, entries=[entry for entry in OURS if "settings" in entry.target])


def write(root: Path, path: str, text: str) -> None:
    """A file of that machine."""
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NCCL_SOCKET_IFNAME", Kind.PER_NODE),
        ("NCCL_IB_HCA", Kind.PER_NODE),
        ("NCCL_IB_ROUTABLE_FLID_GID_INDEX", Kind.PER_NODE),
        ("NCCL_MNNVL_CLIQUE_ID", Kind.PER_NODE),
        ("NCCL_MNNVL_ENABLE", Kind.EXACT),
        ("UCX_NET_DEVICES", Kind.PER_NODE),
        ("FI_TCP_IFACE", Kind.PER_NODE),
        ("CUDA_VISIBLE_DEVICES", Kind.PER_NODE),
        ("LD_LIBRARY_PATH", Kind.PER_NODE),
        ("NCCL_DEBUG", Kind.IGNORED),
        ("NCCL_DEBUG_SUBSYS", Kind.IGNORED),
        ("UCX_LOG_LEVEL", Kind.IGNORED),
        ("TORCH_NCCL_TRACE_BUFFER_SIZE", Kind.IGNORED),
        ("NCCL_ALGO", Kind.EXACT),
        ("NCCL_IB_TC", Kind.EXACT),
        ("NCCL_OF_TOMORROW", Kind.EXACT),
        ("UCX_TLS", Kind.EXACT),
        ("TORCH_NCCL_HIGH_PRIORITY", Kind.EXACT),
        ("HOME", None),
        ("MY_NCCL_ALGO", None),
    ],
)
def test_a_variable_counts_as_the_table_says(name: str, kind: Kind | None) -> None:
    """One of NCCL's that nobody knows is exact: to miss it could cost a job."""
    assert classify(name) is kind


def test_every_line_of_the_table_decides_something() -> None:
    """None is hidden by one above it, and each says why, and by which source."""
    samples = {pattern: re.sub(r"\(([^|()]*)[^()]*\)\??", r"\1", pattern) for pattern, *_ in TABLE}
    for position, (pattern, _, why, source) in enumerate(TABLE):
        sample = samples[pattern].replace(".*", "X").replace("[A-Z0-9]+", "X").rstrip("?")
        sample = re.sub(r"[()]", "", sample).removesuffix("_X)")
        first = next(n for n, (p, *_) in enumerate(TABLE) if re.fullmatch(p, sample))
        assert first == position, (pattern, sample)
        assert why
        assert source


def test_settings_are_the_same_wherever_they_are_set(tmp_path: Path) -> None:
    """In the environment, in the user's file, in the system's: one digest."""
    for name in ("a", "b", "c", "d"):
        (tmp_path / name).mkdir()
    write(tmp_path / "b", "etc/nccl.conf", "NCCL_ALGO=Ring\n")
    write(tmp_path / "c", "people/u/.nccl.conf", "# ours\nNCCL_ALGO=Ring\nnot a setting\n")
    taken = [ask(tmp_path / "a", NCCL_ALGO="Ring"), ask(tmp_path / "b"), ask(tmp_path / "c")]
    assert len({each.digest(Tier.JOB) for each in taken}) == 1
    assert [each.get("env.NCCL_ALGO").source for each in taken] == [
        "the environment",
        "/etc/nccl.conf",
        "/people/u/.nccl.conf",
    ]
    assert ask(tmp_path / "d").digest(Tier.JOB) != taken[0].digest(Tier.JOB)


def test_the_first_word_on_a_setting_counts(tmp_path: Path) -> None:
    """As in NCCL: environment, the user's file, the system's. A named file replaces the user's."""
    write(tmp_path, "etc/nccl.conf", "NCCL_ALGO=Tree\nNCCL_PROTO=LL\nNCCL_BUFFSIZE=1\n")
    write(tmp_path, "people/u/.nccl.conf", "NCCL_ALGO=Ring\nNCCL_PROTO=Simple\nNCCL_PROTO=LL128")
    write(tmp_path, "job/mine.conf", "NCCL_ALGO=NVLS\n")

    def values(**environ: str) -> list[str | None]:
        taken = ask(tmp_path, **environ)
        return [taken.get(f"env.NCCL_{n}").value for n in ("ALGO", "PROTO", "BUFFSIZE")]

    assert values() == ["Ring", "Simple", "1"]
    assert values(NCCL_ALGO="") == ["", "Simple", "1"]
    assert values(NCCL_CONF_FILE="mine.conf") == ["NVLS", "LL", "1"]
    assert values(NCCL_CONF_FILE="/gone") == ["Tree", "LL", "1"]


def test_files_that_only_name_a_nodes_own_devices_make_no_difference(tmp_path: Path) -> None:
    """Two nodes of two vendors; the files' hashes are told, for each node."""
    taken = []
    for name, interface in (("a", "eth0"), ("b", "ens1f0")):
        (tmp_path / name).mkdir()
        write(tmp_path / name, "etc/nccl.conf", f"NCCL_SOCKET_IFNAME={interface}\nNCCL_DEBUG=INFO")
        taken.append(ask(tmp_path / name, CUDA_VISIBLE_DEVICES=interface))
    one, other = taken
    assert one.digest(Tier.JOB) == other.digest(Tier.JOB)
    hashes = [each.get("file.nccl.conf.system") for each in taken]
    assert hashes[0].value != hashes[1].value
    assert {each.kind for each in hashes} == {Kind.PER_NODE}


def test_files_of_topology_and_of_ucx_count_by_content(tmp_path: Path) -> None:
    """Not by their path; NCCL's default place is looked at, too."""
    write(tmp_path, "a.xml", "<system/>")
    write(tmp_path, "b.xml", "<system/>")
    write(tmp_path, "c.xml", "<system version='2'/>")
    one, same, other = (ask(tmp_path, NCCL_TOPO_FILE=f"/{n}.xml") for n in "abc")
    assert one.digest(Tier.JOB) == same.digest(Tier.JOB) != other.digest(Tier.JOB)
    write(tmp_path, "var/run/nvidia-topologyd/virtualTopology.xml", "<system/>")
    found = ask(tmp_path).get("file.nccl.topology")
    assert found.value == one.get("file.nccl.topology").value
    write(tmp_path, "job/ucx.conf", "UCX_TLS=tcp\n")
    assert ask(tmp_path).get("file.ucx.here").state is State.KNOWN
    assert ask(tmp_path, HOME="/job").get("file.ucx.home").state is State.KNOWN
    assert ask(tmp_path, UCX_CONFIG_DIR="/job").get("file.ucx.directory").state is State.KNOWN
    assert ask(tmp_path).get("file.nccl.graph").state is State.ABSENT


def test_a_file_that_can_not_be_read_leaves_settings_unknown(tmp_path: Path) -> None:
    """Whatever is not set in the environment may be set there."""
    (tmp_path / "etc/nccl.conf").mkdir(parents=True)
    taken = ask(tmp_path, NCCL_PROTO="LL")
    assert taken.get("env.NCCL_PROTO").value == "LL"
    assert "Is a directory" in taken.get("env.NCCL_ALGO").problem
    assert "Is a directory" in taken.get("file.nccl.conf.system").problem
    assert "env" in taken.unknown(Tier.JOB)


def test_a_file_that_is_far_too_long_is_unknown(tmp_path: Path) -> None:
    """A length on a disk can go wild."""
    with open(tmp_path / "long.xml", "wb") as file:
        file.truncate((16 << 20) + 1)
    found = ask(tmp_path, NCCL_TOPO_FILE="/long.xml").get("file.nccl.topology")
    assert "longer than" in found.problem
