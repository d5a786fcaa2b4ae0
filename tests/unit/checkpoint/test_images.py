"""Shows that memory that can't be had is an error that names the bytes and what to do."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from handfast.agent.keeper import Plan
from handfast.checkpoint.images import StagingImage
from handfast.errors import SaveFailed

HUGE = 1 << 46  # bytes: more than any machine has


def plan(padded: int) -> Plan:
    """The plan of an image of so many bytes."""
    return Plan((), b"", padded, padded, {}, (), "", {}, "main", "sampled")


@contextmanager
def limited(which: int, most: int) -> Iterator[None]:
    """Lower one of this process's limits for a while."""
    soft, hard = resource.getrlimit(which)
    resource.setrlimit(which, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(which, (soft, hard))


def descriptors() -> int:
    """How many are open."""
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    ("which", "most", "remedy"),
    [
        (resource.RLIMIT_FSIZE, 100_000, r"EFBIG.*ulimit -f"),
        (resource.RLIMIT_NOFILE, 3, r"EMFILE.*ulimit -n"),
    ],
)
def test_an_image_that_a_limit_forbids_fails_the_save_by_name(
    which: int, most: int, remedy: str
) -> None:
    before = descriptors()
    with (
        limited(which, most),
        pytest.raises(SaveFailed, match=rf"an image of 8388608 bytes: .*{remedy}"),
    ):
        StagingImage(plan(8 << 20))
    assert descriptors() == before


def test_an_image_that_can_t_be_mapped_leaves_no_memory_behind() -> None:
    """RLIMIT_AS: the memory was there, and this process may not see it."""
    before = descriptors()
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    with (
        limited(resource.RLIMIT_AS, used + (4 << 20)),
        pytest.raises(SaveFailed, match=r"67108864 bytes: .*ENOMEM.*free memory on this node"),
    ):
        StagingImage(plan(64 << 20))
    assert descriptors() == before
