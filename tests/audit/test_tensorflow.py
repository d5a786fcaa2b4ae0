"""TensorFlow checkpoints that the real library wrote (golden/write_tensorflow.py), and damage."""

import contextlib
import pickle
import shutil
import struct
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit import goldens
from handfast.audit.extent import Reader
from handfast.audit.finding import Code, Finding, Strength
from handfast.audit.formats.bundle import read_bundle, read_text
from handfast.audit.formats.crc32c import crc32c
from handfast.audit.formats.protobuf import Message
from handfast.audit.formats.table import MAGIC, read_table
from handfast.audit.formats.tensorflow import find
from handfast.audit.formats.trackable import GRAPH, read_graph
from handfast.audit.found import Clock, Counter, Role, Step
from handfast.audit.place import look
from handfast.audit.run import audit
from handfast.errors import Damaged, FormatError

GOLDEN = goldens.GOLDEN / "tensorflow"
VARIANTS = ("fitted", "managed", "plain", "sharded")
only, findings = partial(goldens.only, find), partial(goldens.findings, find)
copied = partial(goldens.copied, golden=GOLDEN)


def hints(path: Path, reader: Reader) -> list[Finding]:
    """What is only worth a look."""
    return [f for f in only(path, reader).findings if f.strength is Strength.HINT]


def roles(step: Step) -> dict[str, tuple[Role, str]]:
    """What each tensor is, and whose."""
    return {t.path: (t.role, t.of) for part in step.parts for t in part.tensors}


def counters(step: Step) -> list[Counter]:
    """All counters of a step."""
    return [counter for part in step.parts for counter in part.counters]


# Sound ones


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sound_checkpoint_has_no_findings(variant: str, reader: Reader) -> None:
    """Adam, SGD, RMSprop, AdamW; one file of values or three; and every file is known."""
    assert findings(GOLDEN / variant, reader) == []
    place = look(GOLDEN / variant, reader)
    (found,) = find(place)
    assert set(place.files) == found.files


def test_a_restart_takes_what_the_tracker_names(reader: Reader) -> None:
    """Where there is none, as for ``Checkpoint.write``, nothing is taken by itself."""
    taken = {v: [r.step for r in only(GOLDEN / v, reader).resume] for v in VARIANTS}
    assert taken == {
        "fitted": [],
        "managed": ["ckpt-6"],
        "plain": ["ckpt-2"],
        "sharded": ["ckpt-2"],
    }


def test_steps_are_in_order(reader: Reader) -> None:
    """By their numbers, in each directory below a place."""
    found = {f.root: [s.number for s in f.steps] for f in find(look(GOLDEN, reader))}
    assert found == {"fitted": [1, 2], "managed": [4, 6], "plain": [1, 2], "sharded": [1, 2]}


def test_adam_s_moments_belong_to_what_it_trains(reader: Reader) -> None:
    """By the object graph: the i-th moment is of the i-th variable; norms have buffers."""
    found = roles(only(GOLDEN / "managed", reader).steps[-1])
    key = "optimizer/_trainable_variables/{}/.ATTRIBUTES/VARIABLE_VALUE"
    for number in range(6):
        of = key.format(number)
        assert found[f"optimizer/_trainable_variables/{number}"] == (Role.PARAMETER, of)
        assert found[f"optimizer/_variables/{2 + 2 * number}"] == (Role.FIRST, of)
        assert found[f"optimizer/_variables/{3 + 2 * number}"] == (Role.SECOND, of)
    assert found["model/_functional/_operations/2/moving_mean"][0] is Role.BUFFER
    assert found["optimizer/_learning_rate"][0] is Role.OTHER


@pytest.mark.parametrize(("variant", "role"), [("plain", Role.MOMENTUM), ("fitted", Role.SECOND)])
def test_other_optimizers_have_one_moment(variant: str, role: Role, reader: Reader) -> None:
    """SGD's momentum, RMSprop's mean of squares."""
    found = roles(only(GOLDEN / variant, reader).steps[-1])
    moments = [kept for path, (kept, _) in found.items() if "/_variables/" in path]
    assert moments == [role] * 6


