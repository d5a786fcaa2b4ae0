"""Shows that pickles are read as Python reads them, but for what they would run, and the cost."""

from __future__ import annotations

import builtins
import codecs
import collections
import contextlib
import os
import pickle
import pickletools
import struct
from pathlib import Path
from typing import Any, Self

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handfast.audit import inert, machine, torch_tree, tree
from handfast.audit.inert import Buffer, Call, Global, Key, Persistent
from handfast.audit.opcodes import STEPS, _unknown
from handfast.audit.pickles import Cut, Limits, read
from handfast.errors import FormatError

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def exact(value: Any) -> Any:
    """A value as something that is equal only if the types are, all the way down, and the bits."""
    match value:
        case float():
            return "float", struct.pack("<d", value)
        case complex():
            return "complex", struct.pack("<dd", value.real, value.imag)
        case dict():
            return "dict", [(exact(key), exact(part)) for key, part in value.items()]
        case list() | tuple():
            return type(value).__name__, [exact(part) for part in value]
        case set() | frozenset():
            return type(value).__name__, sorted(repr(exact(part)) for part in value)
    return type(value).__name__, value


ATOMS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats()
    | st.complex_numbers()
    | st.text(st.characters(exclude_categories=()))
    | st.binary()
)
KEYS = st.recursive(
    ATOMS, lambda keys: st.lists(keys, max_size=3).map(tuple) | st.frozensets(keys, max_size=3),
    max_leaves=6,
)  # fmt: skip
VALUES = st.recursive(
    KEYS | st.binary().map(bytearray),
    lambda parts: (
        st.lists(parts)
        | st.lists(parts, max_size=5).map(tuple)
        | st.dictionaries(KEYS, parts)
        | st.sets(KEYS)
    ),
    max_leaves=30,
)


@pytest.fixture(autouse=True)
def _nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each import that a reading causes fail the test."""
    for codec in ("raw-unicode-escape", "utf-8", "ascii", "latin-1"):
        codecs.lookup(codec)
    real, where = builtins.__import__, read.__module__

    def guarded(name: str, scope: Any = None, *args: Any, **kwargs: Any) -> Any:
        if scope and str(scope.get("__name__", "")).startswith("handfast.audit"):
            raise AssertionError(f"{where} imports {name}")
        return real(name, scope, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", guarded)


# What is read


@given(VALUES, st.sampled_from(PROTOCOLS))
def test_plain_values_are_read_as_python_reads_them(value: Any, protocol: int) -> None:
    """Shows it to the type, the order and the bit, at every protocol, and where the pickle ends."""
    data = pickle.dumps(value, protocol)
    found = read(data + b"more")
    assert exact(found.value) == exact(pickle.loads(data))
    assert found.end == len(data)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_long_values_are_read_as_well(protocol: int) -> None:
    """Shows it where lengths take four bytes, numbers thousands of digits, and frames are many."""
    value = {
        "text": "ß" * 70_000, "bytes": b"\xff" * 70_000, "number": -(7**4000),
        "list": [*range(70_000)], "dict": {n: str(n) for n in range(3000)}, "set": {*range(300)},
        "deep": [[[[[[((((((((1,),),),),),),),)]]]]]],
    }  # fmt: skip
    assert exact(read(pickle.dumps(value, protocol)).value) == exact(value)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_is_shared_or_contains_itself_stays_so(protocol: int) -> None:
    """Shows that identity is kept, and that a cycle ends nowhere."""
    value: list[Any] = [[1], {}]
    value += [value[0], (value,)]
    value[1]["itself"] = value
    found = read(pickle.dumps(value, protocol)).value
    assert found[0] is found[2]
    assert found[3][0] is found is found[1]["itself"]


def test_several_pickles_in_a_row_are_read_one_by_one() -> None:
    """Shows that the end of one is the start of the next."""
    rows = [7, "x", {"a": [1, 2]}, b"\0" * 300]
    data = b"\1" + b"".join(pickle.dumps(row, number) for number, row in enumerate(rows))
    at = 1
    for row in rows:
        found = read(data, at)
        assert found.value == row
        at = found.end
    assert at == len(data)


RARE: dict[str, tuple[bytes, Any]] = {
    "bools of protocol 0": (b"(I00\nI01\nI7\nL-8L\nL9\nF2.5\nt.", (False, True, 7, -8, 9, 2.5)),
    "strings of Python 2": (
        b"(S'a\\x41\\n\\\\\\''\nS\"b\"\nT\x01\0\0\0cU\x01dt.", ("aA\n\\'", "b", "c", "d")
    ),
    "unicode": (b"V\\u00df\n.", "ß"),
    "long texts": (b"\x8d\x02" + bytes(7) + b"ab.", "ab"),
    "long bytes": (b"\x8e\x02" + bytes(7) + b"ab.", b"ab"),
    "long numbers": (b"\x8b\x02\0\0\0\0\x01.", 256),
    "no number": (b"\x8a\0.", 0),
    "what lies on the stack": (b"(K\1K\x022K\x0300K\4(K\x05K\x061(0t.", (1, 2, 4)),
    "lists and dicts by marks": (b"((lp0\n(K\1K\2dg0\nt.", ([], {1: 2}, [])),
    "memo in four bytes": (b"K\5r\0\1\0\0j\0\1\0\0\x86.", (5, 5)),
    "a protocol in the middle": (b"\x80\2]\x80\4K\1a.", [1]),
    "small frames": (b"\x80\4\x95\1\0\0\0\0\0\0\0N.", None),
    "a key twice": (b"}(K\1K\2K\1K\3u.", {1: 3}),
    "a set of nothing": (b"cbuiltins\nset\n)R.", set()),
}  # fmt: skip


@pytest.mark.parametrize("name", RARE)
def test_opcodes_that_no_pickler_of_today_writes(name: str) -> None:
    """Shows that they do what Python's own reader does."""
    data, value = RARE[name]
    assert read(data).value == value == pickle.loads(data)


