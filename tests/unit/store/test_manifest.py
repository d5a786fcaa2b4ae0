"""Shows that a manifest is read back as it was written, or refused with the reason."""

import contextlib
import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import xxhash

from handfast.core.lattice import Epoch
from handfast.errors import Damaged, FormatError
from handfast.store import manifest as module
from handfast.store.image import TensorSpec, plan
from handfast.store.manifest import (
    CHUNK,
    MAGIC,
    Fork,
    Left,
    Manifest,
    Piece,
    Source,
    Stamp,
    check,
    chunk_hash,
    decode,
    digest,
    encode,
    hash_chunks,
)

FORKS = (Fork("sft", "run-0", "main", 1, 900, "weights alone"), Fork("dpo", "run-1", "sft", 2, 5))

SPECS = [
    TensorSpec("model/w", "bfloat16", (3, 2000), (6, 2000), (3, 0), (2000, 1)),
    TensorSpec("model/ß", "float64", (), (), (), ()),
    TensorSpec("model/none", "int8", (0, 7), (0, 7), (0, 0), (7, 1)),
]
STAMP = Stamp("run-1", "main", 3, 1200, "rank0-00ff", 1, 4, 2, "c0ffee", Epoch(2, 1100))


def sample(**changes: Any) -> Manifest:
    """A delta's manifest of 5 chunks of one block, in three files; then changed."""
    layout = plan(SPECS)
    fields: dict[str, Any] = {
        "stamp": STAMP,
        "slots": layout.slots,
        "aliases": {"model/head": "model/w"},
        "objects": b"\x92\x01\xc0",
        "environment": {"torch": "2.13.0", "threads": "2"},
        "image_bytes": layout.nbytes,
        "chunk_bytes": 4096,
        "hashes": hash_chunks(layout.header + bytes(layout.nbytes - 4096), 4096),
        "sources": ("2/chunks/3-1200.delta", "1/chunks/2-1100.safetensors"),
        "pieces": (Piece(0, 1, 0, 0), Piece(1, 2, 1, 4096), Piece(3, 1, 0, 4096)),
        "replicated": ("model/w",),
        "structure": "5eed",
    }
    return Manifest(**(fields | changes))


def reframe(body: bytes, version: int = module.VERSION) -> bytes:
    """A frame whose digest is right around any body."""
    head = MAGIC + version.to_bytes(4, "little") + len(body).to_bytes(8, "little")
    return head + body + chunk_hash(head + body)


def forged(manifest: Manifest) -> bytes:
    """Bytes that another program might write: a right digest, unchecked content."""
    return reframe(msgspec.msgpack.encode(("another program", manifest)))


def test_it_comes_back_equal() -> None:
    """Also without tensors, parent, aliases."""
    for manifest in (sample(), sample(stamp=msgspec.structs.replace(STAMP, parent=None))):
        assert decode(encode(manifest)) == manifest
    bare = plan([])
    empty = sample(
        slots=(),
        aliases={},
        image_bytes=bare.nbytes,
        hashes=hash_chunks(bare.header, 4096),
        sources=("1/chunks/a",),
        pieces=(Piece(0, 1, 0, 0),),
    )
    assert decode(encode(empty)) == empty
    assert sample().stamp.epoch == Epoch(3, 1200)


def test_the_digest_covers_every_byte() -> None:
    """A vote speaks of a digest, so two manifests must not share one."""
    encoded = encode(sample())
    assert digest(encoded) == xxhash.xxh3_128(encoded).hexdigest()
    assert len(digest(encoded)) == 32
    assert digest(encoded) != digest(encoded[:-1] + bytes([encoded[-1] ^ 1]))


def test_chunks_are_hashed_one_by_one() -> None:
    """16 bytes a chunk, big-endian as xxhash prints it; the last chunk may be short."""
    data = random.Random(1).randbytes(CHUNK * 2 + 5)
    parts = [data[:CHUNK], data[CHUNK : 2 * CHUNK], data[2 * CHUNK :]]
    expected = b"".join(bytes.fromhex(xxhash.xxh3_128(part).hexdigest()) for part in parts)
    assert hash_chunks(data) == expected
    assert hash_chunks(memoryview(bytearray(data))) == expected
    assert hash_chunks(b"") == b""


