"""What live agents say of a run, asked and not believed further than their own knowledge."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from handfast.agent.host import node_label
from handfast.agent.process import connect
from handfast.agent.snapshot import Snapshot
from handfast.agent.snapshot import decode as decode_snapshot
from handfast.core.lattice import Epoch
from handfast.errors import HandfastError

__all__ = ["AgentView", "ask"]

PATIENCE_S = 5.0


class AgentView(msgspec.Struct, frozen=True):
    """One live agent, and what it knows of the run's domains that it hosts.

    ``problem`` is not empty where it is there and could not be asked; it counts as alive then.
    """

    label: str
    pid: int
    domains: tuple[str, ...] = ()
    generation: int = 0
    phase: str = ""
    blocked_by: tuple[str, ...] = ()
    persisting: tuple[Epoch, ...] = ()
    problem: str = ""


def ask(paths: Iterable[str]) -> tuple[AgentView, ...]:
    """Ask every agent of this node that serves one of these paths.

    An agent is found by the path that its trainer was given, so the paths are as they were typed
    there, templates included. Agents of other nodes are out of reach.
    """
    views = [_ask(f"{path}\n{node_label()}") for path in dict.fromkeys(paths)]
    return tuple(view for view in views if view is not None)


def _ask(key: str) -> AgentView | None:
    label, pid = node_label(), 0
    try:
        client = connect(key)
        if client is None:
            return None
        pid = client.agent_pid
        try:
            reply = client.call("status", timeout=PATIENCE_S)
        finally:
            client.close()
        snapshots = [decode_snapshot(data) for data in reply["domains"]]
        return _view(reply["agent"], pid, snapshots)
    except (HandfastError, OSError, KeyError, msgspec.MsgspecError) as error:
        return AgentView(label, pid, problem=f"it can't be asked: {error}")


def _view(label: str, pid: int, snapshots: list[Snapshot]) -> AgentView:
    if not snapshots:
        return AgentView(label, pid)
    generation = max(snapshot.generation for snapshot in snapshots)
    newest = [snapshot for snapshot in snapshots if snapshot.generation == generation]
    by = {name for snapshot in newest for name in snapshot.lattice.blocked_by}
    return AgentView(
        label=label,
        pid=pid,
        domains=tuple(sorted(s.domain for s in snapshots)),
        generation=generation,
        phase=newest[0].lattice.phase,
        blocked_by=tuple(sorted(by)),
        persisting=tuple(sorted({epoch for s in snapshots for epoch in s.persisting})),
    )