def test_bytes_of_python_2_that_are_no_ascii_stay_bytes() -> None:
    """Shows it for each way to write them, where Python asks for an encoding."""
    for data in (b"S'\\xff'\n.", b"T\x01\0\0\0\xff.", b"U\x01\xff."):
        assert read(data).value == b"\xff"


def test_every_opcode_has_a_step() -> None:
    """Shows that none of the protocols known to this Python was left out."""
    known = {ord(opcode.code) for opcode in pickletools.opcodes}
    assert {code for code, step in enumerate(STEPS) if step is not _unknown} == known


# What would have been run


class Plain:
    """A class whose instances are pickled as most are."""

    def __init__(self) -> None:
        self.number = 1


class Slotted:
    """One whose attributes are in slots, and which is made with a keyword."""

    __slots__ = ("one",)

    def __new__(cls, *, one: int = 0) -> Self:
        made = super().__new__(cls)
        made.one = one
        return made

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, int]]:
        return (), {"one": self.one}


def this(name: str) -> Global:
    """Something of this module, as pickle names it."""
    return Global(__name__, name)


def test_an_instance_is_a_call_with_its_state() -> None:
    """Shows it by class, arguments, keywords and state."""
    found = read(pickle.dumps(Plain(), 2)).value
    assert (found.function, found.args, found.state) == (this("Plain"), (), {"number": 1})
    found = read(pickle.dumps(Slotted(one=5), 4)).value
    assert (found.function, found.args, found.kwargs) == (this("Slotted"), (), {"one": 5})
    assert found.state == (None, {"one": 5})


def test_items_and_pairs_are_kept_beside_the_call() -> None:
    """Shows it for collections, whose class alone knows what becomes of them."""
    found = read(pickle.dumps(collections.OrderedDict(b=1, a=2))).value
    assert found.function == Global("collections", "OrderedDict")
    assert list(found.pairs.items()) == [("b", 1), ("a", 2)]
    found = read(pickle.dumps(collections.deque([1, 2], 5))).value
    assert (found.args, found.items) == (((), 5), [1, 2])


def test_what_python_2_called_builtins_has_todays_name() -> None:
    """Shows that protocols up to 2, which name modules as Python 2 did, name the same things."""
    assert {read(pickle.dumps(print, n)).value for n in PROTOCOLS} == {Global("builtins", "print")}


