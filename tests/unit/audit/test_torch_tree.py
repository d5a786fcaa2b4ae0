"""Shows that what torch and NumPy saved becomes a tree of plain things, with values bit for bit."""

from __future__ import annotations

import argparse
import enum
import itertools
import pickle
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, init_from_local_shards
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torchkit import alike, content, raw, same, save, taken

from handfast.audit.extent import Extent, Reader
from handfast.audit.inert import Call, Global, Key, Persistent
from handfast.audit.pickles import read
from handfast.audit.torch_tree import tree
from handfast.audit.tree import Object, leaves, values
from handfast.errors import FormatError

OLD = {"_use_new_zipfile_serialization": False}


@pytest.fixture
def through(tmp_path: Path, reader: Reader) -> Callable[..., Any]:
    """Save a value with torch, and read it: what it becomes."""

    numbers = itertools.count()

    def read_back(value: object, **options: Any) -> Any:
        return taken(reader, save(tmp_path / f"{next(numbers)}.pt", value, **options)).root

    return read_back


def plain(value: object, protocol: int = 4) -> Any:
    """What a value becomes that is pickled without torch."""
    return tree(read(pickle.dumps(value, protocol)).value).root


# Tensors

DTYPES = sorted(
    {str(kind).removeprefix("torch.") for kind in vars(torch).values()
     if isinstance(kind, torch.dtype)} - {"quint4x2", "quint2x4"}
)  # fmt: skip
UNSAVED = {f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "legacy"])
def test_tensors_of_every_dtype(dtype: str, options: Any, through: Callable[..., Any]) -> None:
    """Shows it for all that torch can save, of bytes that all differ."""
    kind = getattr(torch, dtype)
    tensor = torch.arange(6 * kind.itemsize, dtype=torch.uint8).view(kind)
    if dtype in UNSAVED:
        with pytest.raises(KeyError, match="is not recognized"):
            through(tensor, **options)
    else:
        assert same(through(tensor, **options), tensor)


SHAPES: dict[str, Callable[[], torch.Tensor]] = {
    "a number": lambda: torch.tensor(1.5),
    "empty": lambda: torch.empty(0),
    "empty with dimensions": lambda: torch.empty(3, 0, 5),
    "transposed": lambda: torch.arange(12.0).reshape(3, 4).t(),
    "permuted": lambda: torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
    "channels last": lambda: torch.zeros(1, 4, 3, 4).to(memory_format=torch.channels_last),
    "a column": lambda: torch.arange(12.0).reshape(3, 4)[:, 1],
    "every other": lambda: torch.arange(12.0)[1::2],
    "expanded": lambda: torch.arange(3.0).reshape(3, 1).expand(3, 4),
    "overlapping": lambda: torch.arange(6.0).unfold(0, 3, 1),
    "a view of a large storage": lambda: torch.arange(10_000.0)[7000:7005],
    "a diagonal": lambda: torch.arange(16.0).reshape(4, 4).diagonal(),
    "a real part": lambda: torch.arange(6.0).to(torch.complex64).real,
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "legacy"])
def test_tensors_of_every_shape(name: str, options: Any, through: Callable[..., Any]) -> None:
    """Shows it in both formats; storages are stored whole, whatever of them a tensor shows."""
    tensor = SHAPES[name]()
    found = through(tensor, **options)
    assert same(found, tensor)
    assert found.stride == tensor.stride()
    assert found.offset == tensor.storage_offset()


def test_tied_tensors_are_equal_and_copies_are_not(through: Callable[..., Any]) -> None:
    """Shows it for two names of a tensor, another view that is the same, and others."""
    weight = torch.arange(12.0).reshape(3, 4)
    found = through({"a": weight, "b": weight, "view": weight.view(12).view(3, 4),
                     "t": weight.t(), "row": weight[0], "copy": weight.clone()})  # fmt: skip
    assert found["a"] is found["b"]
    assert found["a"] == found["view"]
    assert len({*found.values()}) == 4
    assert found["t"].source is found["row"].source is not found["copy"].source