def test_any_flipped_byte_is_found() -> None:
    """Each byte of the file, three ways: an error, never another manifest."""
    encoded = encode(sample())
    for at in range(len(encoded)):
        for flip in (0x01, 0x80, 0xFF):
            hurt = bytearray(encoded)
            hurt[at] ^= flip
            with pytest.raises(FormatError, match=r"^here\.manifest: "):
                decode(bytes(hurt), "here.manifest")


def test_any_truncation_and_any_tail_is_found() -> None:
    """Cut at each length; zero length is what a full disk leaves (metaseq#53)."""
    encoded = encode(sample())
    for length in range(len(encoded)):
        says = f"cut at byte {length}, inside the head" if length < 20 else "bytes long where"
        with pytest.raises(Damaged, match=says):
            decode(encoded[:length])
    for tail in (b"\0", encoded):
        with pytest.raises(Damaged, match=f": more than {len(encoded)} bytes long where"):
            decode(encoded + tail)


def test_another_file_is_no_damaged_manifest() -> None:
    """A path that names something else gets that answer, not talk of broken disks."""
    with pytest.raises(FormatError, match=r"x: begins with b'PK.*no handfast manifest") as caught:
        decode(b"PK\3\4 some other file", "x")
    assert not isinstance(caught.value, Damaged)


def test_a_later_format_is_refused_and_names_its_writer() -> None:
    """Whoever meets a newer run is told which handfast to use, whatever the body has become."""
    newer = msgspec.msgpack.encode(["handfast 7.1.0", {"all": "new"}, 3])
    with pytest.raises(FormatError, match=r"format 2, written by handfast 7\.1\.0.*reads format 1"):
        decode(reframe(newer, version=2))
    with pytest.raises(FormatError, match="format 9, written by an unknown program"):
        decode(reframe(b"\xc1", version=9))


def test_fields_that_a_later_release_appends_are_skipped() -> None:
    """Old and new agents stand side by side within one format version."""
    fields = msgspec.to_builtins(sample(), builtin_types=(bytes,))
    fields[0].append("in the stamp")
    fields[1][0][0].append("in a tensor")
    later = ["a later release", [*fields, "in the manifest"], "in the body"]
    assert decode(reframe(msgspec.msgpack.encode(later))) == sample()


def test_a_lineage_comes_back_with_all_that_it_forked_from() -> None:
    """Oldest first, each with the run, the epoch and the reason; under the digest that is voted."""
    stamp = msgspec.structs.replace(STAMP, lineage="dpo", forks=FORKS)
    forked = sample(stamp=stamp)
    assert decode(encode(forked)).stamp.forks == FORKS
    assert decode(encode(forked)) == forked
    plain = sample(stamp=msgspec.structs.replace(STAMP, lineage="dpo"))
    assert digest(encode(forked)) != digest(encode(plain))


def test_what_was_loaded_comes_back_and_is_under_the_digest() -> None:
    """Else a mixture of ranks could not be told from a training."""
    came = tuple(Source(path, "run-0", "main", 1, 1200) for path in ("model", "optimizer"))
    loaded = sample(stamp=msgspec.structs.replace(STAMP, came=came))
    assert decode(encode(loaded)).stamp.came == came
    assert digest(encode(loaded)) != digest(encode(sample()))


@pytest.mark.parametrize("fields", [10, 11, 12])
def test_a_stamp_of_an_earlier_release_has_no_forks(fields: int) -> None:
    """It had ten fields, then eleven, and says what it always said."""
    body = msgspec.to_builtins(sample(), builtin_types=(bytes,))
    assert len(body[0]) == 12
    body[0] = body[0][:fields]
    assert decode(reframe(msgspec.msgpack.encode(["an earlier release", body]))) == sample()


def test_fields_that_a_later_release_appends_to_a_fork_are_skipped() -> None:
    stamp = msgspec.structs.replace(STAMP, lineage="dpo", forks=FORKS)
    body = msgspec.to_builtins(sample(stamp=stamp), builtin_types=(bytes,))
    body[0][10][0].append("more")
    later = ["a later release", body]
    assert decode(reframe(msgspec.msgpack.encode(later))).stamp.forks == FORKS


def broken_slot(**changes: Any) -> tuple[Any, ...]:
    """The sample's slots, the first one changed."""
    first, *rest = sample().slots
    return (msgspec.structs.replace(first, **changes), *rest)