def test_counters_are_told_and_count_no_updates(reader: Reader) -> None:
    """Iterations count batches where gradients accumulate, saves count saves, steps are the
    user's: none need agree.
    """
    assert counters(only(GOLDEN / "managed", reader).steps[-1]) == [
        Counter(Clock.DIRECTORY, 6, "ckpt-6", updates=False),
        Counter(Clock.OPTIMIZER, 6, "optimizer/_iterations", updates=False),
        Counter(Clock.TRACKER, 3, "save_counter", updates=False),
        Counter(Clock.TRAINER, 6, "step", updates=False),
    ]


def test_a_tensor_in_slices_is_in_pieces(reader: Reader) -> None:
    """Each slice lies where its own entry says, in a file of its own."""
    step = only(GOLDEN / "sharded", reader).steps[-1]
    found = [
        (part.path[-17:-9], tensor.whole, tensor.offset, tensor.values.shape)
        for part in step.parts
        for tensor in part.tensors
        if tensor.whole is not None
    ]
    assert ("ta-00000", (8, 3), (0, 0), (3, 3)) in found
    assert ("ta-00001", (8, 3), (3, 0), (5, 3)) in found


def test_bfloat16_is_read(reader: Reader) -> None:
    """As torch names it, and with its bytes."""
    step = only(GOLDEN / "fitted", reader).steps[-1]
    (half,) = [t for part in step.parts for t in part.tensors if t.path == "half"]
    assert half.values.dtype == "bfloat16"
    assert b"".join(bytes(b) for b in half.values.blocks(1)) == b"\x00\x3f\xc0\x3f"


# Faults


@pytest.mark.parametrize("size", [0, 20, 1000])
def test_a_cut_index_is_told(size: int, tmp_path: Path, reader: Reader) -> None:
    """It has no footer any more; the values beside it say that it should be one."""
    root = copied("managed", tmp_path)
    path = root / "ckpt-6.index"
    path.write_bytes(path.read_bytes()[:size])
    (finding,) = findings(root, reader)
    assert (finding.code, finding.parts) == (Code.UNREADABLE, ("ckpt-6.index",))


@pytest.mark.parametrize("at", [5, 700, -60])
def test_a_damaged_index_is_told(at: int, tmp_path: Path, reader: Reader) -> None:
    """Each of its blocks has a CRC-32C."""
    root = copied("managed", tmp_path)
    data = bytearray((root / "ckpt-6.index").read_bytes())
    data[at] ^= 1
    (root / "ckpt-6.index").write_bytes(data)
    assert [finding.code for finding in findings(root, reader)] == [Code.UNREADABLE]


def test_a_missing_index_is_told(tmp_path: Path, reader: Reader) -> None:
    """A save that died between values and index; the tracker must not name it, and does."""
    root = copied("managed", tmp_path)
    (root / "ckpt-6.index").unlink()
    assert {f.code for f in findings(root, reader)} == {Code.MISSING, Code.TRACKER}
    assert list(only(root, reader).resume) == []


def test_missing_values_are_told_and_taken_all_the_same(tmp_path: Path, reader: Reader) -> None:
    """``latest_checkpoint`` looks for the index alone; a restore from it fails."""
    root = copied("managed", tmp_path)
    (root / "ckpt-6.data-00000-of-00001").unlink()
    assert [f.code for f in findings(root, reader)] == [Code.MISSING]
    assert only(root, reader).resume[0].step == "ckpt-6"


@pytest.mark.parametrize("size", [0, 600])
def test_cut_values_are_told(size: int, tmp_path: Path, reader: Reader) -> None:
    """facebookresearch/metaseq#53: files of no length, or too little; without reading any value."""
    root = copied("managed", tmp_path)
    path = root / "ckpt-6.data-00000-of-00001"
    path.write_bytes(path.read_bytes()[:size])
    step = only(root, reader).steps[-1]
    assert [finding.code for finding in step.findings] == [Code.TRUNCATED]
    assert Code.TRUNCATED in {finding.code for finding in findings(root, reader)}