def test_parameters_buffers_and_attributes(through: Callable[..., Any]) -> None:
    """Shows that a parameter is its values; one with attributes an object that keeps them."""
    weight = torch.nn.Parameter(torch.arange(3.0))
    marked = torch.nn.Parameter(torch.arange(4.0))
    marked.partition_dim = 1
    noted = torch.arange(2)
    noted.note = "x"
    for options in ({}, OLD):
        found = through([weight, marked, torch.nn.Buffer(torch.arange(5)), noted], **options)
        assert same(found[0], weight)
        assert [part.type for part in found[1:]] == [
            "torch.nn.parameter.Parameter", "torch.Tensor", "torch.Tensor"
        ]  # fmt: skip
        assert found[1].fields["partition_dim"] == 1
        assert found[3].fields["note"] == "x"
        for part, tensor in zip(found, (weight, marked, torch.arange(5), noted), strict=True):
            assert same(values(part), tensor)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")  # torch's own word
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # the same
def test_tensors_that_are_more_than_a_storage(through: Callable[..., Any]) -> None:
    """Shows the parts of sparse, nested and meta tensors, and of values that are not as stored."""
    eye = torch.eye(3)
    found = through(eye.to_sparse())
    assert (found.type, found.fields["shape"]) == ("torch.sparse_coo", (3, 3))
    assert same(found.fields["indices"], torch.tensor([[0, 1, 2], [0, 1, 2]]))
    assert same(found.fields["values"], torch.ones(3))
    found = through(eye.to_sparse_csr())
    assert (found.type, found.fields["shape"]) == ("torch.sparse_csr", (3, 3))
    assert same(found.fields["compressed"], torch.arange(4))
    assert same(found.fields["plain"], torch.arange(3))
    found = through(torch.nested.nested_tensor([torch.arange(2.0), torch.arange(3.0)]))
    assert same(found.fields["values"], torch.tensor([0.0, 1, 0, 1, 2]))
    assert same(found.fields["sizes"], torch.tensor([[2], [3]]))
    found = through(torch.empty(2, 3, device="meta"))
    assert found.fields == {"dtype": "torch.float32", "shape": (2, 3), "device": "meta"}
    assert values(found) is None
    number = torch.tensor([1 + 2j])
    found = through(number.conj())
    assert found.fields["metadata"] == {"conj": True}
    assert same(found.fields["stored"], number)
    assert values(found) is None


@pytest.mark.filterwarnings("ignore:.*quantiz")  # torch's own word that they are deprecated
def test_quantized_tensors(through: Callable[..., Any]) -> None:
    """Shows the integers and what turns them into numbers; what shares bytes is kept apart."""
    tensor = torch.quantize_per_tensor(torch.arange(4.0), 0.5, 2, torch.qint8)
    found = through(tensor)
    assert content(values(found)) == raw(tensor.int_repr())
    assert found.fields["quantizer"] == (Global("torch", "per_tensor_affine"), 0.5, 2)
    tensor = torch.quantize_per_channel(
        torch.arange(4.0).reshape(2, 2), torch.tensor([0.5, 1]), torch.tensor([0, 1]), 0,
        torch.quint8,
    )  # fmt: skip
    _, scales, _, axis = through(tensor).fields["quantizer"]
    assert (content(scales), axis) == (raw(tensor.q_per_channel_scales()), 0)
    narrow = torch.quantize_per_channel(
        torch.arange(4.0).reshape(2, 2), torch.tensor([0.5, 1]), torch.tensor([0.0, 1]), 0,
        torch.quint4x2,
    )  # fmt: skip
    found = through([narrow, torch.arange(3)])
    assert found[0].type == "torch._utils._rebuild_qtensor"
    assert type(found[0].args[0]) is Persistent
    assert same(found[1], torch.arange(3))


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:Please use DTensor instead")  # torch's own word
def test_tensors_that_are_spread_over_ranks(alone: None, through: Callable[..., Any]) -> None:
    """Shows the local values, the whole's shape and the placement of both kinds."""
    mesh = init_device_mesh("cpu", (1,))
    found = through(distribute_tensor(torch.arange(12.0).reshape(3, 4), mesh, [Replicate()]))
    assert found.type == "torch.distributed.tensor.DTensor"
    assert same(values(found), torch.arange(12.0).reshape(3, 4))
    assert found.fields["shape"] == (3, 4)
    (placement,) = found.fields["_spec"].fields["placements"]
    assert placement.type.endswith(".Replicate")
    shard = Shard(torch.arange(4.0), ShardMetadata([0], [4], "rank:0/cpu"))
    found = through(init_from_local_shards([shard], [4]))
    (local,) = found.fields["_local_shards"]
    assert same(local.fields["tensor"], torch.arange(4.0))
    assert local.fields["metadata"].fields["shard_offsets"] == [0]
    assert found.fields["_metadata"].fields["size"] == (4,)
    assert found.fields["shape"] == (4,)


