"""Who a node is: its enrolled key. In which of its lives: the boot, and a counter that only rises.

Hostname, address, machine-id and serial are facts about a node and never its identity: they are
copied with a disk image, changed by an operator, reused for the replacement. The key is an Ed25519
key that `handfast fleet enroll` makes once in the node's state directory (file mode 0600) and that
nothing makes again. A reimaged node has no key, so it is another node until somebody says
otherwise.

**An incarnation** is the kernel's boot id and a counter. It is one process, which holds the lock of
the directory for as long as it is the node, and raises the counter, durably, before it says
anything. So no number is used twice, and no older incarnation of the directory speaks when a newer
one does. What a power cut takes away is at most a number that nobody has used.

**A cloned disk image** is two machines with one key and one counter. Which of them is the node,
nobody can say, so both are refused. What shows it, of statements that were seen:

- the same number under two boot ids: the directory was copied, or put back to an earlier state;
- a boot id that comes back after another one: a kernel that was gone speaks again;
- one boot id and two machines' serials: the memory was copied as well;
- an older incarnation that answers a challenge which was put after a newer one had been heard.

**What can't be seen**: a copy that never speaks; a copy that took over from a machine that has
ended (moving a disk looks the same, and is allowed); two copies of one memory image on hardware
that tells no serial, for as long as they say the same. A delayed statement is no evidence: only
the answer to a challenge says when it was made.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Final

import msgspec

from handfast.core.verdict import Verdict
from handfast.errors import UNREADABLE, Blocked, Damaged, FormatError, HandfastError, Refused
from handfast.fleet.inventory.facts import Inventory, decode, encode
from handfast.link.life import Node, Private, count, counted
from handfast.store.files import Files, describe, make_directory, remedy, try_lock, write_file

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

__all__ = [
    "EXTRA", "Clone", "Key", "Sighting", "Statement", "clones", "enroll", "life", "load",
    "read_statement", "sign", "verify",
]  # fmt: skip

SIGNED: Final = b"handfast.statement/1\n"
KEY: Final = "node.key"
COUNTER: Final = "counter"
LOCK: Final = "lock"
WAIT_S: Final = 5.0  # for who is the node just now: a look at it takes a second or two
PAUSE_S: Final = 0.01
EXTRA: Final = (
    "an identity takes the package `cryptography`. What to do: pip install 'handfast[fleet]'"
)

Hex = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{2})*$")]


class Key:
    """A node's key pair. ``id`` is the public half, 64 hex digits: that is the node's name."""

    def __init__(self, secret: Ed25519PrivateKey) -> None:
        self._secret = secret
        self.id = secret.public_key().public_bytes_raw().hex()

    def sign(self, data: bytes) -> bytes:
        """Sign bytes: 64 bytes of Ed25519 (RFC 8032)."""
        return self._secret.sign(data)


class Statement(msgspec.Struct, frozen=True):
    """What a node says of itself: an inventory that names it, in answer to a challenge, signed.

    ``body`` is the inventory's JSON as it was signed. ``challenge`` is what the asker chose, in
    hex, and empty where nobody asked.
    """

    body: str
    challenge: Hex
    signature: Hex


class Sighting(msgspec.Struct, frozen=True):
    """An incarnation that was heard, and where.

    ``serial`` is the hardware's own, empty where it is not known. ``asked`` and ``heard`` are on
    the observer's own count of what it did: when it put the challenge that this answers (0: none),
    and when this came. Counts of two observers can't be compared. ``where`` names it for people: a
    host, an address, a file.
    """

    node: Node
    serial: str = ""
    asked: int = 0
    heard: int = 0
    where: str = ""


class Clone(msgspec.Struct, frozen=True):
    """A key that more than one live machine holds: the evidence, and everybody who used it."""

    key: str
    why: str
    where: tuple[str, ...]


def enroll(directory: str, files: Files | None = None) -> Key:
    """Make a node's key, once, durably, for this user only. Changes nothing where there is one.

    The key is written under another name, synced, linked, and its name synced: two that enroll at
    once agree on the first. Raises Refused where the directory has a key or was used before,
    HandfastError where it can't be written.
    """
    with _extra():
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    path, counter = f"{directory}/{KEY}", f"{directory}/{COUNTER}"
    secret = ed25519.Ed25519PrivateKey.generate()
    pem = secret.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    temporary = f"{path}.{os.urandom(8).hex()}.tmp"
    files = files or Private()
    with _writing(path):
        make_directory(files, directory)
        try:
            with suppress(FileExistsError):
                write_file(files, counter, b"0\n")
            if counted(files, counter, _ANEW) and not files.exists(path):
                raise Refused(
                    f"{directory} has a counter and no key: it was a node's, whose key is gone",
                    verdict=Verdict.MISSING,
                    remedy="put the key back, or enroll in an empty directory as another node",
                )
            write_file(files, temporary, pem)
            files.link(temporary, path)
            files.fsync_dir(directory)
        except FileExistsError as error:
            raise Refused(
                f"{path}: this node is enrolled already",
                verdict=None,
                remedy="use it as it is; to make it another node, move the whole directory away",
            ) from error
        finally:
            with suppress(FileNotFoundError):
                files.unlink(temporary)
    return Key(secret)


def load(directory: str) -> Key:
    """Read a node's key. Raises Refused where there is none, or others may read it; Damaged."""
    with _extra():
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    path = f"{directory}/{KEY}"
    try:
        with open(path, "rb") as file:
            mode, pem = os.fstat(file.fileno()).st_mode, file.read(1 << 16)
    except FileNotFoundError as error:
        raise Refused(
            f"{path}: this node is not enrolled",
            verdict=Verdict.MISSING,
            remedy="run `handfast fleet enroll`, once, on the node itself",
        ) from error
    except OSError as error:
        what = f"{path}: {describe(error)}. What to do: run this as the user who enrolled the node"
        raise HandfastError(what) from error
    if mode & 0o077:
        raise Refused(
            f"{path}: others than its owner may use it (mode {mode & 0o777:04o})",
            verdict=None,
            remedy=f"chmod 600 {path}; and if it may have been read, enroll the node anew",
        )
    try:
        secret = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise Damaged(f"{path}: no private key: {error}. What to do: {_ANEW}") from error
    if not isinstance(secret, ed25519.Ed25519PrivateKey):
        raise FormatError(f"{path}: not a key of Ed25519. What to do: {_ANEW}")
    return Key(secret)


