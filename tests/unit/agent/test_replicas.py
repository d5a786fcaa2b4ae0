"""Shows what the first shard's agent makes of the words that it hears."""

from __future__ import annotations

import msgspec
import pytest

from handfast.agent.replicas import EPOCHS, MARK, Divergence, Replicas, Word, is_word, word
from handfast.core.lattice import Epoch
from handfast.core.messages import Knows, Message, encode
from handfast.store.manifest import Left, Manifest, Stamp, tensor_digest
from handfast.testing.samples import picture


def said(step: int, shard: int, values: bytes = b"v", paths: bytes = b"p") -> bytes:
    """A word."""
    return MARK + msgspec.msgpack.encode(Word(Epoch(1, step), shard, paths, values))


def test_groups_are_told_once_all_were_heard_the_largest_first() -> None:
    """Not before: who is late may agree with either."""
    replicas = Replicas()
    assert not replicas.hear(said(1, 2), 4)
    assert not replicas.hear(said(1, 0, b"other"), 4)
    assert not replicas.hear(said(1, 1), 4)
    assert replicas.hear(said(1, 3), 4)
    assert replicas.found == (Divergence(Epoch(1, 1), ((1, 2, 3), (0,))),)


def test_nothing_is_told_where_all_agree_or_take_other_paths_to_be_alike() -> None:
    """Ranks that each store their own of a tensor have said so already."""
    replicas = Replicas()
    assert [replicas.hear(said(1, shard), 2) for shard in (0, 1)] == [False, False]
    replicas.hear(said(2, 0, b"v", b"p"), 2)
    assert not replicas.hear(said(2, 1, b"other", b"fewer"), 2)
    assert replicas.found == ()


def test_words_of_few_epochs_are_kept() -> None:
    """A rank that skips leaves nothing behind for ever; nor do differences pile up."""
    replicas = Replicas()
    for step in range(3 * EPOCHS):
        replicas.hear(said(step, 0), 2)
    assert not replicas.hear(said(0, 1, b"other"), 2)
    for step in range(100, 100 + 3 * EPOCHS):
        replicas.hear(said(step, 0), 2)
        assert replicas.hear(said(step, 1, b"other"), 2)
    assert len(replicas.found) == EPOCHS


def test_a_word_is_no_message_and_no_message_a_word() -> None:
    """They come over the same links; an agent of before refuses a word as unreadable."""
    message = encode(Message(0, 1, 1, "nonce", "c", (), Knows()))
    assert is_word(said(1, 0))
    assert not is_word(message)
    with pytest.raises(msgspec.MsgspecError):
        Replicas().hear(MARK + b"\xff\xff", 2)


def test_a_rank_says_the_same_whether_it_stores_or_leaves_a_tensor() -> None:
    """Ranks of one node leave what they hold alike to its first, and are compared all the same."""
    layout, image = picture(1, nbytes=300)
    digests = [
        tensor_digest(slot.spec, image[slot.start : slot.start + slot.nbytes])
        for slot in layout.slots
    ]
    paths = [slot.spec.path for slot in layout.slots]

    def manifest(shard: int, **fields: object) -> Manifest:
        stamp = Stamp("run", "main", 1, 2, f"d{shard}", shard, 2, 1, "c", None)
        return Manifest(
            stamp=stamp, aliases={}, objects=b"", environment={}, image_bytes=layout.nbytes,
            chunk_bytes=4096, hashes=b"", sources=(), pieces=(), replicated=tuple(paths),
            structure="", **fields,
        )  # fmt: skip

    stores = manifest(0, slots=layout.slots, digests=b"".join(digests))
    leaves = manifest(1, slots=(), left=Left(0, dict(zip(paths, digests, strict=True))))
    one, other = word(stores, paths), word(leaves, paths)
    assert one is not None
    assert other is not None
    replicas = Replicas()
    assert not replicas.hear(one, 2)
    assert not replicas.hear(other, 2)
    assert word(manifest(0, slots=()), ()) is None