def test_storages_that_were_saved_by_themselves(through: Callable[..., Any]) -> None:
    """Shows that they are values of one dimension, tied to the tensors that show them."""
    tensor = torch.arange(6, dtype=torch.int16)
    found = through({"storage": tensor.untyped_storage()})
    assert same(
        found["storage"], torch.tensor([0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0], dtype=torch.uint8)
    )
    found = through([tensor, tensor[2:4]], **OLD)
    assert same(found[1], tensor[2:4])


# Trainings


def trained(make: Callable[[Any], Any]) -> Any:
    """A model and an optimizer after two steps."""
    torch.manual_seed(2)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    optimizer = make(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(3, 6)).square().sum().backward()
        optimizer.step()
    return model, optimizer


class Lion(torch.optim.Optimizer):
    """The sign of an interpolated momentum, as Lion has it."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-4, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self) -> None:
        """One update."""
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                state.setdefault("exp_avg", torch.zeros_like(weight))
                weight.sub_(group["lr"] * state["exp_avg"].lerp(weight.grad, 0.1).sign())
                state["exp_avg"].lerp_(weight.grad, 0.01)


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "AdamW": lambda weights: torch.optim.AdamW(weights, amsgrad=True),
    "Adafactor": torch.optim.Adafactor,
    "SGD": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9),
    "Lion": Lion,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "legacy"])
def test_states_of_optimizers_and_schedulers(
    name: str, options: Any, tmp_path: Path, reader: Reader
) -> None:
    """Shows that integers as keys, numbers as tensors, and counters come as torch loads them."""
    model, optimizer = trained(OPTIMIZERS[name])
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "scheduler": scheduler.state_dict()}  # fmt: skip
    path = save(tmp_path / "a.pt", state, **options)
    assert alike(taken(reader, path).root, torch.load(path, weights_only=False))


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")  # by torch, of the old format
def test_a_module_and_an_optimizer_that_were_saved_whole(tmp_path: Path, reader: Reader) -> None:
    """Shows that their attributes are read by name, though their classes are never imported."""
    model, optimizer = trained(OPTIMIZERS["Lion"])
    for options in ({}, OLD):
        found = taken(reader, save(tmp_path / "a.pt", [model, optimizer], **options)).root
        assert found[0].type == "torch.nn.modules.container.Sequential"
        layer = found[0].fields["_modules"]["2"]
        assert layer.type == "torch.nn.modules.linear.Linear"
        assert layer.fields["in_features"] == 5
        weight = layer.fields["_parameters"]["weight"]
        assert same(weight, model[2].weight)
        assert found[1].type == f"{__name__}.Lion"
        (group,) = found[1].fields["param_groups"]
        assert group["params"][2] == weight
        key = next(key for key in found[1].fields["state"] if key.value == weight)
        assert type(key) is Key
        moments = found[1].fields["state"][key]["exp_avg"]
        assert same(moments, optimizer.state[model[2].weight]["exp_avg"])
        reader = Reader()


# Collections and objects


class Colour(enum.Enum):
    """An enum."""

    RED = 1


@dataclass
class Config:
    """A dataclass."""

    lr: float
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Slotted:
    """One with slots, whose state is a list."""

    lr: float


class Both:
    """Attributes in slots, and others."""

    __slots__ = ("__dict__", "one")


class Pair(NamedTuple):
    """A tuple with names."""

    left: int
    right: tuple[int]


class Row(list[int]):
    """A list of a class of its own."""


class Names(dict[str, int]):
    """A dict of a class of its own."""


@pytest.mark.parametrize("protocol", range(6))
def test_collections_are_plain(protocol: int) -> None:
    """Shows it for those of the standard library, and torch's, at each protocol."""
    counted = Counter({"a": 2})
    assert plain(OrderedDict([("b", 1), ("a", {"c": 2})]), protocol) == {"b": 1, "a": {"c": 2}}
    assert list(plain(OrderedDict([("b", 1), ("a", 2)]), protocol)) == ["b", "a"]
    assert plain([OrderedDict(), defaultdict(list), deque(), Counter()], protocol) == [
        {},
        {},
        [],
        {},
    ]
    assert plain(defaultdict(list, {"a": [1]}), protocol) == {"a": [1]}
    assert plain([counted, counted], protocol) == [{"a": 2}, {"a": 2}]
    assert plain(deque([1, (2,)], 5), protocol) == [1, (2,)]
    assert plain([{1, 2}, frozenset({(1, 2)})], protocol) == [{1, 2}, frozenset({(1, 2)})]
    assert plain(torch.Size((2, 3)), protocol) == (2, 3)
    assert plain([torch.device("cuda", 1), torch.device("cpu")], protocol) == ["cuda:1", "cpu"]
    assert plain([torch.bfloat16, torch.sparse_coo], protocol) == [
        "torch.bfloat16", "torch.sparse_coo"
    ]  # fmt: skip
    assert plain(Config, protocol) == Global(__name__, "Config")


