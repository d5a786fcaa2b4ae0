"""What live agents say of a run, asked and not believed further than their own knowledge."""

from __future__ import annotations

import os
from collections.abc import Iterable

import msgspec

from handfast.agent.host import node_label
from handfast.agent.local import AgentGone, AgentStuck, Client
from handfast.agent.process import meeting_place
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


def ask(paths: Iterable[str], domains: Iterable[str]) -> tuple[AgentView, ...]:
    """Ask the agents of this user on this node that serve one of the paths or host a domain.

    An agent is found by the path and the node's label that its trainer was given, whatever they
    are: all meeting places are visited. One that does not answer counts only where it is found by
    one of these paths, else it is some other run's. Agents of other nodes are out of reach.
    """
    ours = set(domains)
    try:
        mine = {meeting_place(f"{path}\n{node_label()}") for path in paths}
        bases = {os.path.dirname(place) for place in mine}
        there = {f"{base}/{name}" for base in bases for name in os.listdir(base)}
    except (HandfastError, OSError) as error:
        return (AgentView(node_label(), 0, problem=f"agents can't be looked for: {error}"),)
    views = [(place, _ask(place)) for place in sorted(mine | there)]
    return tuple(
        view
        for place, view in views
        if view is not None and (place in mine or not ours.isdisjoint(view.domains))
    )


def _ask(place: str) -> AgentView | None:
    label, pid = node_label(), 0
    try:
        with Client(os.path.join(place, "agent"), timeout=PATIENCE_S) as client:
            pid = client.agent_pid
            reply = client.call("status", timeout=PATIENCE_S)
        snapshots = [decode_snapshot(data) for data in reply["domains"]]
        return _view(reply["agent"], pid, snapshots)
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        return None
    except AgentStuck as error:
        return AgentView(label, pid, problem=f"it does not answer: {error}")
    except AgentGone:
        return None
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
