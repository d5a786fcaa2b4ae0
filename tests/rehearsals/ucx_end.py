"""One end of a connection of UCX, which trades three messages each way and looks at every byte.

    ucx_end.py LIBRARIES VERSION listener|address listen|dial ADDRESS PORT

By `listener` the ends meet at UCX's own listener; by `address` they trade the addresses of their
workers over a socket of ours. The one that listens says at which port.

It calls libucp itself, since `ucx_perftest` is bound to the library that it was built with. Calls,
structs and numbers: ucp/api/ucp.h, ucp_def.h and ucs/type/status.h, equal in UCX 1.18.1 and 1.22.0.
A struct's first field says which others are set, so that older libraries take it, too. A status is
one byte (UCS_S_PACKED).
"""

from __future__ import annotations

import ctypes
import socket
import struct
import sys
from contextlib import suppress
from ctypes import byref, c_char_p, c_int, c_int8, c_size_t, c_uint32, c_uint64, c_void_p

SIZES = (8, 8 << 10, 2 << 20)  # in one piece, in some, and by rendezvous
TAG, WHOLE = c_uint64(0x5EED), c_uint64(2**64 - 1)
IN_PROGRESS, LAST_ERROR = 1, 100  # UCS_INPROGRESS, -UCS_ERR_LAST
FEATURE_TAG, PEER_FAILURE, CLIENT_SERVER = 1, 1, 1
REFUSED = 96

Asked = ctypes.CFUNCTYPE(None, c_void_p, c_void_p)
Failed = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int8)


class No(Exception):
    """What UCX itself says no with."""


class Sockaddr(ctypes.Structure):
    _fields_ = (("address", c_char_p), ("size", c_uint32))


class Params(ctypes.Structure):
    """Any struct of parameters of which at most the first field is set."""

    _fields_ = (("mask", c_uint64), ("first", c_uint64), ("rest", c_uint64 * 62))


class ListenerParams(ctypes.Structure):
    _fields_ = (
        ("mask", c_uint64), ("sockaddr", Sockaddr), ("accept", c_void_p * 2),
        ("asked", Asked), ("argument", c_void_p), ("rest", c_uint64 * 32),
    )  # fmt: skip


class EndpointParams(ctypes.Structure):
    _fields_ = (
        ("mask", c_uint64), ("address", c_char_p), ("errors", c_int), ("failed", Failed),
        ("argument", c_void_p), ("user_data", c_void_p), ("flags", c_uint32),
        ("sockaddr", Sockaddr), ("request", c_void_p), ("rest", c_uint64 * 32),
    )  # fmt: skip


class ListenerAttributes(ctypes.Structure):
    _fields_ = (("mask", c_uint64), ("sockaddr", ctypes.c_ubyte * 128), ("rest", c_uint64 * 16))


