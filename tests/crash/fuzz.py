"""Every decoder of what lies on a disk or comes over a wire, fed with bytes that nobody wrote.

Each target says what may escape it; all else is a fault of ours. Those that a digest guards are
fed twice: as the bytes are, and under a right digest, or nothing would get past it.

`fuzzer.py` lets atheris choose the bytes, guided by coverage.
"""

from __future__ import annotations

import contextlib
import os
import random
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

import msgspec
import xxhash
from fuzz_fleet import FLEET

from handfast.agent import frames
from handfast.agent.hearsay import Hearsay, Word
from handfast.agent.speech import CODECS, SPOKEN, Said
from handfast.checkpoint import rounds
from handfast.checkpoint.outline import outline
from handfast.core import messages
from handfast.core.lattice import Epoch
from handfast.core.membership import Configuration, Domain, RoundRecord
from handfast.core.state import Member
from handfast.core.verdict import Verdict
from handfast.errors import Damaged, FormatError, Refused
from handfast.link.end import End, read_word
from handfast.link.frame import Kind, LinkError, cut
from handfast.link.life import Node
from handfast.link.records import Records
from handfast.link.session import Offered, Persist, Send, Session
from handfast.link.switch import begin, says
from handfast.link.trust import Secret
from handfast.store import claims, journal, manifest, objects
from handfast.store.pins import Holder, pins
from handfast.testing.powerloss import Disk
from handfast.testing.samples import picture

DEEP = 3_000
"""Deeper than any parser follows."""


class Target(NamedTuple):
    """A decoder, what it may raise, and bytes that it takes."""

    feed: Callable[[bytes], object]
    may: tuple[type[BaseException], ...]
    samples: tuple[bytes, ...]


def on_disk(path: str, data: bytes) -> Disk:
    """A disk with one file."""
    home = path.rpartition("/")[0]
    disk = Disk(home)
    fd = disk.create(path)
    disk.pwrite(fd, data, 0)
    disk.close(fd)
    return disk


# Journals: raw, and records under right checksums


def read_journal(data: bytes) -> object:
    """A journal that nobody sealed, and one that somebody did."""
    disk = on_disk("/d/journal", data)
    found = journal.scan(disk, "/d/journal")
    return journal.scan(disk, "/d/journal", found.length)


def a_journal(*records: bytes) -> bytes:
    """What a writer leaves."""
    disk = Disk("/d")
    made = journal.Journal.create(disk, "/d/journal")
    for record in records:
        made.append(record)
        made.sync()
    return disk.tree()["/d/journal"]


def read_frames(data: bytes) -> object:
    """Frames whose checksums are right, and whose numbers need not be."""
    head = journal.HEAD.pack(journal.MAGIC, 1, 7)
    seed = zlib.crc32(head)
    whole = head + struct.pack("<I", seed)
    while len(data) > 20:
        body, data = data[:20] + data[20 : 20 + data[16] % 64], data[20 + data[16] % 64 :]
        body = body[:16] + (len(body) - 20).to_bytes(4, "little") + body[20:]
        whole += journal.MARKER + struct.pack("<I", zlib.crc32(body, seed)) + body
    return read_journal(whole + data)


# Manifests


def resealed(body: bytes) -> object:
    """A manifest's body under a right head and digest."""
    head = manifest.MAGIC + manifest.VERSION.to_bytes(4, "little")
    framed = head + len(body).to_bytes(8, "little") + body
    return manifest.decode(framed + manifest.chunk_hash(framed))


def a_manifest() -> bytes:
    """What a writer leaves."""
    layout, image = picture(1, nbytes=300)
    stamp = manifest.Stamp("run", "main", 1, 2, "rank0-00", 0, 2, 1, "c0ffee", Epoch(1, 1))
    return manifest.encode(
        manifest.Manifest(
            stamp=stamp, slots=layout.slots, aliases={"tied": "model/weights"}, objects=b"objects",
            environment={"torch": "2"}, image_bytes=layout.nbytes, chunk_bytes=4096,
            hashes=manifest.hash_chunks(image, 4096), sources=("1/chunks/a", "1/chunks/b"),
            pieces=(manifest.Piece(0, 1, 0, 0), manifest.Piece(1, 1, 1, 0)),
            replicated=("model/bias",), structure="5eed",
            left=manifest.Left(1, {"model/other": bytes(16)}),
            digests=bytes(16 * len(layout.slots)),
        )
    )  # fmt: skip


def of_a_later_format(body: bytes) -> object:
    """A manifest of a format that is none of ours, of which the writer's name is told."""
    head = manifest.MAGIC + (manifest.VERSION + 1).to_bytes(4, "little")
    framed = head + len(body).to_bytes(8, "little") + body
    return manifest.decode(framed + manifest.chunk_hash(framed))