def test_a_flipped_bit_is_told(tmp_path: Path, reader: Reader) -> None:
    """tensorflow/tensorflow#39033: each tensor has a CRC-32C; unlike torch's, it is looked at."""
    root = copied("managed", tmp_path)
    path = root / "ckpt-6.data-00000-of-00001"
    data = bytearray(path.read_bytes())
    data[60] ^= 1
    path.write_bytes(data)
    (finding,) = findings(root, reader)
    assert "CRC-32C" in finding.evidence[0]


def test_a_flipped_bit_of_the_graph_is_told(tmp_path: Path, reader: Reader) -> None:
    """The object graph is a text with a checksum, too; roles are not known then."""
    root = copied("managed", tmp_path)
    path = root / "ckpt-6.data-00000-of-00001"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    (finding,) = findings(root, reader)
    assert finding.code is Code.UNREADABLE
    assert {role for role, _ in roles(only(root, reader).steps[-1]).values()} == {Role.OTHER}


def test_values_of_another_step_are_told(tmp_path: Path, reader: Reader) -> None:
    """mosaicml/composer#2146 rebuilt for TensorFlow: one file of three is of the step before."""
    root = copied("sharded", tmp_path)
    shutil.copy(root / "ckpt-1.data-00001-of-00003", root / "ckpt-2.data-00001-of-00003")
    (finding,) = findings(root, reader)
    assert finding.parts == ("ckpt-2.data-00001-of-00003",)


def test_files_of_another_world_are_told(tmp_path: Path, reader: Reader) -> None:
    """More files of values than the index names, and one fewer of its own."""
    root = copied("sharded", tmp_path)
    (root / "ckpt-2.data-00001-of-00003").rename(root / "ckpt-2.data-00001-of-00004")
    assert {f.code for f in findings(root, reader)} >= {Code.MISSING, Code.EXTRA}
    step = only(root, reader).steps[-1]
    assert [path for path, _ in step.extra] == ["ckpt-2.data-00001-of-00004"]


def test_a_step_saved_again_is_a_hint(tmp_path: Path, reader: Reader) -> None:
    """NVIDIA-NeMo/RL#3312: a later step with the values of an older one; or a copy."""
    root = copied("managed", tmp_path)
    for name in ("index", "data-00000-of-00001"):
        shutil.copy(root / f"ckpt-4.{name}", root / f"ckpt-6.{name}")
    assert findings(root, reader) == []
    told = {f.strength for f in audit(root).findings if f.code is Code.STALE}
    assert told == {Strength.HINT}


# The tracker


def test_a_tracker_that_names_nothing_is_told(tmp_path: Path, reader: Reader) -> None:
    """Ahead of what is there: a restart begins from scratch, without a word."""
    root = copied("managed", tmp_path)
    path = root / "checkpoint"
    path.write_text(path.read_text().replace('"ckpt-6"', '"ckpt-8"', 1))
    (finding,) = findings(root, reader)
    assert finding.code is Code.TRACKER
    assert list(only(root, reader).resume) == []


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"hello"])
def test_a_tracker_that_says_nothing_is_told(data: bytes, tmp_path: Path, reader: Reader) -> None:
    """Empty, no text, or another one."""
    root = copied("managed", tmp_path)
    (root / "checkpoint").write_bytes(data)
    assert [finding.code for finding in findings(root, reader)] == [Code.TRACKER]


def test_a_tracker_that_was_cut_is_told(tmp_path: Path, reader: Reader) -> None:
    """TensorFlow can't parse it as a whole, warns, and finds no checkpoint."""
    root = copied("managed", tmp_path)
    path = root / "checkpoint"
    path.write_text(path.read_text()[:40])
    (finding,) = findings(root, reader)
    assert finding.code is Code.TRACKER
    assert list(only(root, reader).resume) == []


def test_a_missing_tracker_is_a_hint(tmp_path: Path, reader: Reader) -> None:
    """It was written once, as there is a count of saves; a copy of weights need not have it."""
    root = copied("managed", tmp_path)
    (root / "checkpoint").unlink()
    assert [finding.code for finding in hints(root, reader)] == [Code.TRACKER]


