"""flax's own checkpoints, written by the real library (golden/write_orbax.py), and damaged ones."""

import pickle
import shutil
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit import goldens
from handfast.audit.extent import Reader
from handfast.audit.finding import Code, Strength
from handfast.audit.formats.flax import find
from handfast.audit.found import Clock, Counter, Part, Role
from handfast.audit.place import File, Place, look
from handfast.audit.run import audit

GOLDEN = goldens.GOLDEN / "flax"
VARIANTS = ("adam", "half", "weights")
only, findings = partial(goldens.only, find), partial(goldens.findings, find)
copied = partial(goldens.copied, golden=GOLDEN)


def newest(path: Path, reader: Reader) -> Part:
    """The one part of the newest step."""
    return only(path, reader).steps[-1].parts[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sound_checkpoint_has_no_findings(variant: str, reader: Reader) -> None:
    """And every file of it is known."""
    assert findings(GOLDEN / variant, reader) == []
    assert set(look(GOLDEN / variant, reader).files) == only(GOLDEN / variant, reader).files


def test_the_greatest_number_is_taken(reader: Reader) -> None:
    """Of each prefix; weights alone are taken by nobody."""
    taken = {v: [r.step for r in only(GOLDEN / v, reader).resume] for v in VARIANTS}
    assert taken == {"adam": ["checkpoint_3"], "half": ["checkpoint_4"], "weights": []}


def test_roles_and_counters_are_those_of_optax(reader: Reader) -> None:
    """The tree's names are its fields'."""
    part = newest(GOLDEN / "adam", reader)
    found = {t.path: (t.role, t.of) for t in part.tensors}
    assert found["params.last.kernel"] == (Role.PARAMETER, "last.kernel")
    assert found["opt_state.0.mu.last.kernel"] == (Role.FIRST, "last.kernel")
    assert found["opt_state.0.nu.last.kernel"] == (Role.SECOND, "last.kernel")
    assert list(part.counters) == [
        Counter(Clock.TRAINER, 3, "step"),
        Counter(Clock.OPTIMIZER, 3, "opt_state.0.count"),
        Counter(Clock.SCHEDULER, 3, "opt_state.1.count"),
        Counter(Clock.DIRECTORY, 3, "checkpoint_3", updates=False),
    ]


def test_accumulated_gradients_are_no_fault(reader: Reader) -> None:
    """Two steps make an update; and bfloat16 is known by its name."""
    part = newest(GOLDEN / "half", reader)
    updates = {c.path: (c.value, c.updates) for c in part.counters}
    assert updates["step"] == (4, False)
    assert updates["opt_state.gradient_step"] == (2, True)
    assert {t.values.dtype for t in part.tensors if t.role is Role.PARAMETER} == {"bfloat16"}


# Faults


@pytest.mark.parametrize("size", [0, 1, 100, 5000])
def test_a_cut_file_is_told(size: int, tmp_path: Path, reader: Reader) -> None:
    """Wherever it was cut: facebookresearch/metaseq#53 for no length at all."""
    root = copied("adam", tmp_path)
    path = root / "checkpoint_3"
    path.write_bytes(path.read_bytes()[:size])
    (finding,) = findings(root, reader)
    assert (finding.code, finding.parts) == (Code.TRUNCATED, ("checkpoint_3",))
    assert only(root, reader).resume[0].step == "checkpoint_3"


def test_what_is_too_much_is_told(tmp_path: Path, reader: Reader) -> None:
    """The end of an older, longer file behind a newer one."""
    root = copied("adam", tmp_path)
    with (root / "checkpoint_3").open("ab") as file:
        file.write(b"more")
    (finding,) = findings(root, reader)
    assert "4 bytes more" in finding.says


def test_a_left_over_is_a_hint(tmp_path: Path, reader: Reader) -> None:
    """A save that died, or is going on."""
    root = copied("adam", tmp_path)
    (root / "checkpoint_tmp").write_bytes(b"")
    (finding,) = only(root, reader).findings
    assert (finding.code, finding.strength) == (Code.LEFTOVER, Strength.HINT)


def test_a_step_saved_again_is_a_hint(tmp_path: Path, reader: Reader) -> None:
    """NVIDIA-NeMo/RL#3312: a later step with the moments of an older one; or a copy."""
    root = copied("adam", tmp_path)
    shutil.copy(root / "checkpoint_3", root / "checkpoint_4")
    assert findings(root, reader) == []
    told = {f.strength for f in audit(root).findings if f.code is Code.STALE}
    assert told == {Strength.HINT}


def test_an_optimizer_of_another_step_is_told(tmp_path: Path, reader: Reader) -> None:
    """NVIDIA/nvidia-resiliency-ext#376 rebuilt for flax: the optimizer is a step behind."""
    root = copied("adam", tmp_path)
    old, new = (msgspec.msgpack.decode((root / f"checkpoint_{n}").read_bytes()) for n in (2, 3))
    new["opt_state"] = old["opt_state"]
    (root / "checkpoint_3").write_bytes(msgspec.msgpack.encode(new))
    assert {finding.code for finding in findings(root, reader)} == {Code.COUNTERS, Code.STALE}


def test_a_pickle_in_place_of_a_file_is_never_executed(tmp_path: Path, reader: Reader) -> None:
    """Its first byte is one of msgpack's maps: the rest is refused."""
    mark = tmp_path / "mark"

    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (mark,)

    root = copied("adam", tmp_path)
    (root / "checkpoint_3").write_bytes(pickle.dumps(Bomb()))
    assert [finding.code for finding in findings(root, reader)] == [Code.UNREADABLE]
    assert not mark.exists()


def test_other_files_of_that_name_are_none(tmp_path: Path, reader: Reader) -> None:
    """What is no map is of another format."""
    (tmp_path / "checkpoint_7").write_bytes(b"PK\x03\x04")
    (tmp_path / "empty.msgpack").write_bytes(b"")
    assert list(find(look(tmp_path, reader))) == []


# The encoding


def array(dtype: str, shape: tuple[int, ...], data: bytes) -> msgspec.msgpack.Ext:
    """An array as flax packs it."""
    return msgspec.msgpack.Ext(1, msgspec.msgpack.encode((shape, dtype, data)))


def packed(tmp_path: Path, value: object, reader: Reader) -> Part:
    """What is read of a value in a file."""
    (tmp_path / "x.msgpack").write_bytes(msgspec.msgpack.encode(value))
    return newest(tmp_path, reader)


def test_what_is_passed_over_is_named(tmp_path: Path, reader: Reader) -> None:
    """Texts, bytes, complex numbers, extensions of others; what has no value is nobody's loss."""
    value = {
        "w": array("float32", (1,), bytes(4)),
        "name": "a",
        "raw": b"b",
        "complex": msgspec.msgpack.Ext(2, bytes(16)),
        "theirs": msgspec.msgpack.Ext(77, b""),
        "nothing": None,
        "empty": "",
    }
    assert packed(tmp_path, value, reader).valueless == ["name", "raw", "complex", "theirs"]


def test_a_large_array_is_put_together(tmp_path: Path, reader: Reader) -> None:
    """flax cuts what has more than a gigabyte into flat chunks, and says its shape apart."""
    chunks = {"0": array("int16", (3,), bytes(range(6))), "1": array("int16", (1,), b"\x06\x07")}
    large = {"__msgpack_chunked_array__": True, "shape": {"0": 2, "1": 2}, "chunks": chunks}
    part = packed(tmp_path, {"params": {"w": large, "v": array("int8", (1,), b"\x09")}}, reader)
    found = {t.path: (t.values.shape, joined(t.values.blocks(3))) for t in part.tensors}
    assert found == {"params.w": ((2, 2), bytes(range(8))), "params.v": ((1,), b"\x09")}
    assert part.problem == ""


def test_sizes_of_any_length_are_read(tmp_path: Path, reader: Reader) -> None:
    """Shapes with numbers of one, two and three bytes; and extensions of other kinds are none."""
    shapes = [(3,), (200,), (70_000,), ()]
    arrays = {str(n): array("int8", s, bytes(s[0] if s else 1)) for n, s in enumerate(shapes)}
    other = {"complex": msgspec.msgpack.Ext(2, b"\x92\x00\x00")}
    part = packed(tmp_path, {**arrays, **other}, reader)
    assert {t.values.shape for t in part.tensors} == set(shapes)
    assert part.problem == ""


def test_a_count_that_can_not_be_read_is_left_out(tmp_path: Path, reader: Reader) -> None:
    """That it is cut short is told by what reads values."""
    state = {"count": array("int32", (), b"\x01"), "mu": {"w": 0.5}, "nu": {"w": 0.5}}
    part = packed(tmp_path, {"opt_state": {"0": state}, "params": {"w": 0.5}}, reader)
    assert list(part.counters) == []
    assert findings(tmp_path, reader)


def test_a_large_array_needs_chunks(tmp_path: Path, reader: Reader) -> None:
    """One without any is damaged."""
    part = packed(tmp_path, {"w": {"__msgpack_chunked_array__": True, "shape": {"0": 0}}}, reader)
    assert "without chunks" in part.problem


def joined(blocks: Iterator[memoryview]) -> bytes:
    """All blocks together."""
    return b"".join(map(bytes, blocks))


Leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-(1 << 63), (1 << 64) - 1), st.floats(),
    st.sampled_from(["", "a" * 32, "b" * 256, "c" * 70_000, b"", b"d" * 300, b"e" * 70_000]),
)  # fmt: skip
Trees = st.one_of(
    Leaves,
    st.lists(Leaves, max_size=20),
    st.dictionaries(st.sampled_from("abcdefghijklmnopqrst"), Leaves, min_size=1),
)