# Identities, pins, rounds


def read_identity(data: bytes) -> object:
    return claims.read_identity(on_disk("/r/domains/rank0/domain.json", data), "/r", "rank0")


def an_identity(inner: bytes) -> bytes:
    """An identity's bytes under their digest."""
    try:
        raw = msgspec.Raw(inner)
        check = xxhash.xxh3_128_hexdigest(inner)
        return msgspec.json.encode(claims.IdentityFile(check, raw))
    except msgspec.MsgspecError:
        return inner


IDENTITY = msgspec.json.encode(claims.Identity(1, "rank0-00", "rank0", "run-1", 0, 0))
HOLDER = msgspec.json.encode(Holder(1, "host", "export", "boot", "pid:[1]", "7"))


SEAL = msgspec.msgpack.encode(claims.Seal("rank0-00", 1, {}))


def read_seal(data: bytes) -> object:
    """The first record of an incarnation's journal."""
    identity = claims.Identity(1, "rank0-00", "rank0", "run-1", 0, 0)
    return claims._seal("/r/journal", data, identity, 1)


def read_pins(data: bytes) -> object:
    return pins(on_disk("/r/domains/rank0/pins/1-1-ab.json", data), "/r", "rank0")


def read_round(data: bytes) -> object:
    return rounds._read(on_disk("/r/round.json", data), "/r/round.json")


# Wires


def end_of(me: str, other: str) -> End:
    """One end of a link between two agents."""
    trust = Secret(b"secret" * 6, me)
    session = Session(trust, Node(me, "boot", 1), SPOKEN, peers=(other,), dialer=me < other)
    return End(session, CODECS)


def begun(end: End) -> bytes:
    """What an end says first, once its life is durable."""
    said = b""
    for effect in end.begin():
        assert isinstance(effect, Persist)
        said += b"".join(e.frame for e in end.persisted(effect.record) if isinstance(e, Send))
    return said


def shake(data: bytes) -> object:
    """An end that somebody speaks to, a few bytes at a time."""
    end, buffer = end_of("a1", "a2"), bytearray()
    begun(end)
    for at in range(0, len(data), 7):
        buffer += data[at : at + 7]
        while (frame := cut(buffer)) is not None:
            end.receive(frame)
            if end.switch is not None:
                raise AssertionError("opened without the secret")
    return end


def offered(inner: bytes) -> object:
    """An offer of any content, rightly signed: by a peer whose program is wrong."""
    end, trust = end_of("a1", "a2"), Secret(b"secret" * 6, "a2")
    begun(end)
    signature = trust.sign(b"handfast.link.offer/1\n" + inner)
    body = msgspec.msgpack.encode([inner, signature])
    return end.session.receive(Kind.OFFER, body)


def an_offer() -> bytes:
    """The offer that such a peer would sign."""
    return msgspec.msgpack.encode(end_of("a2", "a1").session.offer)


A_LINKS_WORD = msgspec.msgpack.encode(says(begin(SPOKEN[0])))


def read_records(data: bytes) -> object:
    """A record of a link, in a journal that is sound."""
    path = f"/dev/shm/handfast-fuzz-{os.getpid()}"
    try:
        held = Records(path)
        held(Offered(Node("b", "boot", 1), SPOKEN[:1]))
        assert held._journal is not None
        held._journal.append(data)
        held._journal.sync()
        held.close()
        Records(path).close()
    finally:
        os.unlink(path)
    return None


A_RECORD = msgspec.msgpack.encode(Offered(Node("a", "boot", 1), SPOKEN))
SAID = tuple(CODECS[each.epoch].encode(Said("d0", b"body")) for each in SPOKEN)


def read_local(data: bytes) -> object:
    """Frames of the local socket; what they carry is made anew where it is an error."""
    incoming = frames.Incoming()
    incoming._buffer += data
    found = list(incoming._messages())
    for message, _ in found:
        if isinstance(message, frames.Failure):
            frames.revive(message)
    return found


RECORDS = tuple(
    messages.encode(record)
    for record in (
        messages.Staged(0, Epoch(1, 2), "0" * 32),
        messages.Skipped(1, Epoch(1, 2), "disk full"),
        messages.Released((Epoch(1, 1),)),
        messages.Converged(messages.Certificate("run", "c", "directory", Epoch(1, 2), "root")),
        messages.Configured(
            Configuration("run", 1, (Domain("d", "directory", 0, "h"),), (("directory", 1),)), True
        ),
    )
)
OBJECTS = tuple(
    objects.encode(value)
    for value in (
        None, {"a": [1, 2.5, "x", b"y", (1,), {2, 3}], 4: 1 << 200}, [complex(1, 2), float("nan")],
    )
)  # fmt: skip
LOCAL = tuple(
    frames.encode(message)
    for message in (
        frames.Call(1, "open", 0, {"a": 1}),
        frames.Reply(1, 0, {"b": [1, "x"]}),
        frames.Push("snapshot", {"c": b"x"}),
        frames.failure(frames.Call(1, "open", 0, {}), Refused("no", verdict=Verdict.TORN)),
    )
)


