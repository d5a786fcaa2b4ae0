"""Shows that bytes between agents are believed only from a holder of the run's secret, in order.

Every test runs real `Wire` ends against each other, or against an attacker who owns the network:
it reads, cuts, changes, repeats and makes up bytes, but does not hold the secret.
"""

import contextlib
import struct
import tracemalloc
from collections.abc import Container

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from handfast.agent.wire import (
    HANDSHAKE_LIMIT,
    MAX_PAYLOAD,
    Reason,
    Wire,
    WireError,
    agree,
)

SECRET = b"the secret of one run, 32 bytes."
HEADER = struct.Struct(">IHBQ")


def dialer(
    *,
    secret: bytes = SECRET,
    run: str = "run",
    me: str = "a",
    expect: Container[str] = ("b",),
    versions: tuple[int, int] = (1, 1),
) -> Wire:
    return Wire(secret=secret, run=run, me=me, expect=expect, dialer=True, versions=versions)


def listener(
    *,
    secret: bytes = SECRET,
    run: str = "run",
    me: str = "b",
    expect: Container[str] = ("a",),
    versions: tuple[int, int] = (1, 1),
) -> Wire:
    return Wire(secret=secret, run=run, me=me, expect=expect, dialer=False, versions=versions)


def drain(wire: Wire) -> list[bytes]:
    taken = []
    while (payload := wire.take()) is not None:
        taken.append(payload)
    return taken


def shake(one: Wire, other: Wire) -> None:
    """Carry handshake bytes both ways until both ends are silent; errors of either end escape."""
    while True:
        there, back = one.outgoing(), other.outgoing()
        if not there and not back:
            return
        other.feed(there)
        one.feed(back)
        one.shake()
        other.shake()


def pair(**both: object) -> tuple[Wire, Wire]:
    one, other = dialer(**both), listener(**both)
    shake(one, other)
    return one, other


def reason_of(wire: Wire, data: bytes) -> Reason | None:
    """Why ``wire`` refuses ``data``, or None if it does not."""
    wire.feed(data)
    try:
        if wire.shake():
            drain(wire)
    except WireError as error:
        return error.reason
    return None


def test_two_holders_of_the_secret_meet_and_talk_in_both_directions() -> None:
    one, other = pair()
    assert (one.open, one.peer, one.version) == (True, "b", 1)
    assert (other.open, other.peer, other.version) == (True, "a", 1)
    other.feed(one.message(b"x") + one.beat() + one.message(b"") + one.message(b"z"))
    one.feed(other.message(b"back"))
    assert drain(other) == [b"x", b"", b"z"]
    assert drain(one) == [b"back"]


def sizes_strategy() -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1, 200), min_size=1, max_size=50)


@given(st.lists(st.binary(max_size=300), max_size=8), sizes_strategy(), sizes_strategy())
def test_however_the_stream_is_cut_the_same_messages_come_out(
    payloads: list[bytes], there: list[int], back: list[int]
) -> None:
    one, other = dialer(), listener()
    greeting = other.outgoing()
    out = bytearray(one.outgoing())
    for piece in cut(greeting, back):
        one.feed(piece)
        one.shake()
    out += one.outgoing()
    got: list[bytes] = []
    for piece in cut(bytes(out), there):
        other.feed(piece)
        other.shake()
    one.feed(other.outgoing())
    assert one.shake()
    stream = b"".join(one.message(payload) + one.beat() for payload in payloads)
    for piece in cut(stream, there):
        other.feed(piece)
        got += drain(other)
    assert got == payloads


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    pieces, at, turn = [], 0, 0
    while at < len(data):
        size = sizes[turn % len(sizes)]
        pieces.append(data[at : at + size])
        at, turn = at + size, turn + 1
    return pieces


def test_the_first_messages_may_arrive_glued_to_the_handshake() -> None:
    one, other = dialer(), listener()
    other.feed(one.outgoing())
    other.shake()
    one.feed(other.outgoing())
    assert one.shake()
    other.feed(one.outgoing() + one.message(b"early"))
    assert other.shake()
    assert drain(other) == [b"early"]


# -- refusals, each with its reason ------------------------------------------------------------


