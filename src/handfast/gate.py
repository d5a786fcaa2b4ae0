"""Ask, before a job's first communicator, whether its ranks may run together.

``torchrun ... -m handfast.gate train.py ARGS`` (or ``-m handfast.gate -m module ARGS``) asks, and
then runs the script in this process; :func:`check` does so from within a script. It is asked anew
at every rendezvous round, since each starts the ranks' processes anew.

The environment says how, the same on all ranks: HANDFAST_GATE_MODE (observe, warn or enforce),
_RULES (a file; else the rules that are shipped), _GROUPS ("prefill=0-3 decode=4-7"; else the
world), _TIMEOUT_S, _OVERRIDES and _AUDIT (files), _PROBED (a file of what was probed), _NODE (the
socket of the node's service, or the file that its admission wrote).
"""

from __future__ import annotations

import os
import runpy
import socket
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NoReturn

from handfast.errors import Blocked, FormatError, HandfastError, Refused
from handfast.fleet.compat.judge import Ruling
from handfast.fleet.compat.known import known_facts
from handfast.fleet.compat.options import load_probed
from handfast.fleet.compat.reading import load, start
from handfast.fleet.compat.rules import Level
from handfast.fleet.gate.ask import ASK_S, node_facts, nothing
from handfast.fleet.gate.clock import now
from handfast.fleet.gate.keys import Keys, Torch
from handfast.fleet.gate.overrides import excuse
from handfast.fleet.gate.overrides import load as load_overrides
from handfast.fleet.gate.round import (
    Mode,
    Posted,
    Seat,
    Verdict,
    arrive,
    attend,
    decide,
    ranks_of,
)
from handfast.fleet.gate.stack import Stack, stack
from handfast.fleet.inventory.collect import take
from handfast.fleet.inventory.facts import Tier, printable
from handfast.fleet.inventory.host import here

__all__ = ["EXIT", "check", "main"]

EXIT: Final = 96
"""The exit code of a rank that the gate refused.

It is none of Python's (1, 2, 120), sysexits.h's (64 to 78), timeout's (124 to 127), the shell's
(126, 127, and 128 and a signal's number up) or handfast's own (1, 2, 3, 141). torchrun itself ends
with 1, and names this one in its report.
"""

TIMEOUT_S: Final = 120.0
USAGE: Final = """\
usage: python -m handfast.gate SCRIPT [ARGUMENTS]
       python -m handfast.gate -m MODULE [ARGUMENTS]

Asks whether the ranks of this job may run together, and then runs the script in this process.
Start it by torchrun, or where RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set. The
environment says how: HANDFAST_GATE_MODE=observe|warn|enforce, and others that docs/fleet/gate.md
lists. A rank that is refused ends with 96.
"""
KEPT: Final[list[Keys]] = []
"""Stores that live as long as this process.

Where no agent holds the store, rank 0 does, and with it torch's server at the port of the
rendezvous (`_create_c10d_store` in torch/distributed/rendezvous.py, 2.13: multi_tenant). The
script's own rendezvous shares that server for as long as somebody here has it. If it were let go, a
faster rank's script would find it alive, and lose it under its hands.
"""