class End:
    """A worker of UCX, and its endpoint once it has one."""

    def __init__(self, libraries: str, version: str) -> None:
        self._ucp = ctypes.CDLL(f"{libraries}/libucp.so.0")
        self._ucs = ctypes.CDLL(f"{libraries}/libucs.so.0")
        self._ucs.ucs_status_string.argtypes = (c_int8,)
        self._ucs.ucs_status_string.restype = c_char_p
        self._ucp.ucp_get_version_string.restype = c_char_p
        found = self._ucp.ucp_get_version_string().decode()
        if found != version:
            sys.exit(f"{libraries} has UCX {found}, and not {version}")
        self._failure = 0
        self._hear = Failed(self._fail)  # held: UCX calls it
        self._worker, self._endpoint = c_void_p(), c_void_p()
        context, config = c_void_p(), c_void_p()
        major, minor = map(int, version.split(".")[:2])
        tags = Params(1, FEATURE_TAG)
        self._call("ucp_config_read", None, None, byref(config))
        self._call("ucp_init_version", major, minor, byref(tags), config, byref(context))
        self._call("ucp_worker_create", context, byref(Params()), byref(self._worker))

    def meet_at_listener(self, role: str, address: str, port: int) -> None:
        """Connect as UCX's client, or as the server of the first that asks."""
        at = _sockaddr(address, port)
        if role == "dial":
            self._connect(1 << 4 | 1 << 5, sockaddr=at, flags=CLIENT_SERVER)
            return
        requests: list[int] = []
        asked = Asked(lambda request, _: requests.append(request))
        listener, found = c_void_p(), ListenerAttributes(1)
        given = ListenerParams(1 << 0 | 1 << 2, sockaddr=at, asked=asked)
        self._call("ucp_listener_create", self._worker, byref(given), byref(listener))
        self._call("ucp_listener_query", listener, byref(found))
        print("listening", int.from_bytes(found.sockaddr[2:4], "big"), flush=True)
        while not requests:
            self._progress()
        self._connect(1 << 6, request=requests[0])

    def meet_by_address(self, role: str, address: str, port: int) -> None:
        """Connect to the worker whose address the other one says, and say ours."""
        own, size = c_void_p(), c_size_t()
        self._call("ucp_worker_get_address", self._worker, byref(own), byref(size))
        if role == "dial":
            other = socket.create_connection((address, port))
        else:
            server = socket.create_server((address, port))
            print("listening", server.getsockname()[1], flush=True)
            other, _ = server.accept()
        other.sendall(struct.pack("!I", size.value) + ctypes.string_at(own, size.value))
        (size.value,) = struct.unpack("!I", other.recv(4, socket.MSG_WAITALL))
        self._connect(1 << 0, address=other.recv(size.value, socket.MSG_WAITALL))

    def send(self, data: bytes) -> None:
        """Send a message, until it may be forgotten here."""
        size = c_size_t(len(data))
        self._wait("ucp_tag_send_nbx", self._endpoint, data, size, TAG, byref(Params()))

    def receive(self, size: int) -> bytes:
        """Wait for the next message."""
        data, full = ctypes.create_string_buffer(size), c_size_t(size)
        self._wait("ucp_tag_recv_nbx", self._worker, data, full, TAG, WHOLE, byref(Params()))
        return data.raw

    def close(self) -> None:
        """Let what was sent arrive; the other end may have closed before."""
        with suppress(No):
            self._wait("ucp_ep_close_nbx", self._endpoint, byref(Params()))

    def _connect(self, mask: int, **fields: object) -> None:
        """Make the endpoint; one that tells when the other end is gone."""
        self._given = EndpointParams(
            mask | 1 << 1 | 1 << 2, errors=PEER_FAILURE, failed=self._hear, **fields
        )
        self._call("ucp_ep_create", self._worker, byref(self._given), byref(self._endpoint))

    def _fail(self, _argument: int, _endpoint: int, status: int) -> None:
        self._failure = status

    def _progress(self) -> None:
        self._ucp.ucp_worker_progress(self._worker)
        self._judge("the endpoint", self._failure)

    def _call(self, name: str, *arguments: object) -> int:
        function = getattr(self._ucp, name)
        function.restype = c_int8
        return self._judge(name, function(*arguments))

    def _wait(self, name: str, *arguments: object) -> None:
        """Start an operation, and go on until it ended."""
        function = getattr(self._ucp, name)
        function.restype = c_void_p
        request = function(*arguments) or 0  # 0: it ended at once
        if request >= 2**64 - LAST_ERROR:
            self._judge(name, request - 2**64)
        while request and self._call("ucp_request_check_status", c_void_p(request)) == IN_PROGRESS:
            self._progress()

    def _judge(self, what: str, status: int) -> int:
        if status < 0:
            raise No(f"{what}: {self._ucs.ucs_status_string(status).decode()}")
        return status


def _sockaddr(address: str, port: int) -> Sockaddr:
    """Make a sockaddr_in (netinet/in.h)."""
    data = struct.pack("=H", socket.AF_INET) + struct.pack("!H", port) + socket.inet_aton(address)
    return Sockaddr(data + bytes(8), 16)


def _message(size: int, dialer: bool) -> bytes:
    """Bytes that no two sizes or ends share; 251 is prime, so no block repeats another."""
    return (bytes(range(251)) * (size // 251 + 2))[size % 241 + dialer :][:size]


def main(libraries: str, version: str, meet: str, role: str, address: str, port: str) -> int:
    """Meet the other end, and trade messages; the dialer sends first."""
    came = 0
    try:
        end = End(libraries, version)
        at = end.meet_at_listener if meet == "listener" else end.meet_by_address
        at(role, address, int(port))
        for size in SIZES:
            for dialer in (True, False):
                if dialer == (role == "dial"):
                    end.send(_message(size, dialer))
                elif end.receive(size) == _message(size, dialer):
                    came += 1
                else:
                    print(f"other bytes came than were sent ({size:,})", file=sys.stderr)
                    return 1
    except No as error:
        after = f"after {came} of {len(SIZES)} messages, " if came else ""
        print(f"{after}{error}", file=sys.stderr)
        return 1 if came else REFUSED
    end.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
