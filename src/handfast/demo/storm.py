"""One run under a storm: started, struck, started again, until it has reached its end."""

import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from handfast.demo.agents import agent_pids, end_agents
from handfast.demo.chaos import PHASES, Eyes, Strike
from handfast.demo.events import Event, Tail
from handfast.demo.job import Job
from handfast.demo.launch import Forked, Ranks, Torchrun, end
from handfast.demo.result import Kill, Resume
from handfast.demo.witness import Ledger
from handfast.errors import HandfastError

__all__ = ["Show", "Storm"]

_IDLE_S = 0.02
_KEEN_S = 0.001
_IN_VAIN_S = 10.0
"""How long a strike lies in wait for its phase before it takes what comes."""

_STUCK_S = 180.0
_FAILURES = 3


class Show(Protocol):
    """Whoever watches."""

    def event(self, event: Event) -> None:
        """A rank told something."""

    def kill(self, kill: Kill) -> None:
        """A strike fell."""

    def resume(self, resume: Resume) -> None:
        """A start has resumed, or failed to."""


class Storm:
    """Runs ``job`` under ``strikes``; with none, it is just a run.

    ``finish`` is False for a storm that ends with the first resume after its last strike. A saver
    whose restore raises is given a fresh start: its checkpoints are removed, as an operator would
    (but for handfast, which must not need it).
    Raises HandfastError when the job stands still or fails without having been struck.
    """

    def __init__(
        self,
        job: Job,
        strikes: Sequence[Strike],
        show: Show,
        *,
        truth: Ledger | None = None,
        finish: bool = True,
    ) -> None:
        self.ledger = Ledger(job.world, truth)
        self.kills: list[Kill] = []
        self.events: list[Event] = []
        self._job = job
        self._todo = list(strikes)
        self._show = show
        self._finish = finish
        self._eyes = Eyes(job.run)
        self._tail = Tail(job.run)
        self._launch = job.launch
        self._shown = 0
        self._failures = 0
        self._back = 0
        self._base = 0
        self._step = 0
        self._since = time.monotonic()

    def run(self) -> None:
        """From the first start to the end."""
        while True:
            under = bool(self._todo) and self._todo[0].torchrun
            start: Callable[[Job], Ranks] = Torchrun if under else Forked
            back, self._back = self._back, 0
            ranks = start(msgspec.structs.replace(self._job, launch=self._launch, rollback=back))
            try:
                over = self._one_start(ranks)
            finally:
                ranks.close()
            self._poll()
            self._eyes.forget()
            self._settle()
            if over:
                return
            self._launch += 1

    def _one_start(self, ranks: Ranks) -> bool:
        """Watch one start until it is done (True) or has fallen."""
        self._since = time.monotonic()
        while True:
            self._poll()
            if not self._finish and not self._todo and self.ledger.ready(self._launch):
                return True
            statuses = ranks.watch()
            if all(status == 0 for status in statuses):
                return True
            if any(status not in (None, 0) for status in statuses):
                self._mourn(ranks)
                return False
            if self._due() and self._strike(ranks):
                return False
            if time.monotonic() - self._since > _STUCK_S:
                raise HandfastError(
                    f"the job stands still in start {self._launch} at step {self._step}; see "
                    f"{self._job.run}/output"
                )
            time.sleep(_IDLE_S)

    def _mourn(self, ranks: Ranks) -> None:
        """A rank ended by itself: give the others the time that torchrun would, then judge."""
        end(ranks)
        self._poll()
        if not self.ledger.failed(self._launch):
            why = self.ledger.trouble(self._launch) or "no rank said why"
            raise HandfastError(
                f"start {self._launch} failed at step {self._step} without having been struck: "
                f"{why}; see {self._job.run}/output"
            )

    def _settle(self) -> None:
        """Close the books of a start that has ended."""
        self.ledger.over(self._launch, time.monotonic())
        self._tell_resumes()
        if not self.ledger.failed(self._launch):
            self._failures = 0
            return
        self._failures += 1
        if self._failures > _FAILURES:
            raise HandfastError(
                f"{self._failures} starts in a row could not resume: "
                f"{self.ledger.resumes[-1].detail}; see {self._job.run}/output"
            )
        if self._job.saver != "handfast":
            shutil.rmtree(Path(self._job.run, "checkpoints"), ignore_errors=True)
            self.ledger.lost()

    def _poll(self) -> None:
        for event in self._tail.poll():
            self._since = time.monotonic()
            self.events.append(event)
            self.ledger.take(event)
            self._eyes.take(event)
            if event.launch > self._launch:  # torchrun has restarted the ranks
                self.ledger.over(self._launch, event.at)
                self._launch = event.launch
            if event.kind == "resumed":
                self._base = self._step = event.step
            self._step = max(self._step, event.step)
            self._show.event(event)
        self._tell_resumes()

    def _tell_resumes(self) -> None:
        for resume in self.ledger.resumes[self._shown :]:
            self._show.resume(resume)
        self._shown = len(self.ledger.resumes)

    def _due(self) -> bool:
        """Whether the next strike may fall: all have resumed, and gone on for a while."""
        if not self._todo or not self.ledger.ready(self._launch):
            return False
        left = self._job.steps - self._step
        late = left <= len(self._todo) * (self._job.every + 1)  # or strikes would be left over
        gone = self._step - self._base
        return gone >= self._todo[0].gap or (late and gone > self._job.every)

    def _strike(self, ranks: Ranks) -> bool:
        """Wait for the moment, strike, and say whether the start has fallen by it."""
        strike = self._todo[0]
        agents = agent_pids(self._job) if strike.target in ("agent", "node") else []
        self._lie_in_wait(strike)
        if all(status is not None for status in ranks.watch()):
            return False  # the run reached its end first
        self._todo.pop(0)
        doomed = range(self._job.world) if strike.target in ("job", "node") else ()
        ranks.kill([strike.rank] if strike.rank is not None else doomed)
        if strike.target in ("agent", "node"):
            end_agents(agents, signal.SIGKILL)
        seen = self._eyes.look()
        self._record(strike, ", ".join(p for p in PHASES if p in seen) or "between saves")
        if strike.target == "agent":
            self._base = self._step
            return False
        if strike.rollback and self.ledger.newest > self._job.every:
            self._back = self.ledger.newest - self._job.every
            self.ledger.rolled_back(self._back)
        if strike.torchrun and strike.target == "rank":
            self._await_restart(ranks)
            return False
        end(ranks)  # the survivors of one rank's death save on until this is noticed
        return True

    def _lie_in_wait(self, strike: Strike) -> None:
        """Watch closely until the strike's moment has come, or so long that it never will."""
        began = time.monotonic()
        moment = began + strike.chance * 0.3
        self._eyes.look()
        while time.monotonic() - began < _IN_VAIN_S:
            self._poll()
            if strike.aim == "moment":
                if time.monotonic() >= moment:
                    return
            elif strike.aim == "saving":
                if (window := self._eyes.window()) is not None:
                    # A save will last about as long as the last one did.
                    moment = window[0] + strike.chance * window[1]
                    time.sleep(max(0.0, moment - time.monotonic()))
                    return
            elif strike.aim in self._eyes.look():
                return
            time.sleep(_KEEN_S)

    def _await_restart(self, ranks: Ranks) -> None:
        """torchrun notices by itself and starts all ranks again."""
        before = self._launch
        began = time.monotonic()
        while self._launch == before:
            self._poll()
            if time.monotonic() - began > _STUCK_S or ranks.watch()[0] is not None:
                raise HandfastError(
                    f"torchrun did not restart its ranks; see {self._job.run}/output"
                )
            time.sleep(_IDLE_S)

    def _record(self, strike: Strike, phase: str) -> None:
        kill = Kill(
            at=time.monotonic(),
            launch=self._launch,
            step=self._step,
            target=strike.target,
            rank=strike.rank,
            aim=strike.aim,
            phase=phase,
            torchrun=strike.torchrun,
        )
        self.kills.append(kill)
        self._show.kill(kill)