@pytest.mark.parametrize("protocol", range(2, 6))
def test_objects_have_their_attributes_by_name(protocol: int) -> None:
    """Shows it for the usual ways to make a class of settings."""
    found = plain(argparse.Namespace(lr=0.1, on=True), protocol)
    assert (found.type, found.fields) == ("argparse.Namespace", {"lr": 0.1, "on": True})
    found = plain(types.SimpleNamespace(a=1), protocol)
    assert (found.type, found.fields) == ("types.SimpleNamespace", {"a": 1})
    found = plain(Config(0.1, ("a",)), protocol)
    assert (found.type, found.fields) == (f"{__name__}.Config", {"lr": 0.1, "names": ("a",)})
    both = Both()
    both.one, both.two = 1, 2
    assert dict(plain(both, protocol).fields) == {"one": 1, "two": 2}
    found = plain(Pair(1, (2,)), protocol)
    assert (found.type, found.args) == (f"{__name__}.Pair", (1, (2,)))
    found = plain(Names(a=1), protocol)
    assert (found.type, found.pairs) == (f"{__name__}.Names", {"a": 1})
    found = plain(Row([1, 2]), protocol)
    assert (found.type, found.items) == (f"{__name__}.Row", [1, 2])
    found = plain(Slotted(0.1), protocol)
    assert (found.type, found.state) == (f"{__name__}.Slotted", [0.1])
    found = plain(Colour.RED, protocol)
    assert found == Global(__name__, "Colour.RED") or found.args == (1,)


@pytest.mark.parametrize("protocol", [0, 1])
def test_objects_of_the_oldest_protocols_have_them_as_well(protocol: int) -> None:
    """Shows it where copyreg was to make the object."""
    found = plain(Config(0.1, ("a",)), protocol)
    assert (found.type, found.args, found.fields["lr"]) == (f"{__name__}.Config", (), 0.1)
    found = plain(Names(a=1), protocol)
    assert (found.type, found.args) == (f"{__name__}.Names", ({"a": 1},))


def test_what_contains_itself_does_so_in_the_tree() -> None:
    """Shows it for an object, its state, and a tuple on the way."""
    config = Config(0.1, ())
    config.names = ({"back": config},)
    found = plain(config)
    assert found.fields["names"][0]["back"] is found
    assert [path for path, _ in leaves(found)] == ["", "lr", "names[0]/back"]


def test_attributes_of_a_class_are_named() -> None:
    """Shows it for what newer Pythons pickle enums by."""
    getattr_ = Call(Global("builtins", "getattr"), (Global("a", "B"), "RED"))
    assert tree(getattr_).root == Global("a", "B.RED")
    strange = tree(Call(Global("builtins", "getattr"), (1, "RED"))).root
    assert (strange.type, strange.args) == ("builtins.getattr", (1, "RED"))


def test_keys_become_what_they_stand_for_or_are_kept_apart() -> None:
    """Shows it for NumPy's numbers, devices, tuples, tensors and lists as keys."""
    found = plain({np.int64(3): 1, torch.device("cpu"): 2, (1, "a"): 3, 2 + 1j: 4, None: 5})
    assert found == {3: 1, "cpu": 2, (1, "a"): 3, 2 + 1j: 4, None: 5}
    ordered = Call(Global("collections", "OrderedDict"), (), pairs={"a": 1})
    (key, other), *_ = tree({ordered: 1, (1, Global("torch", "float32")): 2}).root, None
    assert [type(key), type(other)] == [Key, Key]
    assert key.value == {"a": 1}
    assert other.value == (1, "torch.float32")


