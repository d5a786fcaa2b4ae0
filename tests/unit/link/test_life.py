"""Shows that a life's number is used once, and that the boot is the kernel's."""

from __future__ import annotations

from pathlib import Path

import pytest

from handfast.errors import Damaged, HandfastError
from handfast.link.life import Private, boot_id, count
from handfast.store.files import write_file


def test_the_boot_id_is_the_kernels(tmp_path: Path) -> None:
    """And an error where it can't be read."""
    assert len(boot_id()) == 36
    with pytest.raises(HandfastError, match=r"/boot.*What to do"):
        boot_id(str(tmp_path / "boot"))


def test_a_number_is_durable_before_it_is_used(tmp_path: Path) -> None:
    """It rises by one; what a start that died has left is in nobody's way; a mess is an error."""
    path = tmp_path / "counter"
    write_file(Private(), str(path), b"0\n")
    assert path.stat().st_mode & 0o777 == 0o600
    (tmp_path / "counter.tmp").write_text("9")
    assert [count(Private(), str(path), "begin anew") for _ in range(3)] == [1, 2, 3]
    assert path.read_text() == "3\n"
    path.write_text("three")
    with pytest.raises(Damaged, match=r"'three' is no number. What to do: begin anew"):
        count(Private(), str(path), "begin anew")
    path.unlink()
    with pytest.raises(Damaged, match=r"missing. What to do: begin anew"):
        count(Private(), str(path), "begin anew")
