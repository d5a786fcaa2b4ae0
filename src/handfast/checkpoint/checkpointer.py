"""The Checkpointer: one job's saves and restores, whatever framework its state is of.

A framework gives a :class:`~handfast.checkpoint.port.State`: how to read, copy, compare and write
its objects. All else, the rounds, the agent, the policies, the waiting and the naming of who is
missing, is here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Final, Literal, Self, get_args

import msgspec

from handfast.agent.local import AgentGone
from handfast.agent.snapshot import Proposal
from handfast.checkpoint.alone import alone
from handfast.checkpoint.arguments import kept, line, one_of, patterns, seconds, whole
from handfast.checkpoint.brought import refuse_mixed, warn
from handfast.checkpoint.heard import Compared, Heard, Observer
from handfast.checkpoint.port import State
from handfast.checkpoint.refusal import Load, below, suggest, words
from handfast.checkpoint.rounds import none_begun
from handfast.checkpoint.save import Save
from handfast.checkpoint.session import Session
from handfast.checkpoint.validated import Validated
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.messages import RestoreCertificate
from handfast.core.retain import Keep
from handfast.core.verdict import Verdict
from handfast.core.view import Lattice
from handfast.errors import Blocked, Damaged, HandfastError, Poisoned, Refused, SaveFailed

__all__ = ["Busy", "Checkpointer", "OnError", "Policy"]

logger = logging.getLogger("handfast")

Busy = Literal["wait", "skip", "raise"]
Policy = Literal["rollback", "refuse"]
OnError = Literal["raise", "retry", "warn"]
RETRIES: Final = 3


class Checkpointer:
    """Saves and restores the state of a job as epochs that converge or never count.

    ``session`` joins this rank to the job and its agent; ``state`` reads and writes the
    framework's objects. See :class:`handfast.torch.Checkpointer` for the arguments that users
    give. Not for several threads at once.
    """

    def __init__(
        self,
        session: Session,
        state: State,
        *,
        every: int = 1,
        keep: Keep | None = None,
        images: int = 1,
        window: int = 2,
        busy: Busy = "wait",
        on_error: OnError = "raise",
        replicas: Compared = "",
        on_event: Callable[[str, dict[str, Any]], None] | None = None,
        drain_s: float = 30.0,
        patience_s: float | None = 600.0,
    ) -> None:
        self._every = whole("every", every, least=1)
        self._image_count = max(1, whole("images", images, least=0))
        self._window = whole("window", window, least=1)
        one_of("busy", busy, get_args(Busy))
        one_of("on_error", on_error, get_args(OnError))
        one_of("replicas", replicas, get_args(Compared))
        self._session = session
        self._state = state
        self._keep = kept(keep)
        self._busy: Busy = busy
        self._on_error: OnError = on_error
        self._event = Observer(on_event)
        self._heard = Heard(session, self._event, replicas=replicas, mild=on_error == "warn")
        self._drain_s = seconds("drain_s", drain_s)
        self._patience_s = None if patience_s is None else seconds("patience_s", patience_s)
        self._restored: RestoreCertificate | None = None
        self._began = self._tried = False
        self._poison = ""
        self._last: Save | None = None
        self._failures = 0
        self._overdue = False
        self._closed = False
        self._doing = ""
        self._owner = os.getpid()
        self.extra: object = None
        """What was given to the ``save(extra=...)`` that :meth:`restore` resumed from."""

    # --- what is known --------------------------------------------------------------------------

    @property
    def lattice(self) -> Lattice:
        """All domains' epochs, the converged line, the skew and who blocks; no I/O, no waiting."""
        return self._session.lattice

    @property
    def restored(self) -> Epoch | None:
        """The epoch that this generation resumed from; None before :meth:`restore`."""
        return self._restored.base if self._restored is not None else None

    def all_steps(self) -> list[int]:
        """List the steps of the epochs that this rank's domain retains, oldest first."""
        return [epoch.step for epoch in self._session.snapshot.retained if epoch != GENESIS]

    def latest_step(self) -> int | None:
        """Give the step of the newest epoch known converged; None where there is none."""
        line = self._session.snapshot.line
        return line.epoch.step if line is not None and line.epoch != GENESIS else None

    def should_save(self, step: int) -> bool:
        """Say whether the schedule names this step."""
        return step % self._every == 0 or self._overdue

    # --- restore --------------------------------------------------------------------------------

    @alone
    def restore(
        self,
        step: int | None = None,
        *,
        only: Sequence[str] = ("**",),
        strict: bool = True,
        require: bool = False,
        keep_live: Sequence[str] = (),
        dry_run: bool = False,
        in_place: bool = False,
        policy: Policy = "rollback",
        lineage: str = "",
    ) -> int:
        """Resume from the recovery line of the whole job; gives its step, 0 on a first start.

        Every rank must call it, once before its first save. ``step`` asks for one retained step
        instead of the newest: what came after it is then an abandoned timeline for ever. ``only``
        and ``strict`` restore a part; ``keep_live`` names hyperparameters that keep their live
        values; ``require`` refuses a first start; ``dry_run`` stops before anything is changed (and
        this generation can then save nothing). ``in_place`` is for a start, where the live state is
        worth nothing yet: all bytes are read once, to where they belong, and judged there, before
        it is decided whether they are loaded; where nothing can be restored it is poisoned then.
        Where the newest that converged can't be had, ``policy="rollback"`` takes an older one and
        warns, "refuse" does not. ``lineage`` names a history that begins here and goes on whole.

        Raises Refused where nothing can be restored rightly (nothing was changed), Blocked where
        ranks are missing for ``patience_s`` seconds, Poisoned where a ``load_state_dict`` failed
        half-way, Superseded where a later launch has taken over.
        """
        self._check_open()
        step = None if step is None else whole("step", step)
        only, keep_live = patterns("only", only, least=1), patterns("keep_live", keep_live)
        one_of("policy", policy, get_args(Policy))
        lineage = lineage and line(lineage)
        if in_place and dry_run:
            raise ValueError("in_place=True changes the live state: not with dry_run=True")
        session, brought = self._session, self._state.brought()
        self._restored, self._last, self._tried = None, None, True
        session.start(
            want=step, keep=self._keep, window=self._window, drain_s=self._drain_s, require=require,
            patience_s=self._patience_s, in_place=in_place, lineage=lineage, brought=brought,
        )  # fmt: skip
        self._state.shares(session.collective.place.rank, session.neighbours())
        read = self._read_in_place(only, strict) if in_place else {}
        proposal = session.await_proposal(self._patience_s)
        with self._declining(proposal):
            if policy == "refuse" and proposal.left_behind:
                raise below(proposal)
            copies = read.get(proposal.epoch) or self._held(proposal, only, strict, require)
            self._state.begins(copies, only, lineage)
        if dry_run:
            return proposal.epoch.step
        session.accept(proposal)
        certificate = session.await_certificate(self._patience_s)
        if copies:
            self._apply(copies, only, keep_live)
        self._state.began(copies, only, lineage, session.run)
        self._restored, self._poison, self._began = certificate, "", True
        self._tell_restored(proposal, certificate)
        return certificate.base.step

    def _tell_restored(self, proposal: Proposal, certificate: RestoreCertificate) -> None:
        generation, base, left = certificate.generation, certificate.base, proposal.left_behind
        if left:
            logger.warning(
                "resumed %s, BELOW what had converged: %s. What was trained above it is lost, and "
                "is an abandoned timeline from now on",
                base,
                "; ".join(left),
            )
        if base == GENESIS and self._session.collective.place.rank == 0:
            warn(self._session.brought, "what they bring")
        what = "first start" if base == GENESIS else f"resumed {base}"
        logger.info("%s, generation %d", what, generation)
        self._event("restored", generation=generation, epoch=str(base), left_behind=list(left))

    def _check_first(self, require: bool) -> None:
        if self._poison:
            raise Poisoned(
                "this would be a first start, and the live state is none that was just built: "
                f"{self._poison}. What to do: start the process anew, without in_place=True"
            )
        if self._began:
            raise Refused(
                "nothing was saved in this run yet, and the live state is no first one any more",
                verdict=Verdict.MISSING,
                remedy="build model, optimizer and all else anew, and a new Checkpointer for them",
            )
        if require:
            raise none_begun()

    @contextlib.contextmanager
    def _declining(self, proposal: Proposal) -> Iterator[None]:
        """Tell the other ranks, who wait for this one's word, whatever keeps it from giving it."""
        try:
            yield
        except Exception as error:
            with contextlib.suppress(HandfastError):
                self._session.decline(proposal.epoch, words(error))
            raise

    def _held(
        self, proposal: Proposal, only: Sequence[str], strict: bool, require: bool
    ) -> list[Validated]:
        """Hold what is proposed against the live state; nothing, at a first start."""
        if proposal.epoch == GENESIS:
            self._check_first(require)
            refuse_mixed(self._session.brought, "what the ranks bring")
            return []
        copies = self._fetch(partial(self._session.load, proposal))
        self._compare(copies, only, strict)
        return copies

    def _compare(self, copies: Sequence[Validated], only: Sequence[str], strict: bool) -> None:
        if self._poison and not (strict and "**" in only):  # some of it would stay as it is
            raise Poisoned(
                f"{self._poison}; only a restore without only= and strict=False mends it"
            )
        self._state.compare(copies, only, strict)

    def _read_in_place(self, only: Sequence[str], strict: bool) -> dict[Epoch, list[Validated]]:
        """Read candidates to where they belong, and judge them so; gives the last, if it is whole.

        What this rank could not load anyway its agent judges, so that all hear why.
        """
        session = self._session
        read: dict[Epoch, list[Validated]] = {}
        while (epoch := session.await_candidate(self._patience_s)) is not None:
            read, copies = {}, []
            problem: str | None = None
            try:
                copies = self._fetch(partial(session.look, epoch))
                self._compare(copies, only, strict)
            except Exception as error:  # said again, once the agents have judged it
                logger.info("epoch %s is not read in place: %s", epoch, error)
                copies = []
            if copies:
                self._poison = "a restore into the live state did not come to its end"
                try:
                    self._state.preload(copies, only)
                    problem, read = "", {epoch: copies}
                except Damaged as error:
                    problem = str(error)
                except Exception as error:  # this rank's own trouble: the others hear of it later
                    logger.warning("epoch %s could not be read in place: %s", epoch, error)
            session.judge(epoch, problem)
        return read

    def _fetch(self, get: Callable[[int], Validated]) -> list[Validated]:
        """Get this rank's own shard, and the one that holds what it has left to another."""
        own = get(self._session.collective.place.rank)
        left = own.manifest.left
        return [own] if left is None else [own, get(left.shard)]

    def _apply(
        self, copies: Sequence[Validated], only: Sequence[str], keep_live: Sequence[str]
    ) -> None:
        """Load, and hear whether all ranks could: where one could not, none goes on to train.

        Raises Refused, the same on all, before anything is loaded, for a mixture.
        """
        self._session.check_histories(copies[0].manifest.stamp)
        self._poison = "a restore was interrupted"
        collective = self._session.collective
        mine = Load()
        failure: Exception | None = None
        try:
            self.extra = self._state.apply(copies, only, keep_live)
            if collective.place.size > 1:
                mine = Load("", self._state.replicas(copies))
        except Exception as error:
            failure, mine = error, Load(words(error))
        loads = [
            msgspec.msgpack.decode(data, type=Load)
            for data in self._session.gather("load", msgspec.msgpack.encode(mine))
        ]
        failed = [f"rank {rank}: {load.problem}" for rank, load in enumerate(loads) if load.problem]
        if failed:
            self._poison = "; ".join(failed)
            raise failure or Poisoned(f"another rank could not load: {self._poison}")
        if collective.place.rank == 0:
            suggest([load.replicas for load in loads])

    # --- save -----------------------------------------------------------------------------------

    @alone
    def save(
        self, step: int, *, force: bool = False, grads: bool = False, extra: object = None
    ) -> Save:
        """Save the state after ``step`` completed updates, if the schedule names it.

        Returns once the state is copied: nothing that the training does afterwards is seen in the
        epoch. ``force`` saves whatever the schedule says; ``extra`` is a plain value that goes
        along; ``grads`` saves the gradients, too, so that a save in the middle of an accumulation
        misses nothing: count micro-steps there, for ``step`` must rise with each save.

        Raises ValueError for a step that is not above the last one; what went wrong with earlier
        saves, by the policy ``on_error``; Blocked under ``busy="raise"``; Poisoned after a restore
        that failed half-way; Unstorable for state that can't be stored; Superseded.
        """
        step = whole("step", step)
        self._check(step)
        base = self.restored
        if base is not None and step == base.step and self._last is None:
            return Save(self._session, None, f"step {step} is the one that was restored")
        if not force and not self.should_save(step):
            return Save(self._session, None, f"step {step} is not on the schedule")
        pending = self._state.pending(grads)
        if pending:
            way = "or pass grads=True (a scaler has to be updated by then)"
            way = "once all is reduced, and a scaler updated" if grads else way
            raise ValueError(
                f"step {step}: gradients have changed since the last optimizer step, or are still "
                f"needed ({', '.join(pending[:3])}): save after the step, {way}"
            )
        began = time.monotonic()
        epoch = Epoch(self._session.generation, step)
        try:
            taken = self._take(epoch, extra, grads)
        except (SaveFailed, AgentGone) as error:
            self._trouble([f"epoch {epoch}: {error}"])
            return Save(self._session, None, str(error))
        if taken:
            self._last = taken
            self._overdue &= taken.phase == "failed"  # of another rank, before this one had begun
            blocked = time.monotonic() - began
            self._event("staged", epoch=str(epoch), blocked_s=blocked)
        return taken

    def _check_open(self) -> None:
        if os.getpid() != self._owner:  # its images are the parent's memory too
            raise RuntimeError(
                f"this Checkpointer belongs to process {self._owner}: a forked child makes its own"
            )
        if self._closed:
            raise RuntimeError("this Checkpointer is closed: make another one")

    def _check(self, step: int) -> None:
        self._check_open()
        if self._poison:
            raise Poisoned(f"nothing can be saved until a restore succeeds: {self._poison}")
        if self._restored is None:
            raise RuntimeError(
                "call restore() before a save (it gives 0 on a first start); the last one was a "
                "dry run, or was refused"
                if self._tried
                else "call restore() before the first save: it gives 0 on a first start"
            )
        self.check_for_errors()
        last = self._last.epoch.step if self._last and self._last.epoch else None
        base = self._restored.base.step
        if step < base or (last is not None and step <= last):
            what = f"{base}, which was restored" if last is None else last
            raise ValueError(
                f"step {step} is not above {what}: within one generation steps only rise; to go "
                "back, call restore(step=...); amid an accumulation (grads=True) count micro-steps"
            )

    def _take(self, epoch: Epoch, extra: object, grads: bool) -> Save:
        self._state.keeps(self._session.snapshot.unlike)
        patience = self._patience_s if self._busy == "wait" else 0.0
        wait_s = 3600.0 if self._patience_s is None else self._patience_s / 2
        image, staging = None, self._session.staging
        if staging.has_idle(patience):  # what is captured then is copied at once
            plan = self._state.capture(extra, grads, partial(self._session.prove, epoch, wait_s))
            image = staging.image_for(plan, self._image_count, patience)
        if image is None:
            why, by = "an earlier epoch is still being persisted", [self._session.snapshot.domain]
            return self._decline(epoch, why, by)
        objects, left, put = self._state.copy(image)
        why, by = staging.stage(epoch, image, objects, patience, left, put)
        if not why:
            return Save(self._session, epoch)
        if not by:
            raise SaveFailed(f"epoch {epoch} was not taken: {why}")
        return self._decline(epoch, why, by)

    def _decline(self, epoch: Epoch, why: str, by: Sequence[str]) -> Save:
        if self._busy == "wait":
            raise Blocked(f"epoch {epoch}: {why}", by=by)
        self._session.forgo(epoch, why)  # or the others would wait for it, each in its turn
        if self._busy == "raise":
            raise Blocked(f"epoch {epoch}: {why}", by=by)
        self._heard.skipped(self.latest_step())
        self._event("skipped", epoch=str(epoch), reason=why, by=list(by))
        return Save(self._session, None, why)

    # --- failures and the end -------------------------------------------------------------------

    def check_for_errors(self) -> None:
        """Raise what became known of failed saves since the last call, by ``on_error``; no I/O.

        Other ranks may learn of the same failure at another step: saves contain no collective.
        """
        self._session.check()
        self._heard.listen(self.latest_step())
        # What a handle has raised is tried again all the same: the other ranks do, and would wait.
        problems = self._session.new_problems(told=self._on_error == "retry")
        if not problems:
            if self._last is not None and self._last.phase == "converged":
                self._failures = 0
            return
        self._trouble(problems)

    def _trouble(self, problems: Sequence[str]) -> None:
        """Do with failed saves what ``on_error`` says."""
        self._failures += 1
        text = "; ".join(problems)
        self._event("failed", problems=list(problems))
        if self._on_error == "warn":
            logger.warning("a save failed, training goes on: %s", text)
        elif self._on_error == "retry" and self._failures <= RETRIES:
            self._overdue = True
            logger.warning("a save failed and is tried again at the next step: %s", text)
        else:
            raise SaveFailed(text)

    @alone
    def wait_until_finished(self, timeout: float | None = None) -> None:
        """Wait until the last save has converged. Raises what ``Save.converged`` raises."""
        if self._last is not None:
            self._last.converged(timeout)

    @alone
    def close(self, timeout: float | None = None) -> None:
        """Wait for the last save to converge, and leave the agent to end by itself.

        Of earlier saves that failed or were refused it warns. Raises what ``Save.converged``
        raises, but for a failed save under ``on_error="warn"``, and what a validator or differing
        ranks raise at a save; it is closed all the same, and the agent goes on with what it was
        given. Once closed, this does nothing. Without a ``timeout`` it waits for ``patience_s``.
        """
        if self._closed or os.getpid() != self._owner:
            return
        try:
            if self._last is not None:
                self._last.converged(self._patience_s if timeout is None else timeout)
            for problem in self._session.new_problems():
                logger.warning("a save failed, and a later one has converged: %s", problem)
            self._heard.listen(self.latest_step())
        except SaveFailed as error:
            if self._on_error != "warn":
                raise
            logger.warning("the last save failed: %s", error)
        finally:
            self._leave()

    def _leave(self) -> None:
        self._closed = True
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None or os.getpid() != self._owner:
            self.close(self._patience_s)
            return
        try:  # never mask what ended the training
            if self._last is not None and not self._closed:
                self._last.persisted(self._drain_s)
        except HandfastError as late:
            logger.warning("the last save was not finished: %s", late)
        finally:
            self._leave()
