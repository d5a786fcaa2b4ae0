"""What a trainer hears of its saves besides failures: refused values, ranks that differ, skips.

None of it stops a training at once. What is heard is told to an observer and logged, and raised
where it goes on, or where that was asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

from handfast.checkpoint.brought import LEAVE, told
from handfast.checkpoint.session import Session
from handfast.errors import SaveFailed
from handfast.store.provenance import Brought, spell_mixed

__all__ = ["Compared", "Heard", "Observer"]

logger = logging.getLogger("handfast")

Compared = Literal["", "warn", "raise"]

SKIPS_MANY: Final = (8, 64, 512, 4096)  # when it is said, and said again
REFUSALS: Final = 3
"""So many epochs in a row that validators refuse: the training goes nowhere."""


class Observer:
    """Tells a user's function what happens; its failure never blocks a save."""

    def __init__(self, tell: Callable[[str, dict[str, Any]], None] | None) -> None:
        self._tell = tell

    def __call__(self, name: str, **fields: Any) -> None:
        """Tell one event."""
        if self._tell is None:
            return
        try:
            self._tell(name, fields)
        except Exception:
            logger.exception("on_event failed for %s", name)


class Heard:
    """Counts since the last epoch that converged. ``mild``: refusals are never raised."""

    def __init__(
        self, session: Session, tell: Observer, *, replicas: Compared = "", mild: bool = False
    ) -> None:
        self._session = session
        self._tell = tell
        self._replicas: Compared = replicas
        self._mild = mild
        self._latest: object = None
        self._skips = 0
        self._refusals = 0
        self._apart: Sequence[Brought] = ()

    def _since(self, latest: int | None) -> None:
        now = self._session.generation, latest  # whoever goes back begins anew
        if now != self._latest:
            self._latest, self._skips, self._refusals = now, 0, 0

    def skipped(self, latest: int | None) -> None:
        """Warn where skips keep every epoch from converging: ranks may skip in turns."""
        self._since(latest)
        self._skips += 1
        if self._skips in SKIPS_MANY:
            logger.warning(
                "%d saves were skipped and nothing has converged since step %s: where ranks skip "
                "in turns no epoch is whole; every=, images=2 or busy='wait' bring them together",
                self._skips,
                latest,
            )

    def listen(self, latest: int | None) -> None:
        """Hear what is new; no I/O. ``latest`` is the newest step known converged.

        Raises SaveFailed for several refusals in a row, since a training that stays bad would go on
        for days with nothing to come back to but what there is now; for ranks that train what is
        of different epochs; and for ranks that differ, where that is to be raised.
        """
        self._since(latest)
        refused = self._session.new_refusals()
        for epoch, problem in refused:
            self._refusals += latest is None or epoch.step > latest
            self._tell("refused", problem=problem)
            logger.warning("%s; what converged before it stays what a restart takes", problem)
        if self._refusals >= REFUSALS and refused and not self._mild:
            after = "begins anew" if latest is None else f"resumes from step {latest}"
            raise SaveFailed(
                f"{self._refusals} epochs in a row were refused, the last one: {refused[-1][1]}. "
                f"What to do: look into the training; a restart {after}. With "
                "on_error='warn' this is but a warning"
            )
        self._histories()
        for line in self._session.new_divergences() if self._replicas else ():
            self._tell("divergent", problem=line)
            if self._replicas == "raise":
                raise SaveFailed(line)
            logger.warning("%s", line)

    def _histories(self) -> None:
        """Raise SaveFailed for a mixture, until it is none; warn of what else is apart, once."""
        before, self._apart = self._apart, self._session.histories
        if not self._apart:
            return
        parts = spell_mixed(self._apart)
        if self._apart != before:
            problem = told(self._apart, "what is saved")
            self._tell("apart", problem=problem)
            if self._mild or not parts:
                logger.warning("%s", problem)
        if parts and not self._mild:
            raise SaveFailed(
                f"what is trained is a mixture: {'; '.join(parts)}. No restore goes on with an "
                f"epoch of it. What to do: {LEAVE}. With on_error='warn' this is but a warning"
            )
