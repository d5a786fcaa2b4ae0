"""Links between services that one owns, whose frames are read under their own epoch alone.

Read :mod:`handfast.link` first: all that is decided is there. Here are the keys of a fleet's nodes
(``keyed``), and two transports: ``drive`` (what both do), ``stream`` (TCP), ``datagram`` (UDP).
"""

from handfast.fleet.link.datagram import Datagram
from handfast.fleet.link.keyed import Keyed
from handfast.fleet.link.stream import Stream
from handfast.link.end import Codec, End, Opened, Taken
from handfast.link.frame import LinkError, Reason
from handfast.link.records import Records
from handfast.link.session import Bound, Offered, Persist, Record, Send, Session, Taking
from handfast.link.switch import Phase, Spoken

__all__ = [
    "Bound", "Codec", "Datagram", "End", "Keyed", "LinkError", "Offered", "Opened", "Persist",
    "Phase", "Reason", "Record", "Records", "Send", "Session", "Spoken", "Stream", "Taken",
    "Taking",
]  # fmt: skip
