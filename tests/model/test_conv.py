"""Shows that an instant can not be taken for convergence, nor the other way round.

A type checker refuses every mixture, and so does Python. The lemma that there is, from convergence
to what is retained, is held against storms of the real member in tests/property/test_conv.py.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from handfast.core.lattice import GENESIS, Epoch
from handfast.core.membership import Roster
from handfast.core.messages import Certificate, Configured, Converged, Released, Staged
from handfast.laws.truth import Truth, Written
from handfast.model.conv import Conv, Snap, retained_from
from handfast.model.scenarios import shape

ROOT = Path(__file__).resolve().parents[2]
TWO = Roster(shape(2, disk=(1, 1)))
A, B = (domain.id for domain in TWO.configuration.domains)
E1, E2 = Epoch(1, 10), Epoch(1, 20)


def certificate(epoch: Epoch) -> Certificate:
    """A certificate of the tier, in form."""
    return Certificate("run", TWO.digest, "disk", epoch, "0" * 32)


def trace(*records: tuple[str, Configured | Staged | Released | Converged]) -> Truth:
    """A recorded trace of these records, in the order of their syncing."""
    return Truth((TWO,), tuple(Written(domain, 1, record) for domain, record in records))


def staged(domain: str, epoch: Epoch) -> tuple[str, Staged]:
    """One vote."""
    return domain, Staged(0, epoch, "d")


RECORDED = trace(
    (A, Configured(TWO.configuration, True)),
    (B, Configured(TWO.configuration, True)),
    staged(A, E1),
    staged(B, E1),
    (A, Converged(certificate(E1))),
    (A, Released((GENESIS,))),
    staged(A, E2),
    staged(B, E2),
    (B, Converged(certificate(E2))),
    (B, Released((E1,))),
)

FORBIDDEN = """
from typing import Callable

from handfast.core.lattice import Epoch
from handfast.core.messages import Certificate
from handfast.laws.truth import Truth
from handfast.model.conv import Conv, Snap, retained_from


def mix(trace: Truth, certificate: Certificate, snap: Snap, conv: Conv, epoch: Epoch) -> None:
    allowed: tuple[Snap, Conv] = (Snap(trace, 3), Conv(certificate))
    first: Conv = snap  # refused
    second: Snap = conv  # refused
    Conv(snap)  # refused
    Conv(trace)  # refused
    Conv(epoch)  # refused
    Snap(certificate, 3)  # refused
    Snap(trace, epoch)  # refused
    Snap(trace)  # refused
    retained_from(snap, trace)  # refused
    retained_from(conv, snap)  # refused
    third: list[Conv] = [snap]  # refused
    fourth: Callable[[Snap], None] = publish  # refused
    print(snap == conv)  # refused
    snap < conv  # refused
    snap.certificate  # refused
    conv.at  # refused
    int(conv)  # refused
    print(allowed, first, second, third, fourth)


def publish(conv: Conv) -> None:
    print(conv.epoch, conv.tier)


def condition(snap: Snap) -> None:
    if snap:
        print("so")  # refused


def other_condition(conv: Conv) -> None:
    if conv:
        print("so")  # refused


class Both(Snap, Conv):  # refused
    pass
"""


def test_a_type_checker_refuses_every_mixture(tmp_path: Path) -> None:
    """Mypy finds an error in each line that is marked, and in no other."""
    file = tmp_path / "forbidden.py"
    file.write_text(FORBIDDEN)
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(tmp_path / "cache"), "--no-error-summary", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    found = {int(n) for n in re.findall(r"forbidden\.py:(\d+): error", done.stdout)}
    marked = {n for n, line in enumerate(FORBIDDEN.splitlines(), 1) if "# refused" in line}
    assert len(marked) == 20
    assert found == marked, done.stdout + done.stderr


def test_python_refuses_them_too() -> None:
    """Where nobody runs a type checker."""
    snap, conv = Snap(RECORDED, 4), Conv(certificate(E1))
    for make in (lambda: Conv(snap), lambda: Snap(conv, 1), lambda: bool(conv), lambda: bool(snap)):
        with pytest.raises(TypeError):
            make()
    assert snap != conv
    with pytest.raises(TypeError):
        sorted([snap, conv])


def test_a_snap_is_looked_up_in_what_was() -> None:
    """It holds where all stood at one epoch, and there is none where they stood apart."""
    assert (Snap(RECORDED, 4).epoch, Snap(RECORDED, 2).epoch) == (E1, GENESIS)
    assert repr(Snap(RECORDED, 8)) == "Snap(8, 1/20)"
    with pytest.raises(ValueError, match=f"stood apart: {A} at 1/10, {B} at 0/0"):
        Snap(RECORDED, 3)
    with pytest.raises(ValueError, match=f"{B} at nothing"):
        Snap(RECORDED, 1)
    with pytest.raises(ValueError, match="the instants 0 to 10"):
        Snap(RECORDED, 11)


def test_a_snap_is_not_stable_and_a_conv_is() -> None:
    """One instant later it may be gone; what converged stays until something higher has."""
    with pytest.raises(ValueError, match="stood apart"):
        Snap(RECORDED, 7)
    conv = Conv(certificate(E1))
    assert (conv.epoch, conv.tier, repr(conv)) == (E1, "disk", "Conv(1/10, 'disk')")
    assert retained_from(conv, RECORDED) == 4
    assert retained_from(Conv(certificate(E2)), RECORDED) == 8


def test_the_lemma_refuses_a_trace_that_breaks_it() -> None:
    """Released before anything higher converged, or never staged by all: no such instant."""
    early = trace(staged(A, E1), staged(B, E1), (B, Released((E1,))))
    assert retained_from(Conv(certificate(E1)), early) is None
    half = trace(staged(A, E1), (A, Converged(certificate(E1))))
    assert retained_from(Conv(certificate(E1)), half) is None
