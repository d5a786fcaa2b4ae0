"""Laws of images and manifests: planned alike, read back equal, refused when they lie."""

import contextlib
import string
from typing import Any

import msgspec
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from handfast.core.lattice import Epoch
from handfast.errors import FormatError
from handfast.store.image import BLOCK, DTYPES, TensorSpec, plan, tensor_bytes
from handfast.store.manifest import (
    MAGIC,
    VERSION,
    Manifest,
    Piece,
    Stamp,
    check,
    chunk_hash,
    decode,
    digest,
    encode,
)

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
words = st.text(string.ascii_lowercase, min_size=1, max_size=6)


@st.composite
def tensors(draw: st.DrawFn) -> TensorSpec:
    """A tensor, stored whole or in part."""
    sizes = st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
    dims = draw(st.lists(sizes, max_size=4))  # before, here, behind
    shape = tuple(here for _, here, _ in dims)
    whole = tuple(map(sum, dims))
    offset = tuple(before for before, _, _ in dims)
    stride = tuple(draw(st.integers(0, 2**40)) for _ in dims)
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    return TensorSpec(draw(names), dtype, shape, whole, offset, stride)


layouts = st.lists(tensors(), max_size=8, unique_by=lambda spec: spec.path)
counters = st.integers(0, 2**63)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """A manifest that keeps every rule."""
    layout = plan(draw(layouts))
    chunk = BLOCK * draw(st.integers(1, 3))
    chunks = -(-layout.nbytes // chunk)
    cuts = sorted(draw(st.sets(st.integers(1, chunks), max_size=4)) | {chunks})
    sources = draw(st.lists(words, min_size=1, max_size=len(cuts), unique=True))
    pieces = [
        Piece(first, last - first, at % len(sources), BLOCK * draw(st.integers(0, 2**40)))
        for at, (first, last) in enumerate(zip([0, *cuts], cuts, strict=False))
    ]
    paths = [slot.spec.path for slot in layout.slots]
    generation, step = draw(counters), draw(counters)
    parents = st.builds(Epoch, st.integers(0, generation), st.integers(0, 2**63))
    parent = draw(st.none() | parents.filter(lambda parent: parent < Epoch(generation, step)))
    shards = draw(st.integers(1, 2**63))
    shard = draw(st.integers(0, shards - 1))
    stored = st.sampled_from(paths) if paths else st.nothing()
    return Manifest(
        stamp=Stamp(
            draw(words), draw(names), generation, step, draw(words), shard, shards,
            draw(counters), draw(names), parent,
        ),
        slots=layout.slots,
        aliases=draw(st.dictionaries(names.filter(lambda name: name not in paths), stored)),
        objects=draw(st.binary(max_size=30)),
        environment=draw(st.dictionaries(names, names, max_size=3)),
        image_bytes=layout.nbytes,
        chunk_bytes=chunk,
        hashes=draw(st.binary(min_size=16 * chunks, max_size=16 * chunks)),
        sources=tuple(sources),
        pieces=tuple(pieces),
        replicated=tuple(draw(st.lists(names, max_size=3))),
        structure=draw(words),
    )  # fmt: skip


@given(layouts, st.randoms())
def test_ranks_that_plan_alone_plan_alike(specs: list[TensorSpec], rng: Any) -> None:
    """The layout is a function of the set of tensors; it tiles the file behind the header."""
    layout = plan(specs)
    shuffled = list(specs)
    rng.shuffle(shuffled)
    assert plan(shuffled) == layout
    assert {slot.spec for slot in layout.slots} == set(specs)
    end = len(layout.header)
    for slot in layout.slots:
        assert (slot.start, slot.nbytes) == (end, tensor_bytes(slot.spec))
        assert slot.start % DTYPES[slot.spec.dtype][0] == 0
        end += slot.nbytes
    assert end == layout.nbytes <= layout.padded < layout.nbytes + BLOCK
    assert len(layout.header) % BLOCK == layout.padded % BLOCK == 0


@given(manifests())
def test_manifests_come_back_equal(manifest: Manifest) -> None:
    """And the same manifest has the same bytes, so the same digest."""
    encoded = encode(manifest)
    assert decode(encoded) == manifest
    assert encode(decode(encoded)) == encoded


@given(manifests(), manifests())
def test_different_manifests_have_different_digests(left: Manifest, right: Manifest) -> None:
    """A vote for one is no vote for another."""
    assert (digest(encode(left)) == digest(encode(right))) == (left == right)


@given(manifests(), st.data())
def test_damage_is_always_found(manifest: Manifest, data: st.DataObject) -> None:
    """Any change of any bytes, any cut: an error, never a manifest."""
    encoded = encode(manifest)
    at = data.draw(st.integers(0, len(encoded) - 1))
    length = data.draw(st.integers(0, 4))
    hurt = encoded[:at] + data.draw(st.binary(max_size=4)) + encoded[at + length :]
    assume(hurt != encoded)
    try:
        found = decode(hurt)
    except FormatError:
        return
    raise AssertionError(f"read {found} from damaged bytes")


@st.composite
def covers(draw: st.DrawFn) -> list[Piece]:
    """Pieces that cover some chunks in order, or nearly so."""
    pieces, chunk = [], 0
    slips = st.sampled_from([0] * 12 + [1, -1])
    for count in draw(st.lists(st.integers(1, 3), max_size=4)):
        chunk = max(0, chunk + draw(slips))
        pieces.append(Piece(chunk, count, draw(st.sampled_from([0, 1] * 5 + [2])), BLOCK * count))
        chunk += count
    return pieces


@settings(max_examples=400)
@given(covers(), st.sampled_from([0] * 6 + [1, -1]))
def test_pieces_are_accepted_only_if_they_cover_each_chunk_once(
    pieces: list[Piece], slip: int
) -> None:
    """Held against counting chunk by chunk."""
    counted = [chunk for p in pieces for chunk in range(p.first, p.first + p.count)]
    chunks = max(1, len(counted) + slip)
    header = plan([]).header
    count = (chunks - 1) * BLOCK
    layout = plan([TensorSpec("w", "int8", (count,), (count,), (0,), (1,))])
    manifest = Manifest(
        stamp=Stamp("run", "", 0, 0, "domain", 0, 1, 0, "", None),
        slots=layout.slots,
        aliases={},
        objects=b"",
        environment={},
        image_bytes=len(header) + count,
        chunk_bytes=BLOCK,
        hashes=bytes(16 * chunks),
        sources=("a", "b"),
        pieces=tuple(pieces),
        replicated=(),
        structure="",
    )
    right = counted == list(range(chunks)) and {p.source for p in pieces} == {0, 1}
    try:
        check(manifest)
    except ValueError:
        assert not right
    else:
        assert right


junk = st.recursive(
    st.none() | st.integers(0, 2**64 - 1) | st.text(max_size=3) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=12) | st.dictionaries(st.text(max_size=2), inner),
)


@given(manifests(), junk, st.data())
def test_lies_with_a_right_digest_raise_nothing_but_format_errors(
    manifest: Manifest, lie: Any, data: st.DataObject
) -> None:
    """A field of another shape, or a body of nothing at all."""
    fields = msgspec.to_builtins(manifest, builtin_types=(bytes,))
    fields[data.draw(st.integers(0, len(fields) - 1))] = lie
    for body in (["writer", fields], lie):
        packed = msgspec.msgpack.encode(body)
        framed = MAGIC + VERSION.to_bytes(4, "little") + len(packed).to_bytes(8, "little") + packed
        with contextlib.suppress(FormatError):
            check(decode(framed + chunk_hash(framed)))


@given(st.binary(max_size=100))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    """Bare, and behind the magic."""
    for attempt in (data, MAGIC + data):
        with contextlib.suppress(FormatError):
            decode(attempt)
            raise AssertionError("read a manifest from arbitrary bytes")
