"""The storm: a 4-rank job killed again and again, and held against an uninterrupted one.

``python -m tests.storm.run --kills 20 --seed 1`` prints one JSON object with the counts. Ranks are
forked from this process, which has torch loaded and no threads; agents are those that the job
starts. Only processes that this run started are killed.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.storm import job

from handfast.agent import process
from handfast.checkpoint.agents import ask
from handfast.errors import HandfastError

SIZE = 4
STANDSTILL_S = 120.0  # a machine may be that busy; a job that stands longer is stuck


class Storm:
    """One run of a job under fire. ``nodes`` agents share its ``SIZE`` ranks."""

    def __init__(self, home: Path, *, seed: int, kind: str, nodes: int, steps: int) -> None:
        self.home, self.kind, self.nodes, self.steps = home, kind, nodes, steps
        self.random = random.Random(seed)
        self.out = str(home / "witness")
        self.path = str(home / "disks" / "{rank}")
        self.starts = 0
        self.pids: list[int] = []
        self.kills: list[dict[str, object]] = []
        self.stuck: list[str] = []
        self.back = False

    def start(self, main: object = job.main, out: str = "", steps: int = 0) -> None:
        """Fork the ranks of one start."""
        self.starts += 1
        meet = str(self.home / f"meet-{self.starts}")
        self.pids = []
        for rank in range(SIZE):
            pid = os.fork()
            if pid == 0:
                self._rank(main, rank, meet, out or self.out, steps or self.steps)
            self.pids.append(pid)

    def _rank(self, main: object, rank: int, meet: str, out: str, steps: int) -> None:
        """Be one rank; never returns into the launcher."""
        per_node = SIZE // self.nodes
        os.environ |= {
            "LOCAL_RANK": str(rank % per_node),
            "LOCAL_WORLD_SIZE": str(per_node),
            "HANDFAST_NODE": f"node{rank // per_node}",
            "HANDFAST_BIND": "127.0.0.1",
            "HANDFAST_LINGER_S": "20",
        }
        if self.back:
            os.environ["STORM_BACK"] = "1"
        code = 1
        try:
            with open(f"{self.home}/stderr.{rank}", "a") as err:
                os.dup2(err.fileno(), 2)
            faulthandler.register(signal.SIGUSR1, file=sys.__stderr__, all_threads=True)
            if main is job.main:
                kept = job.main(rank, SIZE, meet, self.kind, steps, self.path, out)
            else:
                kept = job.reference(rank, SIZE, meet, self.kind, steps, out)
            code = 0 if kept else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def agents(self) -> dict[str, int]:
        """Find the agents of this run that are alive, by node."""
        found = {}
        for node in range(self.nodes):
            client = None
            with contextlib.suppress(HandfastError, OSError):  # it is just ending
                client = process.connect(f"{self.path}\nnode{node}")
            if client is not None:
                found[f"node{node}"] = client.agent_pid
                client.close()
        return found

    def kill(self, pids: list[int]) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def reap(self, pids: list[int], limit_s: float = 60.0) -> list[int]:
        """Wait for ranks; gives their exit codes. A rank that hangs is killed, and counts as -1."""
        codes = []
        deadline = time.monotonic() + limit_s
        for pid in pids:
            while True:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes.append(os.waitstatus_to_exitcode(status))
                    break
                if time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    codes.append(-1000)
                    break
                time.sleep(0.01)
        return codes

    def progress(self) -> int:
        """Read how far the slowest rank has come since this start."""
        return min(_count(f"{self.out}.{rank}") for rank in range(SIZE))

    def episode(self) -> None:
        """Start, let it come to train, kill, and clear away what is left."""
        wanted = self.progress() + self.random.randint(1, 20)
        self.back = self.random.random() < 0.15  # an operator who goes back a step
        self.start()
        self._await(wanted)
        time.sleep(self.random.uniform(0.0, 0.2))
        how = self.random.choice(["job", "job", "rank", "agent", "both"])
        if how == "agent":
            self.strike("agent")
            time.sleep(self.random.uniform(0.3, 1.2))  # the job must go on by itself
            how = self.random.choice(["job", "rank"])
        self.strike(how)

    def _await(self, wanted: int) -> None:
        """Wait until the job has come so far or has ended; one that stands still is a finding."""
        reached, since = self.progress(), time.monotonic()
        while reached < wanted:
            time.sleep(0.01)
            now = self.progress()
            if now > reached:
                reached, since = now, time.monotonic()
            if all(map(_gone, self.pids)):
                return
            if time.monotonic() - since > STANDSTILL_S:
                self.stuck.append(self._testimony())
                return

    def _testimony(self) -> str:
        """Ask every rank where it stands, and quote what ranks and agents have written last."""
        state = [f"start {self.starts}, lines {self.progress()}"]
        for rank, pid in enumerate(self.pids):
            if _gone(pid):
                state.append(f"rank {rank} ended by itself")
            else:
                os.kill(pid, signal.SIGUSR1)
        time.sleep(1.0)
        keys = [f"{self.path}\nnode{node}" for node in range(self.nodes)]
        logs = [Path(process.meeting_place(key)) / "log" for key in keys]
        wrote = (*sorted(self.home.glob("stderr.*")), *filter(Path.exists, logs))
        state += [f"--- {path}\n{path.read_text()[-6000:]}" for path in wrote]
        state += [str(view) for view in ask([self.path], [])]
        return "\n".join(state)

    def strike(self, how: str) -> None:
        """Kill, and where that ends the job, take the rest of it down as a launcher does."""
        entry = {"how": how, "at": round(time.time(), 3), "steps": self.progress()}
        self.kills.append(entry)
        if how == "agent":
            agents = list(self.agents().values())
            self.kill(self.random.sample(agents, min(1, len(agents))))
            return
        first = [self.random.choice(self.pids)] if how == "rank" else list(self.pids)
        if how == "both":
            first = list(self.agents().values()) + first
        self.kill(first)
        if how == "rank":
            time.sleep(self.random.uniform(0.0, 0.3))
            self.kill([pid for pid in self.pids if pid not in first and not _gone(pid)])
        self.reap(self.pids)

    def finish(self) -> list[int]:
        """One last start that runs to its end, a little further than any before."""
        reached = max(_steps(f"{self.out}.{rank}") for rank in range(SIZE))
        self.steps, self.back = reached + 4, False
        self.start()
        self._await(sys.maxsize)
        return self.reap(self.pids)

    def judge(self) -> dict[str, object]:
        """Hold every resume and every step against the uninterrupted run."""
        out = str(self.home / "reference")
        self.start(job.reference, out, self.steps)
        codes = self.reap(self.pids, 60 + self.steps / 5)
        truth = [_lines(f"{out}.{rank}") for rank in range(SIZE)]
        witness = [[line.split(" ") for line in _lines(f"{self.out}.{r}")] for r in range(SIZE)]
        wrong = [
            f"rank {rank}: {what} {step}"
            for rank, lines in enumerate(witness)
            for what, step, said, *_ in lines
            if what in "RBS" and truth[rank][int(step)] != said
        ]
        return {"reference": codes, "inexact": wrong, **_resumes(witness)}


def _resumes(witness: list[list[list[str]]]) -> dict[str, object]:
    """Judge what each generation resumed from.

    A mixture: ranks of one generation that act from different epochs. Lost: a generation that
    begins below a step that was told certified before, though nobody went back. Abandoned: one that
    begins from an epoch that an earlier generation had left behind.
    """
    lives: dict[int, list[Life]] = {}
    for lines in witness:
        for life in _lives(lines):
            lives.setdefault(life.generation, []).append(life)
    mixed, lost, abandoned, resumes = [], [], [], []
    converged, wished, timeline = 0, 0, dict[int, Base]()
    for generation, here in sorted(lives.items()):
        bases = {life.base for life in here}
        base = min(bases)
        resumes.append(base[1])
        if len(bases) > 1:
            mixed.append([generation, sorted(bases)])
        if any(life.back for life in here) or base[1] == wished:
            converged = base[1]
        elif base[1] < converged:
            lost.append([generation, base[1], converged])
        if not _living(base, timeline):
            abandoned.append([generation, base])
        timeline[generation] = base
        converged = max([converged, *(life.told for life in here)])
        wished = max(life.wished for life in here)
    return {
        "resumes": resumes,
        "went_back": sum(any(life.back for life in here) for here in lives.values()),
        "mixtures": mixed,
        "certified_lost": lost,
        "abandoned": abandoned,
    }


Base = tuple[int, int]


@dataclass
class Life:
    """What one rank said in one generation: its base, whether by wish, the newest it was told, and
    the step that it was about to go back to."""

    generation: int
    base: Base
    back: bool
    told: int = 0
    wished: int = 0


def _lives(lines: list[list[str]]) -> list[Life]:
    """Cut a rank's log where it resumed."""
    found: list[Life] = []
    for what, step, _, generation, base in lines:
        if what in "RB":
            first, second = base.split("/")
            found.append(Life(int(generation), (int(first), int(second)), what == "B"))
        elif what == "C" and found:
            found[-1].told = int(step)
        elif what == "I":
            found[-1].wished = int(step)
    return found


