"""Where the time of a save and of a restore goes.

Phases are seconds by the clock, as a user can see them from outside. Beside the phases that the
agent works in stand the seconds of CPU that it and the trainer took meanwhile, and what the same
bytes cost alone in the same lap: hashed by xxh3-128, copied, written raw. Where the CPU's
seconds are few and the phase is as long as the raw write, the disk is what is waited for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

import torch
import xxhash
from msgspec.structs import replace

from benchmarks.common.contest import Race, contest, timed
from benchmarks.common.figures import Figure, Setting
from benchmarks.common.limits import Disk, forget
from benchmarks.common.peers import HANDFAST, Handfast
from benchmarks.common.processes import is_agent, marked
from benchmarks.common.ranks import Rank
from benchmarks.common.state import State, change, flat, make_state

VARIES = ()
TICK = os.sysconf("SC_CLK_TCK")


def ask(setting: Setting) -> Iterator[Figure]:
    """Measure it."""
    yield from contest("profile", replace(setting, ranks=1), _enter)


@contextmanager
def _enter(setting: Setting, rank: Rank) -> Iterator[Race]:
    state = make_state(setting.mib, setting.small)
    memory = flat(state)
    disk = Disk(setting.home / "raw", memory)
    source = torch.frombuffer(memory, dtype=torch.uint8)
    target = source.clone()
    with closing(Handfast(setting.home / HANDFAST, state, rank)) as saver:
        turns = {
            "alone": lambda: {
                "memcpy": timed(lambda: target.copy_(source)),
                "xxh3-128": timed(lambda: xxhash.xxh3_128(memory).digest()),
                "raw write": timed(disk.write),
                "raw read": timed(disk.read_direct),
            },
            "save": lambda: _save(saver, state),
            "restore": lambda: _restore(saver, setting.home / HANDFAST),
        }
        yield Race(turns, lambda: change(state.values()))


def _save(saver: Handfast, state: State) -> Mapping[str, float]:
    """Save, with the images of a save before: the restore has left a Checkpointer without any."""
    for act in (saver.save, saver.finish, saver.settle):
        act()
    change(state.values())
    began = _cpu()
    found = {"save() blocks": timed(saver.save), "until persisted": timed(saver.finish)}
    return found | {"until converged": timed(saver.settle)} | _since(began)


def _restore(saver: Handfast, files: Path) -> Mapping[str, float]:
    """Restore dry from a cold cache, then whole from a warm one."""
    forget(files)
    saver.reopen()
    dry = timed(lambda: saver.keeper.restore(require=True, dry_run=True))
    began = _cpu()
    whole = timed(saver.load)
    return {
        "dry, cold: start, meet, read, verify, compare": dry,
        "whole, warm: the same, and agree, and copy": whole,
    } | _since(began)


def _cpu() -> dict[str, float]:
    """Seconds of CPU so far, of this process and of its agents."""
    found = dict.fromkeys(("trainer, user", "trainer, kernel", "agent, user", "agent, kernel"), 0.0)
    for pid in (os.getpid(), *filter(is_agent, marked())):
        name = "trainer" if pid == os.getpid() else "agent"
        user, kernel = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        found[f"{name}, user"] += int(user) / TICK
        found[f"{name}, kernel"] += int(kernel) / TICK
    return found


def _since(began: Mapping[str, float]) -> dict[str, float]:
    return {f"CPU: {name}": value - began[name] for name, value in _cpu().items()}
