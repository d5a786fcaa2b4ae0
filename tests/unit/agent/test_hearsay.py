"""Shows what the first shard's agent makes of the words that it hears."""

from __future__ import annotations

import msgspec
import pytest
from agentkit import roster
from msgspec.structs import replace

from handfast.agent.hearsay import EPOCHS, Apart, Divergence, Hearsay, Word, word
from handfast.agent.speech import Said
from handfast.core.lattice import Epoch
from handfast.core.messages import Knows, Message, encode
from handfast.core.state import Member
from handfast.store.manifest import Left, Manifest, Source, Stamp, tensor_digest
from handfast.store.provenance import NOTHING, Brought, found
from handfast.testing.samples import picture


def said(
    step: int,
    shard: int,
    values: bytes = b"v",
    paths: bytes = b"p",
    came: Brought = NOTHING,
) -> bytes:
    """A word."""
    return msgspec.msgpack.encode(Word(Epoch(1, step), shard, paths, values, came))


class Lost:
    """A route on which everything is lost."""

    def __init__(self) -> None:
        self.said: list[Said] = []

    def __call__(self, said: Said) -> None:
        self.said.append(said)

    def has_words(self, domain: str) -> bool:
        return True


def nobody() -> Member:
    """A member that knows of nothing."""
    return Member("d0", 1)


def hearing() -> Hearsay:
    """One that only hears."""
    return Hearsay(Lost(), nobody)


def test_groups_are_told_once_all_were_heard_the_largest_first() -> None:
    """Not before: who is late may agree with either."""
    hearsay = hearing()
    assert not hearsay.hear(said(1, 2), 4)
    assert not hearsay.hear(said(1, 0, b"other"), 4)
    assert not hearsay.hear(said(1, 1), 4)
    assert hearsay.hear(said(1, 3), 4)
    assert hearsay.divergent == (Divergence(Epoch(1, 1), ((1, 2, 3), (0,))),)


def test_nothing_is_told_where_all_agree_or_take_other_paths_to_be_alike() -> None:
    """Ranks that each store their own of a tensor have said so already."""
    hearsay = hearing()
    assert [hearsay.hear(said(1, shard), 2) for shard in (0, 1)] == [False, False]
    hearsay.hear(said(2, 0, b"v", b"p"), 2)
    assert not hearsay.hear(said(2, 1, b"other", b"fewer"), 2)
    assert hearsay.divergent == ()


def test_words_of_few_epochs_are_kept() -> None:
    """A rank that skips leaves nothing behind for ever; nor do differences pile up."""
    hearsay = hearing()
    for step in range(3 * EPOCHS):
        hearsay.hear(said(step, 0), 2)
    assert not hearsay.hear(said(0, 1, b"other"), 2)
    for step in range(100, 100 + 3 * EPOCHS):
        hearsay.hear(said(step, 0), 2)
        assert hearsay.hear(said(step, 1, b"other"), 2)
    assert len(hearsay.divergent) == EPOCHS


def test_what_is_no_word_is_refused() -> None:
    """A message of the protocol, say, and bytes."""
    for data in (encode(Message(0, 1, 1, "nonce", "c", (), Knows())), b"\xff\xff"):
        with pytest.raises(msgspec.MsgspecError):
            hearing().hear(data, 2)


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
    hearsay = hearing()
    assert not hearsay.hear(word(stores, paths), 2)
    assert not hearsay.hear(word(leaves, paths), 2)
    for silent in (word(stores, ()), word(manifest(1, slots=()), paths)):
        assert not hearsay.hear(silent, 2)  # nothing is compared


def came(step: int, lineage: str = "main") -> Brought:
    return Brought(lineage, {"model": f"main 1/{step} of run a"})


def test_an_epoch_whose_ranks_have_no_one_history_is_told_until_there_is_one_that_has() -> None:
    """What ranks loaded from different epochs, or go on as; by shard, whoever came first."""
    hearsay = hearing()
    assert not hearsay.hear(said(1, 1, came=came(4)), 2)
    assert not hearsay.hear(said(1, 0, came=came(4)), 2)
    assert hearsay.apart is None
    hearsay.hear(said(2, 1, came=came(2)), 2)
    assert hearsay.hear(said(2, 0, came=came(4)), 2)
    assert hearsay.apart == Apart(Epoch(1, 2), (came(4), came(2)))
    hearsay.hear(said(3, 1, came=came(4, "sft")), 2)
    assert hearsay.hear(said(3, 0, came=came(4)), 2)
    assert hearsay.apart == Apart(Epoch(1, 3), (came(4), came(4, "sft")))
    hearsay.hear(said(4, 1, came=came(4)), 2)
    assert hearsay.hear(said(4, 0, came=came(4)), 2)
    assert hearsay.apart is None


def test_a_word_goes_to_the_first_shard_and_says_what_the_stamp_does() -> None:
    """A job of one rank has nobody to tell."""
    route = Lost()
    hearsay = Hearsay(route, nobody)
    stamp = Stamp(
        "run", "main", 1, 2, "d1", 1, 2, 1, "c", None, came=(Source("model", "a", "main", 1, 4),)
    )
    layout, _ = picture(1, nbytes=300)
    manifest = Manifest(
        stamp=stamp, slots=layout.slots, aliases={}, objects=b"", environment={},
        image_bytes=layout.nbytes, chunk_bytes=4096, hashes=b"", sources=(), pieces=(),
        replicated=(), structure="",
    )  # fmt: skip
    hearsay.say(roster(["d0"]), manifest, ())
    assert route.said == []
    hearsay.say(roster(["d0", "d1"]), manifest, ())
    (said,) = route.said
    assert (said.domain, said.word) == ("d0", True)
    told = msgspec.msgpack.decode(said.body, type=Word)
    assert told.brought == found(stamp)
    assert told == Word(Epoch(1, 2), 1, b"", b"", told.brought)


def test_nobody_waits_for_words_of_an_agent_that_has_none() -> None:
    """One of an earlier build; who is asked what it speaks is the way to it."""

    class Mute(Lost):
        def has_words(self, domain: str) -> bool:
            return domain != "d1"

    silent = Mute()
    among = roster(["d0", "d1"])
    hearsay = Hearsay(silent, lambda: replace(Member("d0", 1), roster=among))
    assert hearsay._mute() == "d1"
    assert Hearsay(Lost(), lambda: replace(Member("d0", 1), roster=among))._mute() == ""
    assert hearing()._mute() == ""