def test_a_tracker_behind_is_a_hint(tmp_path: Path, reader: Reader) -> None:
    """What is newer was saved, and never named; or somebody went back on purpose."""
    root = copied("managed", tmp_path)
    path = root / "checkpoint"
    path.write_text('model_checkpoint_path: "ckpt-4"\n')
    assert only(root, reader).resume[0].step == "ckpt-4"
    assert [finding.code for finding in hints(root, reader)] == [Code.TRACKER]


def test_a_tracker_that_lists_what_is_gone_is_a_hint(tmp_path: Path, reader: Reader) -> None:
    """An older one was removed by hand: a manager forgets it."""
    root = copied("managed", tmp_path)
    for path in root.glob("ckpt-4.*"):
        path.unlink()
    assert [finding.code for finding in hints(root, reader)] == [Code.TRACKER]


def test_a_copied_tracker_may_name_another_place(tmp_path: Path, reader: Reader) -> None:
    """An absolute path, of where the checkpoint was written: a restart takes that one."""
    root = copied("managed", tmp_path)
    (root / "checkpoint").write_text('model_checkpoint_path: "/mnt/runs/a/ckpt-6"\n')
    assert list(only(root, reader).resume) == []
    assert ["elsewhere" in finding.says for finding in hints(root, reader)] == [True]
    (root / "checkpoint").write_text(f'model_checkpoint_path: "{root}/ckpt-6"\n')
    assert only(root, reader).resume[0].step == "ckpt-6"


# Left-overs and hostile files


@pytest.mark.parametrize(
    ("number", "strength"), [(2, Strength.STRONG), (8, Strength.HINT)], ids=["dead", "newest"]
)
@pytest.mark.parametrize(
    "name", ["_temp/part-00000-of-00001.index", ".data-00000-of-00001.tempstate123"]
)
def test_temporary_files_are_left_overs(
    number: int, strength: Strength, name: str, tmp_path: Path, reader: Reader
) -> None:
    """Of a save that certainly died, or that may be going on."""
    root = copied("managed", tmp_path)
    path = root / f"ckpt-{number}{name}"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")
    (finding,) = only(root, reader).findings
    assert (finding.code, finding.strength) == (Code.LEFTOVER, strength)
    assert f"ckpt-{number}{name}" in only(root, reader).files


def test_a_pickle_in_place_of_a_file_is_never_executed(tmp_path: Path, reader: Reader) -> None:
    """It is unreadable, and no more."""
    mark = tmp_path / "mark"

    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (mark,)

    root = copied("managed", tmp_path)
    for path in root.iterdir():
        path.write_bytes(pickle.dumps(Bomb()))
    assert findings(root, reader)
    assert not mark.exists()


def test_another_kind_of_index_is_none(tmp_path: Path, reader: Reader) -> None:
    """A file of that name without values beside it, and without a table's last bytes."""
    (tmp_path / "search.index").write_bytes(b"anything at all")
    (tmp_path / "tiny.index").write_bytes(b"")
    assert list(find(look(tmp_path, reader))) == []