# NumPy

KINDS = ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
         "float16", "float32", "float64", "complex64", "complex128"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@given(protocol=st.integers(0, 5), order=st.sampled_from("CFK"), swapped=st.booleans())
def test_arrays_are_values(kind: str, protocol: int, order: str, swapped: bool) -> None:
    """Shows it for each kind, order of dimensions and bytes, and protocol."""
    array = np.arange(24).astype(kind).reshape(2, 3, 4)
    array = {"C": array, "F": np.asfortranarray(array), "K": array.transpose(1, 0, 2)}[order]
    if swapped:
        array = array.astype(array.dtype.newbyteorder(">"))
    found = plain(array, protocol)
    assert (found.dtype, found.shape) == (kind, array.shape)
    assert content(found) == np.ascontiguousarray(array).astype(kind).tobytes()
    assert plain(array.dtype, protocol) == f"numpy.{kind}"
    scalar = array[1, 2, 1] if array.shape[1] > 2 else array[1, 1, 1]
    found = plain(scalar, protocol)
    assert type(found) in (bool, int, float, complex)
    assert found == scalar


def test_arrays_of_other_kinds_are_objects() -> None:
    """Shows it for text, dates, objects, structures, and buffers that are not in the pickle."""
    for array in (np.array(["a"]), np.array([1], "M8[s]"), np.array([[], 1], object),
                  np.zeros(2, [("a", "f4")])):  # fmt: skip
        for protocol in (2, 5):
            found = plain(array, protocol)
            assert type(found) is Object
            assert found.type.partition(".")[0] == "numpy"
    data = pickle.dumps(np.arange(3), 5, buffer_callback=lambda _: None)
    assert type(tree(read(data).value).root) is Object
    found = plain(np.arange(3).astype(ml_dtypes.bfloat16))
    assert (found.dtype, content(found)) == ("bfloat16", raw(torch.arange(3).to(torch.bfloat16)))
    assert type(plain(np.datetime64(1, "s"))) is Object


def test_states_of_random_numbers_are_read() -> None:
    """Shows it for NumPy's generators, old and new, whose counters have 128 bits."""
    name, key, *_ = plain(np.random.RandomState(1).get_state())
    assert (name, key.shape) == ("MT19937", (624,))
    state = np.random.default_rng(1).bit_generator.state
    assert plain(state) == state


def test_calls_of_known_names_with_other_arguments_are_objects() -> None:
    """Shows it for what only looks like NumPy's, torch's and the library's own."""
    dtype = Call(Global("numpy", "dtype"), ("f4", False, True), state=(3, "<"))
    core = "numpy._core.multiarray"
    sparse = Call(Global("torch.serialization", "_get_layout"), ("x",))
    for module, name, args in (
        ("collections", "OrderedDict", ([["a", 1]],)), ("collections", "deque", (5,)),
        ("torch", "device", (1,)), ("torch._tensor", "_rebuild_from_type_v2", (1, 2, 3, 4)),
        ("torch._utils", "_rebuild_sparse_tensor", (1, (2,))),
        ("torch._utils", "_rebuild_wrapper_subclass", ()),
        ("torch.serialization", "_get_layout", ()),
        ("torch._utils", "_rebuild_sparse_tensor", (sparse,)), ("numpy", "dtype", ("O",)),
        (core, "scalar", (dtype, b"123")), (core, "scalar", (dtype,)), (core, "scalar", (1, b"1")),
        (core, "scalar", (Call(Global("numpy", "dtype"), ()), b"")), (core, "other", ()),
        (core, "_reconstruct", ()), (core, "_frombuffer", (b"123", dtype, (1,), "C")),
        (core, "_frombuffer", (b"1234", dtype, (1,), "K", (3,))), (core, "_frombuffer", (b"1234",)),
        (core, "_frombuffer", (b"1234", dtype, (1.0,), "C")),
    ):  # fmt: skip
        made = tree(Call(Global(module, name), args)).root
        if name != "deque":
            assert type(made) is Object
            assert made.type == f"{module}.{name}"
    assert tree(Call(Global("collections", "deque"), (5,))).root == []
    made = tree(Call(Global("a", "b"), (), {"one": [dtype]}, state=({"two": 2}, {"three": 3}))).root
    assert dict(made.fields) == {"one": ["numpy.float32"], "two": 2, "three": 3}
    assert tree(Call(1, ())).root.type == "the result of a call"


