"""What live agents say of a run, asked and not believed further than their own knowledge."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import msgspec

from handfast.agent.joining import node_label
from handfast.agent.local import AgentGone, AgentStuck, Client
from handfast.agent.process import meeting_place
from handfast.agent.snapshot import Snapshot
from handfast.agent.snapshot import decode as decode_snapshot
from handfast.core.lattice import Epoch
from handfast.errors import HandfastError

__all__ = ["AgentView", "ask"]

PATIENCE_S = 5.0


class AgentView(msgspec.Struct, frozen=True):
    """One live agent, and what it knows of the run's domains that it hosts, in these ``paths``.

    ``problem`` is not empty where it is there and could not be asked; it counts as alive then.
    """

    label: str
    pid: int
    domains: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    generation: int = 0
    phase: str = ""
    blocked_by: tuple[str, ...] = ()
    persisting: tuple[Epoch, ...] = ()
    problem: str = ""


def ask(paths: Iterable[str], domains: Mapping[str, str]) -> tuple[AgentView, ...]:
    """Ask the agents of this user on this node that serve one of the paths or host a domain.

    ``domains`` are the directories of domains by their ids; empty for one that is not here. A copy
    of a run has the same ids, and is not what the agent of the original serves.
    An agent is found by the path and the node's label that its trainer was given, whatever they
    are: all meeting places are visited. One that does not answer counts only where it is found by
    one of these paths, else it is some other run's. Agents of other nodes are out of reach.
    """
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
        if view is not None and (place in mine or _hosts(view, domains))
    )


def _hosts(view: AgentView, domains: Mapping[str, str]) -> bool:
    served = zip(view.domains, view.paths, strict=True)
    return any(d in domains and not _apart(path, domains[d]) for d, path in served)


def _apart(one: str, other: str) -> bool:
    """Say whether two paths lead to two directories, as far as can be seen from here.

    An agent's own can't where it was moved, or is in the agent's container alone.
    """
    try:
        return not os.path.samefile(one, other)
    except OSError:
        return False


def _ask(place: str) -> AgentView | None:
    label, pid = node_label(), 0
    try:
        with Client(os.path.join(place, "agent"), timeout=PATIENCE_S) as client:
            pid = client.agent_pid
            reply = client.call("status", timeout=PATIENCE_S)
        snapshots = [decode_snapshot(data) for data in reply["domains"]]
        return _view(reply["agent"], pid, snapshots, reply["paths"])
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        return None
    except AgentStuck as error:
        return AgentView(label, pid, problem=f"it does not answer: {error}")
    except AgentGone:
        return None
    except (HandfastError, OSError, KeyError, msgspec.MsgspecError) as error:
        return AgentView(label, pid, problem=f"it can't be asked: {error}")


def _view(label: str, pid: int, snapshots: list[Snapshot], paths: list[str]) -> AgentView:
    if not snapshots:
        return AgentView(label, pid)
    generation = max(snapshot.generation for snapshot in snapshots)
    newest = [snapshot for snapshot in snapshots if snapshot.generation == generation]
    by = {name for snapshot in newest for name in snapshot.lattice.blocked_by}
    return AgentView(
        label=label,
        pid=pid,
        domains=tuple(snapshot.domain for snapshot in snapshots),
        paths=tuple(paths),
        generation=generation,
        phase=newest[0].lattice.phase,
        blocked_by=tuple(sorted(by)),
        persisting=tuple(sorted({epoch for s in snapshots for epoch in s.persisting})),
    )