@given(st.data())
def test_whatever_is_damaged_nothing_is_raised(data: st.DataObject) -> None:
    """But FormatError: any bytes of an index, read as bytes that are no longer what they were."""
    raw = bytearray((GOLDEN / "sharded" / "ckpt-2.index").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(FormatError):
        for _, value in read_table(bytes(raw), "x"):
            Message(value, "x")


# The parts of the format


def literal(data: bytes) -> bytes:
    """A plain stretch of a snappy block."""
    return bytes([(len(data) - 1) << 2]) + data


def block(body: bytes, packed: int = 0) -> bytes:
    """A block of a table, with what stands behind it."""
    crc = crc32c(body + bytes([packed]))
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return body + bytes([packed]) + struct.pack("<I", masked)


def entries(pairs: list[tuple[bytes, bytes]]) -> bytes:
    """Keys and values as a block has them, without shared prefixes."""
    body = b"".join(bytes([0, len(k), len(v)]) + k + v for k, v in pairs)
    return body + struct.pack("<II", 0, 1)


def table(body: bytes, packed: int = 0) -> bytes:
    """A table of one block."""
    data = block(body, packed)
    index = entries([(b"z", bytes([0, len(body)]))])
    handles = bytes([0, 0, len(data), len(index)])
    return data + block(index) + handles.ljust(40, b"\0") + MAGIC


def twice(body: bytes) -> bytes:
    """A table that names its one block many times, which would take for ever."""
    data = block(body)
    index = entries([(bytes([97 + n]), bytes([0, len(body)])) for n in range(26)])
    handles = bytes([0, 0, len(data), len(index) & 0x7F | 0x80, len(index) >> 7])
    return data + block(index) + handles.ljust(40, b"\0") + MAGIC


def test_a_tensor_of_texts_is_named(tmp_path: Path, reader: Reader) -> None:
    """A vocabulary, say: no check looks at it, and nothing can carry it."""
    pairs = [(b"", b"\x08\x01"), (b"vocab", b"\x08\x07\x28\x05"), (b"w", b"\x08\x01\x28\x04")]
    (tmp_path / "ckpt-2.index").write_bytes(table(entries(pairs)))
    (tmp_path / "ckpt-2.data-00000-of-00001").write_bytes(bytes(9))
    (one,) = next(find(look(tmp_path, reader))).steps
    assert [list(part.valueless) for part in one.parts] == [[], ["vocab"]]
    assert [tensor.path for part in one.parts for tensor in part.tensors] == ["w"]


def test_a_snappy_block_is_unpacked() -> None:
    """Plain stretches, and copies of what is behind, also of what is just being written."""
    body = entries([(b"k", b"abcabcabcabc")])
    head = body[:3] + b"k" + b"abc"
    packed = bytes([len(body)]) + literal(head) + bytes([1 | (9 - 4) << 2, 3])
    packed += bytes([61 << 2, 7, 0]) + body[-8:]
    assert list(read_table(table(packed, 1), "x")) == [(b"k", b"abcabcabcabc")]
    far = bytes([len(body)]) + literal(head) + bytes([2 | 8 << 2, 3, 0]) + literal(body[-8:])
    assert list(read_table(table(far, 1), "x")) == [(b"k", b"abcabcabcabc")]


@pytest.mark.parametrize(
    ("packed", "match"),
    [
        (bytes([4, 1 << 2 | 1, 9]), "a copy from 9 bytes back"),
        (bytes([9, 0, 65]), "unpacks to 1 bytes"),
        (b"\xff\xff\xff\xff\x7f", "at most"),
    ],
)
def test_a_snappy_block_that_is_none_is_refused(packed: bytes, match: str) -> None:
    """Copies from before its beginning, another length, or one that is too large."""
    with pytest.raises(FormatError, match=match):
        list(read_table(table(packed, 1), "x"))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "it was cut"),
        (table(entries([]), 7), "packed in way 7"),
        (table(struct.pack("<I", 9)), "9 restarts"),
        (twice(entries([(b"k", b"v")])), "named twice"),
        (table(b"\x05\x00\x00" + struct.pack("<II", 0, 1)), "shares 5 bytes"),
    ],
)
def test_a_table_that_is_none_is_refused(data: bytes, match: str) -> None:
    """Each by what is wrong with it."""
    with pytest.raises(FormatError, match=match):
        list(read_table(data, "x"))


def test_a_bundle_without_a_header_is_damaged(tmp_path: Path, reader: Reader) -> None:
    """Nobody can say how many files there are."""
    (tmp_path / "a.index").write_bytes(table(entries([(b"k", b"")])))
    with pytest.raises(Damaged, match="no header"):
        read_bundle(look(tmp_path, reader), "a")


def test_numbers_in_another_order_are_not_read(tmp_path: Path, reader: Reader) -> None:
    """A checkpoint of a big-endian machine may be sound: FormatError."""
    (tmp_path / "a.index").write_bytes(table(entries([(b"", b"\x08\x01\x10\x01")])))
    with pytest.raises(FormatError, match="big-endian"):
        read_bundle(look(tmp_path, reader), "a")


def test_a_slice_without_an_entry_is_told(tmp_path: Path, reader: Reader) -> None:
    """The tensor is left out, and the index is damaged."""
    entry = b"\x08\x01\x3a\x04\x0a\x02\x10\x03"
    (tmp_path / "a.index").write_bytes(table(entries([(b"", b"\x08\x01"), (b"w", entry)])))
    (tmp_path / "a.data-00000-of-00001").write_bytes(b"")
    (finding,) = findings(tmp_path, reader)
    assert "no entry of its slice" in finding.says


