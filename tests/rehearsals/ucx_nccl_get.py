"""Get published libraries for the rehearsals of UCX and NCCL into a directory; installs nothing.

    ucx_nccl_get.py DIRECTORY ucx|nccl

UCX 1.13.1 is Debian 12's (apt-get download), the others and NCCL are wheels (pip download). Each is
unpacked as DIRECTORY/NAME-VERSION; what is there is not got again.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

DEBIAN = "libucx0=1.13.1-1"
WANTED = {
    "ucx": {  # some 30 MB each
        "1.13.1": DEBIAN,
        "1.18.1": "libucx-cu12==1.18.1",
        "1.22.0": "libucx-cu12==1.22.0",
    },
    "nccl": {  # some 200 MB each
        version: f"nvidia-nccl-cu12=={version}" for version in ("2.19.3", "2.20.5", "2.27.3")
    },
}
PIP = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:")
APT = ("apt-get", "download")


def get(package: str, into: Path) -> None:
    """Download a package, without what it depends on, and unpack it."""
    debian = package == DEBIAN
    run(*(APT if debian else PIP), package, cwd=into)
    (file,) = into.iterdir()
    if debian:
        run("dpkg", "-x", str(file), str(into), cwd=into)
    else:
        with zipfile.ZipFile(file) as wheel:
            wheel.extractall(into)
    file.unlink()


def run(*argv: str, cwd: Path) -> None:
    """Run a program, and hold what it says."""
    subprocess.run(argv, cwd=cwd, check=True, capture_output=True, text=True, timeout=300)


def main(directory: str, name: str) -> str | None:
    """Get all versions of a library; gives what could not be had, and why."""
    if platform.machine() != "x86_64":
        return f"{name}: these builds are for x86_64, and this is {platform.machine()}"
    for version, package in WANTED[name].items():
        target = Path(directory, f"{name}-{version}")
        room = target.with_suffix(".part")
        if target.exists():
            continue
        shutil.rmtree(room, ignore_errors=True)
        room.mkdir(parents=True)
        try:
            get(package, room)
        except (OSError, subprocess.SubprocessError) as error:
            shutil.rmtree(room)
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            return f"{package} could not be had: {said[-1]}"
        room.rename(target)
    return None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