def hear_word(data: bytes) -> None:
    """What an agent makes of a word."""
    Hearsay(lambda *_: None, lambda: Member("d0", 1)).hear(data, 2)


A_WORD = msgspec.msgpack.encode(Word(Epoch(1, 2), 0, bytes(16), bytes(16)))
JSON = (FormatError, Refused)
TARGETS: dict[str, Target] = {
    "journal": Target(read_journal, (FormatError,), (a_journal(b"seal", b"", b"x" * 90),)),
    "frames": Target(read_frames, (FormatError,), (bytes(200), bytes(range(150)))),
    "manifest": Target(manifest.decode, (FormatError,), (a_manifest(),)),
    "manifest-body": Target(resealed, (FormatError,), (a_manifest()[manifest.HEAD : -16],)),
    "objects": Target(objects.decode, (FormatError,), OBJECTS),
    "outline": Target(outline, (FormatError,), OBJECTS),
    "newer": Target(of_a_later_format, (FormatError,), (a_manifest()[manifest.HEAD : -16],)),
    "records": Target(messages.decode_record, (msgspec.MsgspecError,), RECORDS),
    "messages": Target(messages.decode_message, (msgspec.MsgspecError,), RECORDS),
    "identity": Target(read_identity, JSON, (an_identity(IDENTITY),)),
    "identity-inner": Target(lambda data: read_identity(an_identity(data)), JSON, (IDENTITY,)),
    "seal": Target(read_seal, JSON, (SEAL,)),
    "pins": Target(read_pins, (), (HOLDER,)),
    "round": Target(read_round, (FormatError,), (msgspec.json.encode(RoundRecord("a", 3)),)),
    "link": Target(shake, (LinkError,), (begun(end_of("a2", "a1")),)),
    "link-offer": Target(offered, (LinkError,), (an_offer(),)),
    "link-word": Target(read_word, (LinkError,), (A_LINKS_WORD,)),
    "link-records": Target(read_records, (Damaged,), (A_RECORD,)),
    "said-1": Target(CODECS[SPOKEN[0].epoch].decode, (ValueError,), SAID[:1]),
    "said-2": Target(CODECS[SPOKEN[1].epoch].decode, (ValueError,), SAID[1:]),
    "word": Target(hear_word, (msgspec.MsgspecError,), (A_WORD,)),
    "local": Target(read_local, (FormatError,), LOCAL),
    **{name: Target(*target) for name, target in FLEET.items()},
}


def feed(target: Target, data: bytes) -> None:
    """Decode once; what may escape is swallowed."""
    with contextlib.suppress(*target.may):
        target.feed(data)


def nested(sample: bytes) -> tuple[bytes, ...]:
    """A sample with one value more that nobody asked for, and no parser can follow."""
    boxes = (b"[" * DEEP, b"\x91" * DEEP, b"\x81\xa1a" * DEEP)
    more = bytes([min(255, sample[0] + 1)]) + sample[1:]  # a msgpack array or map of one more
    names = (b"", b"\xa3zzz")
    return (b'{"zzz":' + boxes[0], *(more + name + box for name in names for box in boxes), *boxes)


def mutated(sample: bytes, chance: random.Random) -> bytes:
    """A sample with a few changes: bytes flipped, cut out, doubled, put in, or set to a border; or
    boxes in boxes, thousands deep."""
    data = bytearray(sample)
    for _ in range(chance.randrange(1, 5)):
        at = chance.randrange(len(data) + 1)
        end = min(len(data), at + chance.choice((1, 1, 2, 4, 8, 30)))
        match chance.randrange(6):
            case 0:
                data[at:end] = bytes(byte ^ 1 << chance.randrange(8) for byte in data[at:end])
            case 1:
                del data[at:end]
            case 2:
                data[at:at] = data[at:end]
            case 3:
                data[at:end] = chance.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * (end - at)
            case 4:
                data[at:at] = chance.randbytes(end - at)
            case 5 if not chance.randrange(20):
                data[at:at] = chance.choice((b"[", b'{"a":', b"\x91", b"\x81\xa1a")) * DEEP
    return bytes(data)