def broken_spec(at: int, **changes: Any) -> tuple[Any, ...]:
    """The sample's slots, the tensor of one changed."""
    slots = list(sample().slots)
    spec = msgspec.structs.replace(slots[at].spec, **changes)
    slots[at] = msgspec.structs.replace(slots[at], spec=spec)
    return tuple(slots)


def stamped(**changes: Any) -> Stamp:
    """The sample's stamp, changed."""
    return msgspec.structs.replace(STAMP, **changes)


BROKEN: list[tuple[str, Callable[[], Manifest], str]] = [
    ("shard", lambda: sample(stamp=stamped(shard=4)), "shard 4 of 4"),
    ("own parent", lambda: sample(stamp=stamped(parent=Epoch(3, 1200))), "not older"),
    ("later parent", lambda: sample(stamp=stamped(parent=Epoch(4, 1))), "not older"),
    ("fork", lambda: sample(stamp=stamped(forks=FORKS)), "the last fork began another"),
    ("no fork", lambda: sample(stamp=stamped(lineage="sft", forks=FORKS)), "began another"),
    ("gap", lambda: sample(slots=broken_slot(nbytes=16)), "16 bytes for"),
    ("start", lambda: sample(slots=broken_slot(start=8192)), "starts at byte"),
    ("unaligned", lambda: sample(slots=broken_slot(start=4097)), "ends no block"),
    ("in the header", lambda: sample(slots=broken_slot(start=0)), "ends no block"),
    ("overlap", lambda: sample(slots=(*sample().slots[:2], sample().slots[1])), "two slots"),
    ("missing", lambda: sample(slots=sample().slots[:1]), "slots end at byte 4104"),
    ("no slot", lambda: sample(slots=()), "ends no block"),
    ("dtype", lambda: sample(slots=broken_spec(1, dtype="float3")), "dtype 'float3' is unknown"),
    ("path", lambda: sample(slots=broken_spec(0, path="")), "choose another name"),
    ("outside", lambda: sample(slots=broken_spec(1, offset=(4, 0))), "outside of"),
    ("alias stored", lambda: sample(aliases={"model/w": "model/ß"}), "stored itself"),
    ("alias chain", lambda: sample(aliases={"a": "b", "b": "model/w"}), "an alias too"),
    ("absolute", lambda: sample(sources=("/etc/passwd", "x")), "no plain path"),
    ("escape", lambda: sample(sources=("1/../../../etc/passwd", "x")), "no plain path"),
    ("dot", lambda: sample(sources=("./a", "x")), "no plain path"),
    ("slash", lambda: sample(sources=("a//b", "x")), "no plain path"),
    ("nul", lambda: sample(sources=("a\0b", "x")), "no plain path"),
    ("twice", lambda: sample(sources=("x", "x")), "named twice"),
    ("unused", lambda: sample(sources=("a", "b", "c")), "no piece lies in"),
    ("unlisted", lambda: sample(sources=("a",)), "source 1 is not listed"),
    ("chunk", lambda: sample(chunk_bytes=4095), "no whole blocks"),
    ("hashes", lambda: sample(hashes=bytes(65)), "65 bytes of hashes for 4 chunks"),
    ("few", lambda: sample(pieces=sample().pieces[:2]), "cover 3 of 4"),
    ("many", lambda: sample(pieces=(*sample().pieces, Piece(4, 1, 0, 0))), "cover 5 of 4"),
    ("order", lambda: sample(pieces=sample().pieces[::-1]), "begins at chunk 3, expected 0"),
    ("again", lambda: sample(pieces=(Piece(0, 1, 0, 0), *sample().pieces)), "begins at chunk 0"),
    ("at", lambda: sample(pieces=(Piece(0, 4, 0, 5),)), "begins no block"),
    ("left to itself", lambda: sample(left=Left(1, {"a": bytes(16)})), "1 of 4 leaves to shard 1"),
    ("left outside", lambda: sample(left=Left(4, {"a": bytes(16)})), "leaves to shard 4"),
    ("left and stored", lambda: sample(left=Left(2, {"model/w": bytes(16)})), "stored itself"),
    ("left unsaid", lambda: sample(left=Left(2, {"a": b"1"})), "a digest of 1 bytes"),
    ("digests", lambda: sample(digests=bytes(17)), "17 bytes of digests for"),
]