_ANEW: Final = "enroll the node in an empty directory: it is another node then"


@contextmanager
def life(directory: str, key: Key, boot: str) -> Iterator[Node]:
    """Be the node, as the only process that is: raise the counter, durably, and only then give it.

    Raises Blocked where another process is the node, Damaged where the counter can't be read,
    HandfastError where it can't be written.
    """
    path = f"{directory}/{COUNTER}"
    with _locked(f"{directory}/{LOCK}"):
        with _writing(path):
            node = Node(key.id, boot, count(Private(), path, _ANEW))
        yield node


def sign(key: Key, inventory: Inventory, challenge: bytes = b"") -> Statement:
    """Sign an inventory that names this node; ValueError for one that names none or another."""
    if inventory.node is None or inventory.node.key != key.id:
        raise ValueError("the inventory does not name the node of this key")
    body = encode(inventory)
    signature = key.sign(_signed(body, challenge))
    return Statement(body.decode(), challenge.hex(), signature.hex())


def _signed(body: bytes, challenge: bytes) -> bytes:
    """Give the bytes that are signed: a purpose, the challenge with its length, the inventory."""
    return SIGNED + len(challenge).to_bytes(4, "little") + challenge + body


def verify(statement: Statement, where: str, challenge: bytes | None = None) -> Inventory:
    """Give the inventory that a node signed, with its ``node``.

    With a ``challenge`` the statement must answer that one. Raises FormatError for what can't be
    read, Refused for what was not signed by the node that it names.
    """
    with _extra():
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric import ed25519
    inventory = decode(statement.body.encode(), where)
    if inventory.node is None:
        raise FormatError(f"{where}: a statement that names no node. What to do: {_AGAIN}")
    answered = bytes.fromhex(statement.challenge)
    if challenge is not None and answered != challenge:
        raise _refused(f"{where}: it answers another challenge than this one", inventory.node)
    public = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(inventory.node.key))
    try:
        public.verify(
            bytes.fromhex(statement.signature), _signed(statement.body.encode(), answered)
        )
    except InvalidSignature as error:
        raise _refused(
            f"{where}: it was not signed by the node that it names", inventory.node
        ) from error
    return inventory