# What is wrong

WRONG: dict[str, Any] = {
    "a shape that is none": ("x", (1,)),
    "a shape of no integers": ((1.0,), (1,)),
    "a stride of bools": ((1,), (True,)),
}


class OneStorage:
    """A file with one storage, of no bytes."""

    def find(self, key: str, dtype: str, numel: int) -> Any:
        """See the port."""
        from handfast.audit.extent import Held

        return Held(bytes(numel), "held"), False


def storage(numel: Any = 4, kind: str = "ByteStorage", *view: Any) -> Persistent:
    """A storage as a pickle has it."""
    return Persistent(("storage", Global("torch", kind), "0", "cpu", numel, *view))


def rebuilt(*args: Any, function: str = "_rebuild_tensor_v2") -> Any:
    """What a call of torch's becomes."""
    return tree(Call(Global("torch._utils", function), args), OneStorage(), name="x.pt").root


@pytest.mark.parametrize("name", WRONG)
def test_arguments_that_torch_never_gives_are_refused(name: str) -> None:
    """Shows that the file is named; torch itself would have raised."""
    shape, stride = WRONG[name]
    with pytest.raises(FormatError, match=r"x\.pt: a shape, a stride or an offset that is no row"):
        rebuilt(storage(), 0, shape, stride, False, {})
    with pytest.raises(FormatError, match="no row of integers"):
        rebuilt(storage(), None, (1,), (1,), False, {})


def test_storages_that_torch_never_names_are_refused() -> None:
    """Shows it for sizes and views; one of a class that is not known stays as it is."""
    for wrong in (storage(-1), storage(1 << 63)):
        with pytest.raises(FormatError, match="a storage of a size that none has"):
            rebuilt(wrong, 0, (1,), (1,))
    for view in (("1", 3, 2), ("1", -1, 2), ("1", 0, -1), ("1", "x", 1)):
        with pytest.raises(FormatError, match="a view that is not inside of its storage"):
            rebuilt(storage(4, "ByteStorage", view), 0, (1,), (1,))
    found = rebuilt(storage(4, "ByteStorage", ("1", 2, 2)), 1, (1,), (1,))
    assert found.offset == 3
    with pytest.raises(FormatError, match="a tensor of a dtype that is not known"):
        rebuilt(storage(), 0, (1,), (1,), False, {}, 5, function="_rebuild_tensor_v3")
    assert rebuilt(storage(4, "OtherStorage"), 0, (1,), (1,)).type.endswith("_rebuild_tensor_v2")
    assert type(tree(storage(4, "OtherStorage"), OneStorage()).root) is Persistent
    assert type(tree(storage()).root) is Persistent


@given(
    st.sampled_from(
        ["_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter",
         "_rebuild_parameter_with_state", "_rebuild_sparse_tensor", "_rebuild_qtensor",
         "_rebuild_nested_tensor", "_rebuild_wrapper_subclass", "_rebuild_meta_tensor_no_storage",
         "_rebuild_device_tensor_from_numpy"]
    ),
    st.lists(
        st.sampled_from([None, 1, "x", (1,), (), [2], (1, 2), -1, 1 << 70, {}, {"conj": True},
                         Global("torch", "float32"), Global("a", "b"), storage(),
                         storage(4, "FloatStorage"),
                         Call(Global("torch", "Size"), ((2,),)), Call(Global("a", "b"), ())]),
        max_size=8,
    ),
)  # fmt: skip
def test_any_arguments_raise_only_what_is_told(function: str, args: list[Any]) -> None:
    """Shows that what torch would not have written becomes an object, or a FormatError."""
    try:
        made = tree(Call(Global("torch._utils", function), tuple(args)), OneStorage())
    except FormatError:
        return
    assert made.root is None or type(made.root) in (Object, Extent, int, str, tuple, list, dict,
                                                    Global)  # fmt: skip
    for _ in leaves(made.root):
        pass


def test_every_function_of_torch_that_rebuilds_is_known() -> None:
    """Shows that what torch itself allows in a file becomes values, or objects of their own."""
    from torch._weights_only_unpickler import _tensor_rebuild_functions

    from handfast.audit.torch_tree import _SPECIAL

    named = {Global(each.__module__, each.__name__) for each in _tensor_rebuild_functions()}
    assert named - set(_SPECIAL) == set()