@pytest.mark.parametrize("end", ["dialer", "listener"])
def test_a_wrong_secret_is_refused_by_both_ends(end: str) -> None:
    wrong = b"another secret of thirty-two byte"
    one = dialer(secret=wrong if end == "dialer" else SECRET)
    other = listener(secret=wrong if end == "listener" else SECRET)
    first, second = one.outgoing(), other.outgoing()
    assert reason_of(one, second) is None
    assert reason_of(other, first) is None
    first, second = one.outgoing(), other.outgoing()
    assert reason_of(one, second) == Reason.WRONG_SECRET
    assert reason_of(other, first) == Reason.WRONG_SECRET
    assert not one.open
    assert not other.open


def test_an_agent_of_another_run_is_refused_lm_resiliency_77() -> None:
    one, other = dialer(run="gpt-7"), listener()
    assert reason_of(other, one.outgoing()) == Reason.WRONG_RUN
    with pytest.raises(WireError, match="run 'gpt-7'; this one is of run"):
        other.shake()


@pytest.mark.parametrize("expect", [(), ("c",), {"ab"}])
def test_an_id_that_is_not_expected_is_refused_before_anything_is_proved(
    expect: Container[str],
) -> None:
    other = listener(expect=expect)
    other.outgoing()
    assert reason_of(other, dialer().outgoing()) == Reason.WRONG_PEER
    assert other.outgoing() == b""


def test_an_agent_that_reaches_itself_is_refused() -> None:
    me = dialer(me="a", expect=("b",))
    assert reason_of(me, listener(me="a").outgoing()) == Reason.WRONG_PEER


def test_what_i_said_played_back_to_me_proves_nothing() -> None:
    """An attacker that reflects every byte must not pass, even where the id would fit."""
    me = dialer(me="a", expect=("a",))
    for _ in range(3):
        refused = reason_of(me, me.outgoing())
        if refused:
            break
    assert refused == Reason.WRONG_SECRET
    assert not me.open


def test_a_recorded_handshake_opens_no_second_connection() -> None:
    one, other = dialer(), listener()
    recorded = bytearray(one.outgoing())
    one.feed(other.outgoing())
    one.shake()
    recorded += one.outgoing()
    fresh = listener()
    assert reason_of(fresh, bytes(recorded)) == Reason.WRONG_SECRET


def test_a_frame_of_another_connection_is_refused() -> None:
    one, _ = pair()
    _, other = pair()
    assert reason_of(other, one.message(b"x")) == Reason.BAD_MAC


def test_my_own_frame_played_back_to_me_is_refused() -> None:
    one, _ = pair()
    assert reason_of(one, one.message(b"x")) == Reason.BAD_MAC


@pytest.mark.parametrize(("order", "taken"), [((0, 0), 1), ((1, 0), 0), ((0, 2), 1), ((1, 1), 0)])
def test_a_repeated_lost_or_reordered_frame_is_refused(order: tuple[int, ...], taken: int) -> None:
    one, other = pair()
    frames = [one.message(b"%d" % index) for index in range(3)]
    other.feed(b"".join(frames[index] for index in order))
    got = [other.take() for _ in range(taken)]
    assert got == [b"0"][:taken]
    with pytest.raises(WireError) as error:
        other.take()
    assert error.value.reason == Reason.REPLAYED


def test_every_changed_byte_of_a_frame_is_found() -> None:
    """No single byte of header, payload or MAC can be changed and still be taken."""
    size = len(pair()[0].message(b"payload"))
    for at in range(size):
        one, other = pair()
        frame = bytearray(one.message(b"payload"))
        frame[at] ^= 0x01
        other.feed(bytes(frame))
        try:
            assert other.take() is None  # only a longer length may still be waited for
            assert at < 4
        except WireError as error:
            expected = (Reason.BAD_MAC, Reason.TOO_LARGE)
            assert error.reason in expected  # noqa: PT017 - it may also not raise


