"""Whether UCX of two versions talks, from a client's namespace to a server's: a rehearsal's probe.

    ucx_pair.py WORK listener|address CLIENT VERSION LIBRARIES SERVER VERSION LIBRARIES INDEX

Exit 0: all messages came as they were sent, both ways. 96: UCX said no before the first one came.
1: it said so later, other bytes came, or an end died. It waits as long as the ends do.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

REFUSED = 96


def begin(namespace: str, libraries: str, *arguments: str) -> subprocess.Popen[str]:
    """Start an end within a namespace, with one version's libraries."""
    end = str(Path(__file__).with_name("ucx_end.py"))
    return subprocess.Popen(
        ("nsenter", f"--net={namespace}", sys.executable, end, libraries, *arguments),
        env={**os.environ, "LD_LIBRARY_PATH": libraries},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(end: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for an end; gives its exit code and the last that it said."""
    out, err = end.communicate()
    lines = (err.strip() or out.strip()).splitlines() or ["nothing"]
    said = re.sub(
        r"^\[\S+:\d+:\d+:\d+\]\s+", "", lines[-1]
    )  # UCX: host and process, anew each time
    if end.returncode < 0:
        return 1, f"{signal.Signals(-end.returncode).name}: {said}"
    return end.returncode, said


def main(work: str, meet: str, *ends: str) -> int:
    """Start both ends, and judge by what came of them."""
    client, its_version, its_libraries, server, version, libraries, index = ends
    address = f"192.0.2.{int(index) + 1}"
    serving = begin(f"{work}/{server}.net", libraries, version, meet, "listen", address, "0")
    found = {}
    for line in serving.stdout or ():
        if line.startswith("listening "):
            port = line.split()[1]
            near = f"{work}/{client}.net"
            dialing = begin(near, its_libraries, its_version, meet, "dial", address, port)
            found[f"client {client} ({its_version})"] = finish(dialing)
            break
    found[f"server {server} ({version})"] = finish(serving)
    codes = {code for code, _ in found.values()}
    if codes == {0}:
        return 0
    told = "; ".join(f"{who}: {said}" for who, (code, said) in found.items() if code)
    print(told, file=sys.stderr)
    return REFUSED if codes <= {0, REFUSED} else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
