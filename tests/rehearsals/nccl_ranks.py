"""Whether three ranks, each with its own NCCL, get through the gate together: a rehearsal's probe.

    nccl_ranks.py preloaded|beside

Each rank is a node by name, in a UTS namespace of its own (needs root, and `unshare` of
util-linux), and runs `python -m handfast.gate nccl_rank.py` in enforce mode, with the environment
that torchrun gives, over the store that torch makes of it. Its NCCL is preloaded, or lies where
torch's wheels have it.

Exit 0: all ran their script. 96: the gate refused all, in the same line. 1: neither.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REFUSED = 96
NAMED = 'printf %s "$0" >/proc/sys/kernel/hostname && exec env "$@"'


def begin(told: dict[str, Any], rank: int, way: str) -> subprocess.Popen[str]:
    """Start a rank on its node."""
    nodes: list[str] = told["nodes"]
    node = nodes[rank]
    site = told["variables"][node]["site"]
    library = f"{site}/nvidia/nccl/lib/libnccl.so.2"
    given = f"LD_PRELOAD={library}" if way == "preloaded" else f"PYTHONPATH={site}"
    script = str(Path(__file__).with_name("nccl_rank.py"))
    argv = (sys.executable, "-m", "handfast.gate", script, told["versions"][node])
    of_torchrun = {
        "RANK": str(rank),
        "WORLD_SIZE": str(len(nodes)),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(told["ports"][nodes[0]][0]),
        "OMP_NUM_THREADS": "1",
    }
    gate = {"HANDFAST_GATE_MODE": "enforce", "HANDFAST_GATE_TIMEOUT_S": "30"}
    return subprocess.Popen(
        ("unshare", "--uts", "sh", "-c", NAMED, node, given, *argv),
        env={**os.environ, **of_torchrun, **gate},
        stderr=subprocess.PIPE,
        text=True,
    )


def main(way: str) -> int:
    """Start all ranks, and judge by how they ended."""
    told = json.loads(os.environ["HANDFAST_REHEARSAL"])
    ranks = [begin(told, rank, way) for rank in range(len(told["nodes"]))]
    said = [rank.communicate()[1].strip().splitlines() for rank in ranks]
    codes = [rank.returncode for rank in ranks]
    last = [lines[-1] if lines else "nothing" for lines in said]
    if codes == [0] * len(ranks):
        return 0
    if codes == [REFUSED] * len(ranks) and len(set(last)) == 1:
        print(last[0], file=sys.stderr)
        return REFUSED
    ends = zip(told["nodes"], codes, last, strict=True)
    print("; ".join(f"{node} ended with {code}: {line}" for node, code, line in ends),
          file=sys.stderr)  # fmt: skip
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