@given(st.dictionaries(st.sampled_from(["", "k", "long" * 10, "\u00e9"]), Trees))
def test_any_tree_is_gone_through(tree: dict[str, object]) -> None:
    """Whatever msgpack can hold; numbers by themselves are tensors without dimensions."""
    data = msgspec.msgpack.encode(tree)
    place = Place("/x", {"x.msgpack": File(len(data), 0.0)}, (), Held(data))
    (found,) = find(place)
    (part,) = found.steps[0].parts
    assert part.problem == ""
    whole = {t.path: t.values for t in part.tensors}
    for key, value in tree.items():
        if type(value) is int:
            signed = whole[key].dtype.startswith("int")
            data = joined(whole[key].blocks(1))
            assert int.from_bytes(data, "little", signed=signed) == value
        elif type(value) is float:
            assert joined(whole[key].blocks(1)) == struct.pack("<d", value)


class Held(Reader):
    """Reads one file from memory."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self._data = data

    def size(self, path: str) -> int:
        """Its length."""
        return len(self._data)

    def read(self, path: str, into: memoryview, at: int) -> None:
        """Some of it."""
        into[:] = self._data[at : at + len(into)]


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"\x81\xc1", "type 0xc1"),
        (b"\x81\x01", "type 0x01"),
        (b"\x81\xdb\x00\x02\x00\x00", "a name of 131,072 bytes"),
        (b"\x81\xa1a\xc7\x03\x01\x92\x90\xa0", "an array should be there"),
        (b"\x81\xa1a\xc7\x05\x01\x93\x91\xa0\xa0\xa0", "a size should be there"),
        (b"\x81\xa1a" + b"\x91" * 100 + b"\x00", "more than 64 levels"),
        (b"\x81\xa1a\xc6\xff\xff\xff\xff", "ends there"),
    ],
)
def test_what_flax_does_not_write_is_refused(
    data: bytes, match: str, tmp_path: Path, reader: Reader
) -> None:
    """Each with the byte, and without taking more memory than a window."""
    (tmp_path / "x.msgpack").write_bytes(data)
    assert match in newest(tmp_path, reader).problem