_AGAIN: Final = "ask the node again; if it says so again, look who speaks in its name"


def _refused(what: str, node: Node) -> Refused:
    return Refused(what, verdict=Verdict.FOREIGN, shards=(node.key,), remedy=_AGAIN)


def read_statement(data: bytes, where: str) -> Statement:
    """Read a statement from JSON. Raises FormatError."""
    try:
        return msgspec.json.decode(data, type=Statement)
    except UNREADABLE as error:
        raise FormatError(f"{where}: no statement of a node: {error}. What to do: {_AGAIN}") from (
            error
        )


def clones(seen: Iterable[Sighting]) -> tuple[Clone, ...]:
    """Find the keys that more than one live machine holds, by what was seen of them. Pure.

    Every holder of such a key is to be refused. The order of what was seen makes no difference, and
    neither do repetitions; more sightings never clear a key.
    """
    by_key: dict[str, list[Sighting]] = defaultdict(list)
    for sighting in seen:
        by_key[sighting.node.key].append(sighting)
    found = []
    for key, sightings in sorted(by_key.items()):
        if why := next(_evidence(sightings), ""):
            where = {each.where for each in sightings if each.where}
            found.append(Clone(key, why, tuple(sorted(where))))
    return tuple(found)


def _evidence(sightings: list[Sighting]) -> Iterator[str]:
    """Say what shows that one key has two live holders, the surest first."""
    boots: dict[int, set[str]] = defaultdict(set)
    serials: dict[str, set[str]] = defaultdict(set)
    for each in sightings:
        boots[each.node.counter].add(each.node.boot)
        if each.serial:
            serials[each.node.boot].add(each.serial)
    for number, of in sorted(boots.items()):
        if len(of) > 1:
            yield f"number {number} was used under {len(of)} boot ids: {', '.join(sorted(of))}"
    order = [(number, boot) for number, of in sorted(boots.items()) for boot in sorted(of)]
    left: set[str] = set()
    for (_, before), (number, boot) in pairwise(order):
        if boot != before:
            left.add(before)
        if boot in left:
            yield f"boot {boot} speaks again with number {number}, after another boot"
    for boot, machines in sorted(serials.items()):
        if len(machines) > 1:
            yield f"boot {boot} was seen on the serials {', '.join(sorted(machines))}"
    first_heard = float("inf")  # of any incarnation that is newer than the one looked at
    for number, _ in reversed(order):
        of_this = [each for each in sightings if each.node.counter == number]
        if max(each.asked for each in of_this) > first_heard:
            yield f"number {number} answers a challenge that was put after a later one was heard"
        heard = [each.heard for each in of_this if each.heard]
        first_heard = min([first_heard, *heard])


@contextmanager
def _extra() -> Iterator[None]:
    """Import the extra's modules. Raises HandfastError that says how to get it."""
    try:
        yield
    except ImportError as error:
        raise HandfastError(EXTRA) from error


@contextmanager
def _writing(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"{error.filename or path}: {describe(error)}. What to do: {remedy(error)}"
        raise HandfastError(what) from error


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """Hold a lock file, which stays and says who holds it; the kernel lets go of it at his end."""
    with _writing(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        until = time.monotonic() + WAIT_S
        while not try_lock(fd):
            if time.monotonic() >= until:
                holder = os.pread(fd, 20, 0).decode(errors="replace").strip()
                raise Blocked(
                    f"{path}: another process is this node. What to do: ask it (`handfast fleet "
                    "ask --challenge HEX --json`), or end it",
                    by=[f"process {holder}"] if holder.isdecimal() else [],
                )
            time.sleep(PAUSE_S)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)