def check(
    *,
    keys: Keys | None = None,
    groups: Mapping[str, Sequence[int]] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Verdict:
    """Ask whether this round's ranks may run together; call it before init_process_group.

    Every rank calls it, once a round. ``keys`` is where they meet: else the store of torch's
    `env://` rendezvous. ``groups`` are communicators by name, each judged by itself: else what
    HANDFAST_GATE_GROUPS says. Prints to the standard error what is not fine: rank 0 a line for each
    ruling, eight at most; others one at most, and one where their node told nothing. Where rank 0
    holds the store, it does so for the life of its process, so the port of the rendezvous stays
    bound.

    Raises Refused on every rank where the mode is enforce and a rule is broken, a rank did not
    come, or the round could not be judged; Blocked where nobody could be heard; FormatError and
    ValueError for settings that can't be read; and OSError.
    """
    env = dict(os.environ if environ is None else environ)
    seat, mode = _seat(env), _mode(env)
    timeout_s = _number(env, "HANDFAST_GATE_TIMEOUT_S", TIMEOUT_S)
    store = keys or _rendezvous(timeout_s)
    # after torch was loaded: what is mapped now is what will be called
    facts, untold = _facts(env, timeout_s)
    place = arrive(store, env.get("TORCHELASTIC_RESTART_COUNT", "0"), seat, facts, untold)

    def court(posted: Mapping[int, Posted], stacks: Mapping[str, Stack]) -> Verdict:
        named = env.get("HANDFAST_GATE_RULES")
        rules = load(named, known_facts()) if named else start()
        tried = env.get("HANDFAST_GATE_PROBED")
        of = ranks_of(env.get("HANDFAST_GATE_GROUPS", ""), seat.size) if groups is None else groups
        return decide(
            rules,
            posted,
            stacks,
            size=seat.size,
            mode=mode,
            groups=of,
            probed=load_probed(tried, rules) if tried else (),
            whose=_job(env),
            excuse=lambda found: _excuse(env, found),
        )

    verdict = attend(store, place, seat, timeout_s, court, mode)
    if verdict.refused:
        raise Refused(f"handfast gate: {verdict.line}", verdict=None)
    loud = verdict.level is Level.REFUSE and verdict.mode is not Mode.OBSERVE
    if verdict.level is not Level.FINE and (loud or seat.rank == 0):
        lines = (verdict.line,) if seat.rank else verdict.lines
        _say("\n".join(f"handfast gate: {line}" for line in lines))
    return verdict


def main(argv: Sequence[str] | None = None) -> None:
    """Ask, and then run the script that the arguments name, or end with exit code 96.

    What keeps the gate from asking ends the rank in enforce mode only, and in one that can't be
    read: nobody knows what was meant.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE, end="")
        return
    module = arguments[:1] == ["-m"]
    target = (arguments[module:] or ["-"])[0]
    if target.startswith("-"):
        lost = f"handfast gate: no option {target}\n" if target != "-" else ""
        _say(f"{lost}{USAGE.rstrip()}")
        sys.exit(2)
    try:
        check()
    except Refused as error:
        _end(str(error))
    except Exception as error:  # whatever it is, a job is not to end of it unless it was to
        kind = "" if isinstance(error, HandfastError | ValueError) else f"{type(error).__name__}: "
        told = f"handfast gate: nobody was judged: {kind}{' '.join(str(error).split())}"
        if (os.environ.get("HANDFAST_GATE_MODE") or Mode.OBSERVE) not in (Mode.OBSERVE, Mode.WARN):
            _end(told)
        _say(told)
    sys.argv = arguments[module:]
    if module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        if not sys.flags.safe_path:  # else Python puts nothing of its own in front
            sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
        runpy.run_path(sys.argv[0], run_name="__main__")


def _end(line: str) -> NoReturn:
    _say(line)
    sys.exit(EXIT)


def _say(line: str) -> None:
    """Write lines in one piece: the ranks of a node share their standard error."""
    with suppress(OSError, ValueError, AttributeError):  # it may be closed, or None
        sys.stderr.write("".join(f"{printable(each)}\n" for each in line.splitlines()))
        sys.stderr.flush()


def _facts(env: Mapping[str, str], timeout_s: float) -> tuple[Stack, str]:
    """What this rank runs, and why its node told nothing: its facts are unknown then.

    A service or a file that does not count is said at once. Where there is none at all, that is no
    fault in itself, and rank 0 says it where a rule wants to know. Half of the time is left to come
    to the round.
    """
    job = take(here(environ=env), tiers=[Tier.JOB])
    named = env.get("HANDFAST_GATE_NODE", "")
    try:
        node = node_facts(named, now(), min(ASK_S, timeout_s / 2))
    except HandfastError as error:
        told = " ".join(str(error).split())
        _say(f"handfast gate: what this node runs is unknown: {told}")
        return stack(job, None), ""
    return stack(job, node), "" if node else nothing(named)


def _excuse(env: Mapping[str, str], found: Iterable[Ruling]) -> tuple[Ruling, ...]:
    path = env.get("HANDFAST_GATE_OVERRIDES")
    if not path:
        return tuple(found)
    audit = env.get("HANDFAST_GATE_AUDIT") or f"{path}.log"
    return excuse(found, load_overrides(path), now(), _job(env), audit)


def _job(env: Mapping[str, str]) -> str:
    name = env.get("SLURM_JOB_ID") or env.get("TORCHELASTIC_RUN_ID") or ""
    return "this job" if name in {"", "none"} else f"job {name}"


def _seat(env: Mapping[str, str]) -> Seat:
    rank, size = _whole(env, "RANK"), _whole(env, "WORLD_SIZE")
    if rank >= size:
        raise ValueError(f"RANK is {rank} and WORLD_SIZE {size}. What to do: start it by torchrun")
    first = rank - int(env.get("LOCAL_RANK", "0"))
    return Seat(rank, size, socket.gethostname(), first, int(env.get("LOCAL_WORLD_SIZE", "1")))


def _whole(env: Mapping[str, str], name: str) -> int:
    text = env.get(name, "")
    if not text.isdecimal():
        raise ValueError(f"{name} is {text!r}, and no number. What to do: start it by torchrun")
    return int(text)


def _mode(env: Mapping[str, str]) -> Mode:
    text = env.get("HANDFAST_GATE_MODE") or Mode.OBSERVE
    if text not in tuple(Mode):
        raise ValueError(f"HANDFAST_GATE_MODE is {text!r}: give one of {', '.join(Mode)}")
    return Mode(text)


def _number(env: Mapping[str, str], name: str, default: float) -> float:
    text = env.get(name) or str(default)
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 < found <= 86_400:
        raise ValueError(f"{name} is {text!r}: give seconds, up to a day")
    return found


def _rendezvous(timeout_s: float) -> Keys:
    """Reach the store that torch's own `env://` would use; rank 0 may hold it.

    Where torchrun's agent does not, torch waits for all ranks as it makes a store
    (`_create_c10d_store`, torch 2.13): then nobody could say who is missing. So that one is made
    here, without waiting; the script's own shares its server.
    """
    limit = timedelta(seconds=timeout_s)
    try:
        module: Any = import_module("torch.distributed.rendezvous")
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store, _, _ = next(module.rendezvous("env://", timeout=limit))
        else:
            host = os.environ.get("MASTER_ADDR") or ""
            port, rank = _whole(os.environ, "MASTER_PORT"), _whole(os.environ, "RANK")
            if not host or port >= 1 << 16:
                raise ValueError(f"MASTER_ADDR is {host!r} and MASTER_PORT {port}: no address")
            store = module.TCPStore(
                host, port, _whole(os.environ, "WORLD_SIZE"), rank == 0, limit,
                wait_for_workers=False, multi_tenant=True,
                use_libuv=os.environ.get("USE_LIBUV", "1") == "1",
            )  # fmt: skip
    except ImportError:
        raise FormatError(
            "the gate meets in torch's store, and torch is not installed. What to do: pip "
            "install torch, or give check() its keys"
        ) from None
    except RuntimeError as error:
        what = str(error).partition("\n")[0]
        raise Blocked(f"the store of the rendezvous can't be reached: {what}") from error
    KEPT.append(Torch(store))
    return KEPT[-1]


if __name__ == "__main__":
    main()
