"""Show that facts survive the journal and the wire as they are, and that garbage is refused."""

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from handfast.core import messages
from handfast.core.lattice import Epoch
from handfast.core.membership import Configuration, Domain
from handfast.core.messages import decode_message, decode_record, encode, merkle_root

number, word, mask = st.integers(0, 2**40), st.text(max_size=4), st.binary(max_size=20)
epoch = st.builds(Epoch, number, number)


def some(of):
    return st.lists(of, max_size=2).map(tuple)


def value(kind, *fields):
    return st.builds(kind, *fields)


domain = value(Domain, word, word, number, word)
configuration = value(
    Configuration, word, number, some(domain), some(st.tuples(word, number)), st.integers(0, 4)
)
certificate = value(messages.Certificate, word, word, word, epoch, word)
branch = value(messages.Branch, number, epoch, word)
restore = value(
    messages.RestoreCertificate, word, word, number, word, epoch, some(branch), some(number), word
)
report = value(
    messages.Report,
    some(value(messages.Copy, epoch, word)),
    some(value(messages.Lost, epoch, word)),
    st.none() | restore,
    some(certificate),
)
shared = (
    value(messages.Frozen, number, number, number, word, word, report, st.none() | number)
    | value(messages.Staged, number, epoch, word)
    | value(messages.Skipped, number, epoch, word)
    | value(messages.Valid, number, number, epoch)
    | value(messages.Bad, number, number, epoch, word)
    | value(messages.Accepted, number, number, epoch, number)
    | value(messages.Restored, restore)
    | value(messages.Converged, certificate)
)
records = (
    shared
    | value(messages.Configured, configuration, st.booleans())
    | value(messages.Released, some(epoch))
)
knows = value(
    messages.Knows, mask, some(st.tuples(epoch, mask)), mask, mask, st.booleans(),
    some(st.none() | epoch), some(st.tuples(number, epoch, mask)),
    some(st.tuples(number, epoch, some(number))),
)  # fmt: skip
facts = shared | value(messages.Declined, number, number, epoch, word)
sent = value(
    messages.Message, number, number, number, word, word, some(facts), knows, st.booleans(),
    some(value(messages.Rolled, number, number, epoch, mask)),
)  # fmt: skip


class EarlierKnows(msgspec.Struct, array_like=True):
    """What releases before the tree read of `Knows`."""

    frozen: bytes
    checks: tuple[tuple[Epoch, bytes], ...]
    accepted: bytes
    declined: bytes
    restored: bool
    lines: tuple[Epoch | None, ...]
    votes: tuple[tuple[int, Epoch, bytes], ...]


class EarlierMessage(msgspec.Struct, array_like=True):
    """What releases before the tree read of `Message`."""

    sender: int
    incarnation: int
    generation: int
    round: str
    configuration: str
    facts: tuple[messages.Fact, ...]
    knows: EarlierKnows
    hello: bool


@given(records)
def test_a_record_is_read_as_it_was_written(record):
    assert decode_record(encode(record)) == record


@given(sent)
def test_a_message_is_read_as_it_was_sent(message):
    assert decode_message(encode(message)) == message


@given(sent)
def test_an_agent_of_an_earlier_release_reads_all_but_the_rolls(message):
    """Shows that fields were added at the end, so that it can skip them, and ours may be absent."""
    read = msgspec.msgpack.decode(encode(message), type=EarlierMessage)
    assert (read.sender, read.facts, read.hello) == (message.sender, message.facts, message.hello)
    assert read.knows.votes == message.knows.votes
    without = msgspec.structs.replace(
        message, rolled=(), knows=msgspec.structs.replace(message.knows, spans=())
    )
    assert decode_message(msgspec.msgpack.encode(read)) == without


@given(configuration, st.booleans())
def test_a_fanout_that_is_left_open_is_not_written(of, founding):
    """Shows that a record has the bytes that it had before there was a tree."""
    written = msgspec.msgpack.decode(encode(messages.Configured(of, founding)))
    assert written[0] == "configured"
    assert len(written[1]) == (5 if of.fanout else 4)


@given(st.binary(max_size=60))
@example(b"\x91\xa3\x00\x00\x80")  # a text that is not UTF-8
def test_garbage_is_refused_and_nothing_else(data):
    for decode in (decode_record, decode_message):
        try:
            value = decode(data)
        except msgspec.MsgspecError:
            continue
        assert decode(encode(value)) == value


@given(records, st.data())
def test_a_record_cut_short_is_refused(record, data):
    whole = encode(record)
    with pytest.raises(msgspec.MsgspecError):
        decode_record(whole[: data.draw(st.integers(0, len(whole) - 1))])


def test_a_field_added_by_a_later_version_is_passed_over():
    """Shows that an old agent can read the records of a newer one that only adds fields."""
    staged = messages.Staged(1, Epoch(1, 10), "digest")
    newer = msgspec.msgpack.encode([*msgspec.msgpack.decode(encode(staged)), "new"])
    assert decode_record(newer) == staged


def test_a_branch_of_an_older_version_is_of_a_round_that_is_not_known():
    """Shows that a journal written before rounds were kept is read as it is."""
    branch = messages.Branch(2, Epoch(1, 10), "round")
    certificate = messages.RestoreCertificate(
        "run", "c", 2, "round", branch.base, (branch,), (0,), "root"
    )
    plain = msgspec.msgpack.decode(encode(messages.Restored(certificate)))
    assert plain[1][5][0].pop() == "round"
    read = decode_record(msgspec.msgpack.encode(plain))
    assert read.certificate.timeline == (messages.Branch(2, branch.base),)


def test_a_root_depends_on_every_leaf_and_on_their_order():
    leaves = ["a=1", "b=2", "c=3"]
    roots = [
        merkle_root([]),
        merkle_root(["a=1"]),
        merkle_root(leaves),
        merkle_root(leaves[::-1]),
        merkle_root([*leaves, "c=3"]),
        merkle_root(["a=1", "b=2", "c=4"]),
    ]
    assert len(set(roots)) == len(roots)
    assert all(len(root) == 32 for root in roots)
    assert merkle_root([]) == "0" * 32


@given(st.lists(st.text(max_size=4), max_size=9), st.lists(st.text(max_size=4), max_size=9))
def test_two_lists_share_a_root_only_if_they_are_the_same(a, b):
    assert (merkle_root(a) == merkle_root(b)) == (a == b)