def test_a_length_above_the_bound_is_refused_from_its_header_alone() -> None:
    _, other = pair()
    assert reason_of(other, HEADER.pack(MAX_PAYLOAD + 17, 1, 3, 0)) == Reason.TOO_LARGE
    fresh = listener()
    assert reason_of(fresh, HEADER.pack(HANDSHAKE_LIMIT + 1, 0, 1, 0)) == Reason.TOO_LARGE


def test_a_stranger_can_make_us_hold_a_few_kilobytes_at_most() -> None:
    """Before the proof no length makes us allocate, and what we keep is bounded."""
    tracemalloc.start()
    try:
        fresh = listener()
        before = tracemalloc.get_traced_memory()[0]
        fresh.feed(HEADER.pack(HANDSHAKE_LIMIT, 0, 1, 0) + bytes(HANDSHAKE_LIMIT - 1))
        fresh.shake()
        assert tracemalloc.get_traced_memory()[1] - before < 8 * HANDSHAKE_LIMIT
        assert reason_of(fresh, bytes(1)) == Reason.MALFORMED
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(1000):
            fresh.feed(bytes(4096))
        assert tracemalloc.get_traced_memory()[1] - before < 16384
    finally:
        tracemalloc.stop()


def test_the_largest_message_passes_and_one_byte_more_is_the_callers_error() -> None:
    one, other = pair()
    other.feed(one.message(bytes(MAX_PAYLOAD)))
    taken = other.take()
    assert taken is not None
    assert len(taken) == MAX_PAYLOAD
    with pytest.raises(ValueError, match="at most"):
        one.message(bytes(MAX_PAYLOAD + 1))


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 a TLS client hello",
        HEADER.pack(0, 0, 1, 0),
        HEADER.pack(3, 0, 1, 0) + b"\xc1\xc1\xc1",
        HEADER.pack(4002, 0, 1, 0) + b"\x82\xa1x" + b"\x91" * 3997 + b"\xc0\xa1",
        HEADER.pack(20, 0, 1, 0) + b"\x84\xa5agent\xa2\xff\xfe" + bytes(10),
        HEADER.pack(32, 0, 2, 0) + bytes(32),  # a proof before any hello
        HEADER.pack(0, 0, 3, 0),  # a message before the proof
    ],
)
def test_garbage_is_refused_as_malformed(data: bytes) -> None:
    assert reason_of(listener(), data) == Reason.MALFORMED


def hello(**changed: object) -> bytes:
    fields = {"versions": (1, 1), "nonce": bytes(32), "agent": "a", "run": "run"}
    body = msgspec.msgpack.encode(fields | changed)
    return HEADER.pack(len(body), 0, 1, 0) + body


@pytest.mark.parametrize(
    "changed",
    [
        {"nonce": b""},
        {"nonce": bytes(33)},
        {"versions": (0, 1)},
        {"versions": (2, 1)},
        {"versions": (1, 1 << 40)},
        {"versions": (1,)},
        {"agent": 7},
        {"run": None},
    ],
)
def test_a_hello_with_an_unsound_field_is_malformed(changed: dict[str, object]) -> None:
    assert reason_of(listener(), hello(**changed)) == Reason.MALFORMED


def test_a_second_hello_is_malformed() -> None:
    assert reason_of(listener(), hello() + hello()) == Reason.MALFORMED


def test_an_unknown_kind_or_another_version_inside_a_sound_frame_is_refused() -> None:
    """Not even a holder of the secret may send what the agreed version does not have."""
    for kind, version, reason in [(9, 1, Reason.MALFORMED), (3, 2, Reason.VERSION)]:
        one, other = pair()
        header = HEADER.pack(1 + 16, version, kind, 0)
        frame = header + b"x" + one._mac(b"D", header, b"x")
        assert reason_of(other, frame) == reason


def test_a_secret_that_is_no_secret_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="at least 16 bytes"):
        dialer(secret=b"short")


def test_ids_that_no_handshake_can_carry_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="too long"):
        dialer(run="r" * 5000)


def test_messages_before_the_handshake_are_a_mistake_of_the_caller() -> None:
    fresh = dialer()
    for attempt in (fresh.take, fresh.beat):
        with pytest.raises(RuntimeError, match="handshake"):
            attempt()


