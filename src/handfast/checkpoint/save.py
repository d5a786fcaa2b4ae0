"""The handle of one save: what has become of it, and how to wait for more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from handfast.core.lattice import Epoch
from handfast.core.messages import Certificate

if TYPE_CHECKING:
    from handfast.checkpoint.session import Session

__all__ = ["Save"]


class Save:
    """What ``Checkpointer.save`` returns; true where an image was taken.

    ``epoch`` is None and ``reason`` says why where it was not. Waiting is optional: an epoch
    converges without anybody watching, and failures are raised at the next call.
    """

    def __init__(self, session: Session, epoch: Epoch | None, reason: str = "") -> None:
        self._session = session
        self.epoch = epoch
        self.reason = reason

    def __bool__(self) -> bool:
        return self.epoch is not None

    def __repr__(self) -> str:
        return f"<Save {self.epoch or 'not taken'}: {self.phase}>"

    @property
    def phase(self) -> str:
        """One of skipped, staged, persisted, converged, failed; no I/O and no waiting."""
        return "skipped" if self.epoch is None else self._session.phase_of(self.epoch)

    def staged(self, timeout: float | None = None) -> Save:  # noqa: ARG002 - see the docstring
        """Return at once: the state was copied before ``save`` returned."""
        return self

    def persisted(self, timeout: float | None = None) -> Save:
        """Wait until this rank's shard is durable, read back and attested.

        ``timeout`` is in seconds; None waits for ever. Raises Blocked where it has passed,
        SaveFailed where this rank's shard could not be persisted, Superseded where a later
        launch has taken the run over.
        """
        if self.epoch is not None:
            self._session.wait_persisted(self.epoch, timeout)
        return self

    def converged(self, timeout: float | None = None) -> Certificate | None:
        """Wait until this epoch, or a later one, is known converged, and give the certificate.

        None for a save that was not taken. Raises what :meth:`persisted` raises; Blocked names
        every domain whose vote is missing, SaveFailed those that skipped.
        """
        if self.epoch is None:
            return None
        return self._session.wait_converged(self.epoch, timeout)