@pytest.mark.parametrize(
    ("build", "says"), [case[1:] for case in BROKEN], ids=[c[0] for c in BROKEN]
)
def test_a_broken_rule_is_refused_by_writer_and_reader(
    build: Callable[[], Manifest], says: str
) -> None:
    """The writer gets a ValueError; a reader of another program's bytes a FormatError."""
    manifest = build()
    with pytest.raises(ValueError, match=says):
        encode(manifest)
    with pytest.raises(FormatError, match=says):
        decode(forged(manifest))


@pytest.mark.parametrize(
    "build",
    [
        lambda: sample(stamp=stamped(run="")),
        lambda: sample(stamp=stamped(step=-1)),
        lambda: sample(stamp=stamped(incarnation=-1)),
        lambda: sample(stamp=stamped(shards=0)),
        lambda: sample(stamp=stamped(lineage="", forks=(Fork("", "run", "main", 1, 1),))),
        lambda: sample(stamp=stamped(lineage="x", forks=(Fork("x", "", "main", 1, 1),))),
        lambda: sample(stamp=stamped(lineage="x", forks=(Fork("x", "run", "main", 1, -1),))),
        lambda: sample(image_bytes=0),
        lambda: sample(pieces=(Piece(0, 0, 0, 0),)),
        lambda: sample(pieces=(Piece(0, 1, -1, 0),)),
        lambda: sample(sources=("",)),
        lambda: sample(structure=5),
        lambda: sample(slots=broken_spec(0, shape=(-1,))),
    ],
)
def test_values_out_of_their_range_are_refused_by_writer_and_reader(
    build: Callable[[], Manifest],
) -> None:
    """A writer that let them pass would save what nobody can read."""
    with pytest.raises(ValueError, match=r"Expected|shard 1|one length|cover|end|no plain"):
        encode(build())
    with pytest.raises(FormatError, match="breaks its own rules"):
        decode(forged(build()))


def test_a_manifest_that_would_come_back_different_is_not_written() -> None:
    """Lists in place of tuples would make equal manifests unequal after a restart."""
    with pytest.raises(ValueError, match="would not be read back equal"):
        encode(sample(replicated=["model/w"]))


def test_huge_numbers_do_not_hang_the_reader() -> None:
    """Shapes whose product has thousands of digits, lengths beyond the file: refused at once."""
    big = 2**64 - 1
    for slots in (
        broken_spec(0, shape=(big,) * 64, global_shape=(big,) * 64),
        broken_spec(0, shape=(big,) * 100_000),
    ):
        with pytest.raises(FormatError):
            decode(forged(sample(slots=slots)))
    with pytest.raises(FormatError):
        decode(forged(sample(image_bytes=big)))
    for body in (b"\xdd\xff\xff\xff\xff", b"\x91" * 100_000, b"\xc6\xff\xff\xff\xff", b""):
        with pytest.raises(FormatError):
            decode(reframe(body))


def test_random_bodies_raise_nothing_but_format_errors() -> None:
    """The digest stops accidents; whoever computes a right one must not get further than this."""
    rng = random.Random(7)
    body = msgspec.msgpack.encode(("writer", sample()))
    for _ in range(3000):
        hurt = bytearray(body)
        for _ in range(rng.choice([1, 1, 2, 5])):
            hurt[rng.randrange(len(hurt))] = rng.randrange(256)
        with contextlib.suppress(FormatError):
            check(decode(reframe(bytes(hurt))))


@pytest.mark.timeout(60)  # it takes 2 seconds; quadratic work would take hours
def test_a_hundred_thousand_tensors_and_chunks_are_no_trouble() -> None:
    """Sizes that a large optimizer state has."""
    count = 100_000
    specs = [
        TensorSpec(f"model/layers.{at}.weight", "float32", (1024,), (1024,), (0,), (1,))
        for at in range(count)
    ]
    layout = plan(specs)
    chunks = -(-layout.nbytes // 4096)
    manifest = sample(
        slots=layout.slots,
        aliases={f"tied.{at}": f"model/layers.{at}.weight" for at in range(count)},
        image_bytes=layout.nbytes,
        hashes=bytes(16 * chunks),
        sources=tuple(f"{at}/chunks/x" for at in range(count)),
        pieces=tuple(Piece(at, 1, at % count, 4096 * at) for at in range(chunks)),
    )
    assert chunks > count
    assert decode(encode(manifest)) == manifest