def test_a_text_must_be_one(reader: Reader) -> None:
    """Not any tensor."""
    place = look(GOLDEN / "managed", reader)
    bundle = read_bundle(place, "ckpt-6")
    assert read_graph(read_text(place, "ckpt-6", bundle, GRAPH), "x").counts
    with pytest.raises(FormatError, match="no text by itself"):
        read_text(place, "ckpt-6", bundle, "step/.ATTRIBUTES/VARIABLE_VALUE")


def field(number: int, data: bytes | int) -> bytes:
    """A field of a message on the wire."""
    if isinstance(data, int):
        return bytes([number << 3, data])
    return bytes([number << 3 | 2, len(data)]) + data


def node(
    *children: tuple[int, str], key: str = "", slots: Sequence[tuple[int, str, int]] = ()
) -> bytes:
    """An object of a graph."""
    found = b"".join(field(1, field(1, n) + field(2, name.encode())) for n, name in children)
    if key:
        found += field(2, field(1, b"VARIABLE_VALUE") + field(3, key.encode()))
    for original, name, slot in slots:
        found += field(3, field(1, original) + field(2, name.encode()) + field(3, slot))
    return field(1, found)


def test_slots_of_older_optimizers_are_known() -> None:
    """keras 2 and TF 1 keep them beside each variable: Adam's m and v."""
    graph = read_graph(
        node((1, "w"), (2, "optimizer"))
        + node(key="w")
        + node((5, "iter"), slots=((1, "m", 3), (1, "v", 4)))
        + node(key="w/m")
        + node(key="w/v")
        + node(key="iter"),
        "x",
    )
    assert {key: leaf.role for key, leaf in graph.leaves.items()} == {
        "w": Role.PARAMETER,
        "w/m": Role.FIRST,
        "w/v": Role.SECOND,
    }
    assert {leaf.of for leaf in graph.leaves.values()} == {"w"}
    assert graph.counts == {"iter": Clock.OPTIMIZER}


def test_weights_without_an_optimizer_are_parameters() -> None:
    """But for what a norm averages; and a step is a step."""
    graph = read_graph(
        node((1, "kernel"), (2, "moving_mean"), (3, "step"), (9, "nowhere"))
        + node(key="k") + node(key="m") + node(key="s"),
        "x",
    )  # fmt: skip
    assert graph.leaves["k"].role is Role.PARAMETER
    assert graph.leaves["m"].role is Role.BUFFER
    assert graph.counts == {"s": Clock.TRAINER}


@given(st.dictionaries(st.integers(1, 15), st.one_of(st.integers(0, 127), st.binary(max_size=9))))
def test_a_message_has_what_was_written(fields: dict[int, int | bytes]) -> None:
    """Numbers and strings, by field; what is not there is 0 or empty."""
    message = Message(b"".join(field(*pair) for pair in fields.items()), "x")
    for number, value in fields.items():
        if isinstance(value, int):
            assert message.number(number) == message.signed(number) == value
        else:
            assert message.texts(number) == [value]
    assert message.number(16) == 0
    assert message.text(16) == ""


def test_numbers_of_other_widths_are_read() -> None:
    """Fixed ones, negative ones, and those that are packed together."""
    negative = bytes([1 << 3]) + b"\xff" * 9 + b"\x01"
    message = Message(negative + bytes([2 << 3 | 5, 1, 0, 0, 0, 3 << 3 | 1, 2]) + bytes(7), "x")
    assert message.signed(1) == -1
    assert (message.number(2), message.number(3)) == (1, 2)
    assert Message(field(4, b"\x01\x02\x80\x01"), "x").numbers(4) == [1, 2, 128]


@pytest.mark.parametrize("data", [b"\x0b", b"\x0a\x05a", b"\x08"])
def test_what_is_no_message_is_damaged(data: bytes) -> None:
    """Of no known type, or cut."""
    with pytest.raises(Damaged, match="x: byte"):
        Message(data, "x")