# -- versions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mine", "theirs", "common"),
    [
        ((1, 1), (1, 1), 1),
        ((1, 1), (1, 2), 1),
        ((1, 3), (2, 5), 3),
        ((1, 2), (3, 4), None),
        ((3, 4), (1, 2), None),
    ],
)
def test_the_highest_common_version_is_used(
    mine: tuple[int, int], theirs: tuple[int, int], common: int | None
) -> None:
    assert agree(mine, theirs) == common


def test_an_old_and_a_new_agent_talk_side_by_side() -> None:
    for old, new, version in [((1, 1), (1, 2), 1), ((1, 2), (1, 2), 2), ((1, 2), (2, 3), 2)]:
        one, other = dialer(versions=old), listener(versions=new)
        shake(one, other)
        assert one.version == other.version == version
        other.feed(one.message(b"x"))
        assert drain(other) == [b"x"]


def test_agents_without_a_common_version_say_which_is_needed() -> None:
    one, other = dialer(versions=(1, 1)), listener(versions=(2, 3))
    first, second = one.outgoing(), other.outgoing()
    assert reason_of(one, second) == Reason.VERSION
    assert reason_of(other, first) == Reason.VERSION
    with pytest.raises(WireError, match=r"agent a speaks wire versions 1\.\.1, this one 2\.\.3"):
        other.shake()


def test_a_hello_of_a_later_handfast_may_hold_more_than_we_know() -> None:
    wire = listener()
    assert reason_of(wire, hello(versions=(1, 9), compression=["zstd"])) is None
    assert wire.version == 1


def test_nobody_in_between_can_talk_both_down_to_an_older_version() -> None:
    """The range of versions stands under the proof, so narrowing it is found by both ends."""
    one, other = dialer(versions=(1, 2)), listener(versions=(1, 2))

    def narrowed(frame: bytes) -> bytes:
        body = msgspec.msgpack.decode(frame[HEADER.size :])
        body["versions"] = (1, 1)
        changed = msgspec.msgpack.encode(body)
        return HEADER.pack(len(changed), 0, 1, 0) + changed

    first, second = one.outgoing(), other.outgoing()
    assert reason_of(one, narrowed(second)) is None
    assert reason_of(other, narrowed(first)) is None
    assert one.version == other.version == 1
    first, second = one.outgoing(), other.outgoing()
    assert reason_of(one, second) == Reason.WRONG_SECRET
    assert reason_of(other, first) == Reason.WRONG_SECRET


# -- fuzzing -----------------------------------------------------------------------------------


@given(st.binary(max_size=6000), sizes_strategy())
@example(bytes(16), [1])
def test_made_up_bytes_open_nothing_and_raise_nothing_else(data: bytes, sizes: list[int]) -> None:
    fresh = listener()
    for piece in cut(data, sizes):
        if reason_of(fresh, piece) is not None:
            break
    assert not fresh.open


@settings(max_examples=300)
@given(st.data())
def test_a_changed_stream_gives_a_prefix_of_what_was_sent_or_nothing(data: st.DataObject) -> None:
    """Cut, repeat, swap or overwrite anything after the handshake: no wrong message comes out."""
    one, other = pair()
    sent = [b"m%d" % index * 5 for index in range(5)]
    stream = bytearray(b"".join(one.message(payload) for payload in sent))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(stream)))
        end = data.draw(st.integers(at, len(stream)))
        stream[at:end] = data.draw(
            st.one_of(st.binary(max_size=40), st.just(bytes(stream[at:end]) * 2), st.just(b""))
        )
    got = []
    other.feed(bytes(stream))
    with contextlib.suppress(WireError):
        while (payload := other.take()) is not None:
            got.append(payload)
    assert got == sent[: len(got)]


@given(st.data())
def test_a_changed_handshake_opens_nothing(data: st.DataObject) -> None:
    one, other = dialer(), listener()
    first = one.outgoing()
    one.feed(other.outgoing())
    one.shake()
    stream = bytearray(first + one.outgoing())
    at = data.draw(st.integers(0, len(stream) - 1))
    stream[at] ^= data.draw(st.integers(1, 255))
    reason_of(other, bytes(stream))
    assert not other.open