ODD: dict[str, tuple[bytes, Any]] = {
    "INST": (b"(K\1iposix\nsystem\n.", (Global("posix", "system"), (1,))),
    "OBJ": (b"(cposix\nsystem\nK\1o.", (Global("posix", "system"), (1,))),
    "NEWOBJ": (b"cposix\nsystem\nK\1\x85\x81.", (Global("posix", "system"), (1,))),
    "REDUCE of a constant": (b"K\1K\2\x85R.", (1, (2,))),
    "set of no list": (b"cbuiltins\nset\nK\1\x85R.", (Global("builtins", "set"), (1,))),
    "encode to another code": (
        b"c_codecs\nencode\nVx\nVrot13\n\x86R.", (Global("_codecs", "encode"), ("x", "rot13"))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_a_call_is_never_made_whoever_asks(name: str) -> None:
    """Shows it for each opcode that makes one, and for calls that only look plain."""
    data, (function, args) = ODD[name]
    found = read(data).value
    assert type(found) is Call
    assert (found.function, found.args) == (function, args)


def test_extensions_persistent_ids_and_buffers_are_named() -> None:
    """Shows it for what pickle would look up in a registry, or ask its user for."""
    found = read(b"(\x82\7\x83\7\1\x84\7\0\0\1P/a/b\nK\1Q\x97\x98\x97t.").value
    registry = "copyreg._inverted_registry"
    assert found[:3] == tuple(Global(registry, str(n)) for n in (7, 263, 16777223))
    assert [type(part) for part in found[3:5]] == [Persistent, Persistent]
    assert [part.pid for part in found[3:5]] == ["/a/b", 1]
    assert found[5:] == (Buffer(0), Buffer(1))


def test_buffers_out_of_band_are_numbered() -> None:
    """Shows it for what protocol 5 writes."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(
        [pickle.PickleBuffer(b"one"), pickle.PickleBuffer(bytearray(b"two"))], 5,
        buffer_callback=buffers.append,
    )  # fmt: skip
    assert read(data).value == [Buffer(0), Buffer(1)]


class Trap:
    """Runs a command when it is unpickled, in whatever place it stands."""

    def __init__(self, path: Path) -> None:
        self.command = f"touch {path}"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def traps(path: Path) -> dict[str, bytes]:
    """Pickles of a command in every place where a pickle may have a value."""
    call = pickle.dumps(Trap(path), 0).removesuffix(b".")
    touch = b"VNAME\n".replace(b"NAME", f"touch {path}".encode())
    return {
        "value": call + b".",
        "item": b"]" + call + b"a.",
        "value of a dict": b"}K\1" + call + b"s.",
        "key": b"}" + call + b"Ns.",
        "key in a tuple": b"}" + call + b"\x85Ns.",
        "element of a set": b"\x8f(" + call + b"\x90.",
        "element of a frozenset": b"(" + call + b"\x91.",
        "persistent id": call + b"Q.",
        "argument": b"cbuiltins\nlist\n" + call + b"\x85R.",
        "state": b"ccollections\nOrderedDict\n)R" + call + b"b.",
        "state of an instance": b"c__main__\nX\n)\x81}Va\n" + call + b"sb.",
        "function": b"cbuiltins\ngetattr\n" + call + b"Vx\n\x86R)R.",
        "INST": b"(" + touch + b"iposix\nsystem\n.",
        "OBJ": b"(cposix\nsystem\n" + touch + b"o.",
        "NEWOBJ": b"csubprocess\nPopen\n(" + touch + b"t\x81.",
        "NEWOBJ_EX": b"csubprocess\nPopen\n)}Vargs\n" + touch + b"s\x92.",
        "STACK_GLOBAL": b"Vposix\nVsystem\n\x93" + touch + b"\x85R.",
        "what is popped": call + b"0N.",
        "what is under the memo": call + b"p0\n0g0\n.",
        "extension": b"\x82\1" + touch + b"\x85R.",
        "a set that calls": b"cbuiltins\nset\n]" + call + b"a\x85R.",
        "eval": b"cbuiltins\neval\nV__import__('os').system('touch %s')\n\x85R."
        % str(path).encode(),
    }


def test_nothing_is_run_in_whatever_place_it_stands(tmp_path: Path) -> None:
    """Shows it by a command that leaves a file behind: Python leaves it, for most; we never do."""
    path, runs = tmp_path / "ran", 0
    for place, data in traps(path).items():
        found = read(data).value
        list(tree.leaves(torch_tree.tree(found).root))
        assert not path.exists(), place
        with contextlib.suppress(Exception):  # the trap goes off before it, if at all
            pickle.loads(data)
        runs += path.exists()
        path.unlink(missing_ok=True)
    assert runs > 12


# Keys


@pytest.mark.parametrize("key", [[], {}, set(), bytearray(b"x"), ([],), (1, ({},))])
def test_a_key_that_cant_be_hashed_is_kept_apart(key: Any) -> None:
    """Shows that a dict or a set of it can be read, though Python would refuse."""
    body = pickle.dumps(key, 4).removesuffix(b".").removeprefix(b"\x80\4")
    body = body[9:] if body[:1] == b"\x95" else body
    (found,) = read(b"}" + body + b"K\1s.").value
    assert type(found) is Key
    assert exact(found.value) == exact(key)
    (found,) = read(b"(" + body + b"\x91.").value
    assert type(found) is Key


def test_inert_nodes_are_keys_by_what_they_are() -> None:
    """Shows that names are equal, and calls only the same."""
    found = read(b"}(ca\nb\nK\1ca\nb\nK\2ca\nb\n)RK\3ca\nb\n)RK\4u.").value
    assert found[Global("a", "b")] == 2
    assert sorted(found.values()) == [2, 3, 4]


def test_keys_that_would_cost_too_much_are_kept_apart() -> None:
    """Shows it for long texts, huge numbers, and tuples of tuples that double each time."""
    doubled = b"K\1" + b"2\x86" * 100
    long, short = b"x" * (inert.KEY_TEXT + 1), b"x" * inert.KEY_TEXT
    huge = pickle.dumps(1 << 20_000).removeprefix(b"\x80\4").removesuffix(b".")[9:]
    for body, apart in (
        (doubled, True), (pickle.dumps(long, 1)[:-1], True), (pickle.dumps(short, 3)[2:-1], False),
        (huge, True), (b"(" + b"N" * 2000 + b"t", True), (b"K\1" + b"\x85" * 1500, True),
        (b"(" + (b"(" + b"N" * 40 + b"t") * 40 + b"t", True),
        (b"(" + b"N" * 600 + b"(" + b"N" * 500 + b"tt", True),
        (b"X\x88\x13\0\0" + b"x" * 5000 + b"\x85", True),
    ):  # fmt: skip
        (found,) = read(b"}" + body + b"Ns.").value
        assert (type(found) is Key) is apart


@pytest.mark.parametrize(
    "make", [lambda n: n * machine.MODULUS, lambda n: complex(-n * 1000003, n)]
)
def test_keys_that_are_made_to_clash_are_refused(make: Any) -> None:
    """Shows that a dict can't be made to take time that grows with the square of its size."""
    few = {make(n): n for n in range(1, 60)}
    assert read(pickle.dumps(few)).value == few
    assert len({hash(key) for key in few}) == 1
    with pytest.raises(FormatError, match="one hash"):
        read(pickle.dumps({make(n): n for n in range(1, 100)}))


# What can't be read


WRONG: dict[str, tuple[bytes, str]] = {
    "no opcode": (b"N\xff.", r"byte 1 \(0xff\): no pickle has"),
    "nothing on the stack": (b"NN00.", r"byte 4 \(STOP\): there are too few"),
    "too little for a tuple": (b"N\x86.", r"byte 1 \(TUPLE2\): there are too few"),
    "too little behind a mark": (b"N(\x85.", r"byte 2 \(TUPLE1\): there are too few"),
    "no mark": (b"N)t.", r"byte 2 \(TUPLE\): there is no mark"),
    "pop of nothing": (b"0.", r"byte 0 \(POP\): there is no mark"),
    "an odd dict": (b"(Nd.", r"byte 2 \(DICT\): a key has no value"),
    "no list": (b"NNa.", r"byte 2 \(APPEND\): .* of type NoneType"),
    "no dict": (b"NNNs.", r"byte 3 \(SETITEM\): .* of type NoneType"),
    "no set": (b"](N\x90.", None),
    "no arguments": (b"ca\nb\nNR.", r"byte 6 \(REDUCE\): arguments that are no tuple"),
    "no keywords": (b"ca\nb\n)N\x92.", r"byte 7 \(NEWOBJ_EX\): arguments that are no"),
    "no name": (b"NN\x93.", r"byte 2 \(STACK_GLOBAL\): a name that is no string"),
    "a state of a list": (b"]Nb.", r"byte 2 \(BUILD\): a state .* of type list"),
    "nothing in the memo": (b"h\5.", r"byte 0 \(BINGET\): the memo has nothing"),
    "below the memo": (b"Np-1\n.", r"byte 1 \(PUT\): a place in the memo"),
    "no number": (b"Ix\n.", r"byte 0 \(INT\): its argument can't be read"),
    "no float": (b"Fx\n.", r"byte 0 \(FLOAT\): its argument can't be read"),
    "no text": (b"X\1\0\0\0\xff.", r"byte 0 \(BINUNICODE\): its argument can't be read"),
    "no quotes": (b"Sx\n.", r"byte 0 \(STRING\): a string without its quotes"),
    "a number of millions of digits": (b"I" + b"1" * 5000 + b"\n.", r"byte 0 \(INT\): a line of"),
    "a negative length": (b"\x8b\xff\xff\xff\xff.", r"byte 0 \(LONG4\): a string or number"),
    "a later protocol": (b"\x80\6N.", r"byte 0 \(PROTO\): protocol 6"),
    "a copy of a copy": (
        b"cbuiltins\nset\n(" + b"N" * 40 + b"lp0\n\x85R" + b"cbuiltins\nset\ng0\n\x85R" * 9 + b".",
        r"makes more of its values than it has bytes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told_with_its_offset(name: str) -> None:
    """Shows the opcode and where it stands, in a file if it begins there."""
    data, says = WRONG[name]
    if says is None:
        assert read(data).value == [None]
        return
    with pytest.raises(FormatError, match=says) as raised:
        read(data)
    assert not isinstance(raised.value, Cut)
    with pytest.raises(FormatError, match=r"^x\.pt: data\.pkl: byte ") as raised:
        read(b"12345" + data, 5, name="x.pt: data.pkl", base=1000)
    assert "What to do" in str(raised.value)


@given(VALUES, st.sampled_from(PROTOCOLS), st.data())
def test_a_pickle_that_was_cut_is_told_from_one_that_is_wrong(
    value: Any, protocol: int, data: st.DataObject
) -> None:
    """Shows that any beginning of a pickle is cut, and says where the bytes end."""
    whole = pickle.dumps(value, protocol)
    length = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(Cut, match=rf"its bytes end at {length + 10:,}"):
        read(whole[:length], base=10)


def test_lengths_that_lie_are_seen_before_anything_is_allocated() -> None:
    """Shows it for each opcode with a length, and for frames."""
    for opcode, form in (
        ("T", "<i"), ("B", "<I"), ("X", "<I"), ("\x8b", "<i"), ("\x8d", "<Q"), ("\x8e", "<Q"),
        ("\x96", "<Q"), ("\x95", "<Q"),
    ):  # fmt: skip
        length = 1 << 28
        with pytest.raises(Cut):
            read(opcode.encode("latin-1") + struct.pack(form, length) + b"x.")
    with pytest.raises(FormatError, match="a string or number of"):
        read(b"\x8e" + struct.pack("<Q", 1 << 62) + b"x.")


SMALL = Limits(nbytes=10_000, room=400_000, opcodes=5000, memo=100, stack=200, nesting=20, text=300)
BEYOND: dict[str, tuple[bytes, str]] = {
    "bytes": (b"C\xff" + bytes(255) + (b"0C\xff" + bytes(255)) * 40 + b".", "10,000 bytes"),
    "opcodes": (b"N0" * 3000 + b"N.", "5,000 opcodes"),
    "sets": (b"\x8f0" * 900 + b"N.", "400,000 bytes of memory"),
    "dicts": (b"}0" * 1800 + b"N.", "400,000 bytes of memory"),
    "items of sets": (b"\x8f" + (b"(" + b"K\1" * 100 + b"\x90") * 20 + b".", "400,000 bytes"),
    "wide letters": ((b"X\x2c\1\0\0" + b"x" * 300 + b"0") * 300 + b"N.", "10,000 bytes|400,000"),
    "memo": (b"N" + b"\x94" * 101 + b".", "100 entries in its memo"),
    "stack": (b"N" * 201 + b".", "200 values on its stack"),
    "stack under marks": (b"N(" * 15 + b"N" * 190 + b".", "200 values on its stack"),
    "nesting": (b"N(" * 21 + b"N.", "20 marks within marks"),
    "text": (b"X" + struct.pack("<I", 301) + b"x" * 301 + b".", "301 bytes"),
    "a line": (b"V" + b"x" * 301 + b"\n.", "a line of more than 300 bytes"),
}


@pytest.mark.parametrize("name", BEYOND)
def test_each_limit_is_held_and_named(name: str) -> None:
    """Shows it, and that the limits that are set of themselves allow as much."""
    data, says = BEYOND[name]
    with pytest.raises(FormatError, match=says):
        read(data, limits=SMALL)
    read(data)


@given(st.binary(max_size=200))
def test_bytes_that_nobody_pickled_raise_only_what_is_told(data: bytes) -> None:
    """Shows it for bytes of all kinds."""
    feed(data)


CODES = b"".join(opcode.code.encode("latin-1") for opcode in pickletools.opcodes)
BITS = st.sampled_from(
    [bytes([code]) for code in CODES] + [b"\n", b"\0\0\0", b"1\n", b"ca\nb\n", b"cbuiltins\nset\n"]
)


@given(st.lists(BITS, max_size=60).map(b"".join))
def test_opcodes_in_any_order_raise_only_what_is_told(data: bytes) -> None:
    """Shows it for rows of opcodes, of which some do something."""
    feed(data + b".")


@given(VALUES, st.sampled_from(PROTOCOLS), st.data())
def test_changed_pickles_raise_only_what_is_told(
    value: Any, protocol: int, data: st.DataObject
) -> None:
    """Shows it for pickles in which a few bytes were changed, taken out, or put in."""
    whole = bytearray(pickle.dumps([value, Plain(), collections.OrderedDict(a=value)], protocol))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole)))
        whole[at : at + data.draw(st.integers(0, 2))] = data.draw(BITS | st.binary(max_size=3))
    feed(bytes(whole))


def feed(data: bytes) -> None:
    """Read, make a tree, and walk it; only a FormatError may come of that."""
    try:
        made = torch_tree.tree(read(data).value).root
        for _ in tree.leaves(made):
            pass
    except FormatError:
        pass


# What would take for ever


def test_a_tuple_that_doubles_is_read_and_walked_no_further_than_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shows it for two to the power of a thousand places, in tuples, lists and dicts."""
    monkeypatch.setattr(tree, "PLACES", 5000)
    for body in (
        b")" + b"2\x86" * 100,
        b"]p0\n" + b"(g0\ng0\nlp0\n" * 100,
        b"}p0\n" + b"(K\1g0\nK\2g0\ndp0\n" * 100,
    ):
        made = torch_tree.tree(read(body + b".").value).root
        with pytest.raises(FormatError, match="5,000 places"):
            for _ in tree.leaves(made):
                pass


def test_boxes_in_boxes_are_read_and_followed_no_further_than_allowed() -> None:
    """Shows it for a hundred thousand levels; what was read is let go, too."""
    levels = 100_000
    deep = read(b")" + b"\x85" * levels + b".").value
    with pytest.raises(FormatError, match="within each other"):
        torch_tree.tree(deep)
    del deep
    for opening, closing in ((b"]", b"a"), (b"}K\1", b"s")):
        made = torch_tree.tree(read(opening * levels + b"N" + closing * levels + b".").value).root
        with pytest.raises(FormatError, match="levels"):
            for _ in tree.leaves(made):
                pass
        del made
    chain = b"ca\nb\np0\n0)" + b"p1\n0g0\ng1\nR\x85" * 1000 + b"."
    with pytest.raises(FormatError, match="within each other"):
        torch_tree.tree(read(chain).value)


def test_what_was_read_prints_in_a_line() -> None:
    """Shows that no node prints what may be of any size; a pickle's own containers are Python's."""
    found = read(b"(ca\nb\n)RK\1Q}]Nst.").value
    shown = repr(found)
    assert shown == "(<call of a.b>, <persistent>, {<key>: None})"
    assert repr(read(b"K\1)R.").value) == "<call>"
