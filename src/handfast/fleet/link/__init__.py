"""Links whose every frame is read under the epoch that it was sent under, and no other.

Read in this order: ``frame`` (the outer header, which never changes), ``switch`` (how an open link
changes its epoch), ``session`` (the handshake), ``window`` (what came), ``end`` (one end of a
link, without I/O), ``stream`` and ``datagram`` (TCP and UDP).
"""

from handfast.fleet.link.datagram import Datagram
from handfast.fleet.link.end import Codec, End, Opened, Taken
from handfast.fleet.link.frame import LinkError, Reason
from handfast.fleet.link.session import (
    Bound,
    Offered,
    Persist,
    Record,
    Send,
    Session,
    Taking,
    recall,
)
from handfast.fleet.link.stream import Stream
from handfast.fleet.link.switch import Phase, Spoken

__all__ = [
    "Bound", "Codec", "Datagram", "End", "LinkError", "Offered", "Opened", "Persist", "Phase",
    "Reason", "Record", "Send", "Session", "Spoken", "Stream", "Taken", "Taking", "recall",
]  # fmt: skip
