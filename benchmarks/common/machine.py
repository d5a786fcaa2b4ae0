"""What a run was measured on: figures mean nothing without it."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["facts"]

PACKAGES = ("handfast", "torch", "safetensors", "torchsnapshot-nightly", "orbax-checkpoint", "jax")


def facts(home: Path) -> dict[str, str]:
    """Describe this machine, the disk below ``home``, and what is installed."""
    kind, device = _mount(home)
    return {
        "processor": _named("/proc/cpuinfo", "model name"),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{int(_named('/proc/meminfo', 'MemTotal').split()[0]) / (1 << 20):.1f} GiB",
        "kernel": platform.release(),
        "file system": kind,
        "device": f"{device}{_model(device)}",
        "Python": platform.python_version(),
        **{package: found for package in PACKAGES if (found := _version(package))},
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _named(path: str, key: str) -> str:
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return f"{platform.machine()}, not named"


def _mount(home: Path) -> tuple[str, str]:
    """Give the file system's kind and its device: of the longest mount that ``home`` is below."""
    best, found = "", ("unknown", "unknown")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        point, (kind, device) = left.split()[4], right.split()[:2]
        if home.resolve().is_relative_to(point) and len(point) >= len(best):
            best, found = point, (kind, device)
    return found


def _model(device: str) -> str:
    name = Path(device).name.rstrip("0123456789")
    told = []
    for path, words in (("device/model", "{}"), ("queue/rotational", "rotational: {}")):
        with suppress(OSError):
            told.append(words.format(Path("/sys/block", name, path).read_text().strip()))
    return f" ({', '.join(told)})" if told else ""


def _version(package: str) -> str:
    with suppress(PackageNotFoundError):
        return version(package)
    return ""
