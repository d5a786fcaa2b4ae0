"""Starts an agent, asks whether it is there, and lets a job of three ranks use three of them."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "agent"))


def agent(place: str, node: str, speaks: str) -> None:
    """Become the agent of a node, of a build that speaks these epochs."""
    os.makedirs(place, mode=0o700, exist_ok=True)
    environ = {**os.environ, "HANDFAST_NODE": node, "HANDFAST_SPEAKS": speaks}
    environ["HANDFAST_LINGER_S"] = "3600"
    argv = [sys.executable, "-m", "handfast.agent", place]
    os.execve(sys.executable, argv, environ)  # noqa: S606 - it becomes the agent


def ready(place: str) -> None:
    """Ask the agent."""
    from handfast.agent.local import Client

    with Client(f"{place}/agent") as client:
        client.call("status")


def probe(root: str) -> None:
    """Go on as the next start of one job: what was saved is there, and what is saved converges.

    The ranks end as a killed job does, so that the agents stay.
    """
    from hostkit import Job

    from handfast.agent.local import Client

    os.environ["HANDFAST_BIND"] = "127.0.0.1"
    told = json.loads(os.environ["HANDFAST_REHEARSAL"])
    nodes = told["nodes"]
    places = [f"{told['dirs'][node]}/place/agent" for node in nodes]
    job = Job(root, [partial(Client, place) for place in places], nodes)
    base = job.restore()
    saved = job.save(base.step + 1)
    speak = {
        node: rank.client.call("status")["spoken"] for node, rank in zip(nodes, job, strict=True)
    }
    print(f"from {base} to {saved}; {speak}", flush=True)
    for me, peers in speak.items():
        both = [told["versions"][me], "new"] == ["new", "new"]
        for peer, epoch in peers.items():
            wanted = "1/2" if both and told["versions"][peer] == "new" else "1/1"
            if epoch != wanted:
                sys.exit(f"{me} speaks {epoch} with {peer}, and not {wanted}")
    os._exit(0)


if __name__ == "__main__":
    {"agent": agent, "ready": ready, "probe": probe}[sys.argv[1]](*sys.argv[2:])