def _living(base: Base, timeline: dict[int, Base]) -> bool:
    """Walk back from the newest generation: each one lives on from its own base, and no higher."""
    if not timeline:
        return base == (0, 0)
    generation, cap = max(timeline), None
    while generation:
        if base[0] == generation:
            return cap is None or base <= cap
        cap = timeline.get(generation, (0, 0))
        generation = cap[0]
    return base == (0, 0)


def _lines(path: str) -> list[str]:
    try:
        data = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return data.split("\n")[:-1]


def _count(path: str) -> int:
    try:
        return Path(path).read_bytes().count(b"\n")  # looked at a hundred times a second
    except FileNotFoundError:
        return 0


def _steps(path: str) -> int:
    return max([int(line.split(" ")[1]) for line in _lines(path)], default=0)


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def main() -> int:
    """Run the storm that the arguments ask for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", default="fsdp", choices=["fsdp", "ddp"])
    parser.add_argument("--nodes", type=int, default=1, choices=[1, 2, 4])
    parser.add_argument("--keep", default="")
    options = parser.parse_args()
    home = Path(options.keep or tempfile.mkdtemp(prefix="handfast-storm-"))
    home.mkdir(exist_ok=True)
    storm = Storm(home, seed=options.seed, kind=options.kind, nodes=options.nodes, steps=1_000_000)
    began = time.monotonic()
    while len(storm.kills) < options.kills and not storm.stuck:
        storm.episode()
        print(f"{time.monotonic() - began:.1f} s: {storm.kills[-1]}", file=sys.stderr, flush=True)
    codes = storm.finish()
    result = {
        "kills": len(storm.kills),
        "by": {
            how: sum(k["how"] == how for k in storm.kills)
            for how in ("job", "rank", "agent", "both")
        },
        "starts": storm.starts,
        "last_run": codes,
        "stuck": storm.stuck,
        "steps": storm.steps,
        **storm.judge(),
        "seconds": round(time.monotonic() - began, 1),
    }
    storm.kill(list(storm.agents().values()))
    print(json.dumps(result))
    if not options.keep:
        shutil.rmtree(home)
    return 0


if __name__ == "__main__":
    sys.exit(main())
