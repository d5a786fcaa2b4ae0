"""Shows that live tensors which share memory are never filled with what was saved apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from statekit import Snapshot, train
from torch import Tensor, nn

from handfast.torch.apply import apply
from handfast.torch.memory import Memory

SPANS = st.tuples(st.integers(0, 60), st.integers(1, 12))


@given(st.lists(SPANS, max_size=12))
def test_bytes_are_taken_once(spans: list[tuple[int, int]]) -> None:
    """Shows, against plain sets of bytes, whom a claim finds to have some of its own."""
    memory, held = Memory(), torch.zeros(80, dtype=torch.uint8)
    taken: dict[str, set[int]] = {}
    for number, (first, length) in enumerate(spans):
        bytes_ = set(range(first, first + length))
        found = memory.claim(str(number), held[first : first + length])
        assert {path for path, _ in found} == {p for p, b in taken.items() if b & bytes_}
        taken[str(number)] = bytes_


@given(st.lists(SPANS, max_size=12), st.data())
def test_what_is_known_before_is_found_as_if_it_were_not(
    spans: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Shows it of tensors that are held twice, that are strangers, and that moved in between."""
    held = torch.zeros(160, dtype=torch.uint8)
    parts = [held[first : first + length] for first, length in spans]
    known = [part for part in parts if data.draw(st.booleans())]
    memory, plain = Memory(known), Memory()
    for number, part in enumerate(data.draw(st.permutations(parts + parts[:2]))):
        if data.draw(st.booleans()):
            memory.hold(str(number), part)
            plain.hold(str(number), part)
            continue
        if data.draw(st.integers(0, 5)) == 0:
            part.set_(held[part.storage_offset() + 40 :][: len(part)])
        found, wanted = (m.claim(str(number), part) for m in (memory, plain))
        assert sorted(path for path, _ in found) == sorted(path for path, _ in wanted)


def test_gaps_and_other_storages() -> None:
    """A strided tensor takes its gaps, too, an empty one nothing, and each storage is its own."""
    held = torch.zeros(10)
    memory = Memory()
    assert not memory.claim("a", held[::4])
    assert [path for path, _ in memory.claim("b", held[1:2])] == ["a"]
    assert not memory.claim("c", held[9:])
    assert not memory.claim("d", torch.zeros(10))
    assert not memory.claim("e", held[:0])
    assert not memory.claim("f", held[2:2])


def stepped(**entry: Any) -> tuple[nn.Linear, torch.optim.Optimizer]:
    """A model and an optimizer with something else in its state."""
    model = nn.Linear(2, 1, bias=False)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    opt.state[model.weight] = entry
    return model, opt


def test_state_that_lies_on_a_parameter_is_made_anew() -> None:
    """It was an average of its own when it was saved; copied in place it replaced the weights."""
    model, opt = stepped(avg=torch.full((1, 2), 7.0))
    weight = model.weight.detach().clone()
    other, live = stepped()
    live.state[other.weight]["avg"] = other.weight.data
    Snapshot({"m": model, "o": opt}).restore({"m": other, "o": live})
    assert torch.equal(other.weight, weight)
    assert live.state[other.weight]["avg"].tolist() == [[7.0, 7.0]]


def test_state_that_lies_on_a_buffer_or_on_other_state_is_made_anew() -> None:
    """Of whatever else is restored: a buffer, an entry beside it, another optimizer's."""
    model = nn.BatchNorm1d(2)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    opt.state[model.weight] = {"a": torch.ones(2), "b": torch.full((2,), 2.0)}
    opt.state[model.bias] = {"a": torch.full((2,), 3.0)}
    saved = Snapshot({"m": model, "o": opt})
    other = nn.BatchNorm1d(2)
    live = torch.optim.SGD(other.parameters(), lr=0.1)
    one = torch.zeros(2)
    live.state[other.weight] = {"a": one, "b": one}
    live.state[other.bias] = {"a": other.running_mean}
    saved.restore({"m": other, "o": live})
    entries = [live.state[p][k].tolist() for p, k in ((other.weight, "a"), (other.weight, "b"),
               (other.bias, "a"))]  # fmt: skip
    assert entries == [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]
    assert other.running_mean is not None
    assert other.running_mean.tolist() == [0.0, 0.0]


def test_what_was_tied_to_a_parameter_is_tied_again() -> None:
    """Whether it is there already or not: one step would move both, and so it does again."""
    model, opt = stepped()
    opt.state[model.weight]["seen"] = model.weight.data
    saved = Snapshot({"m": model, "o": opt})
    for made in (True, False):
        other, live = stepped()
        if made:
            live.state[other.weight]["seen"] = other.weight.data
        saved.restore({"m": other, "o": live})
        seen = live.state[other.weight]["seen"]
        assert seen.data_ptr() == other.weight.data_ptr()
        assert not seen.requires_grad


def test_what_was_a_view_of_something_else_stays_one() -> None:
    """A row of a parameter, overlapping parts of a buffer: their bytes agree, then and now."""

    def viewed(value: float) -> tuple[nn.Linear, torch.optim.Optimizer]:
        model, opt = stepped()
        flat = torch.arange(4.0) + value
        opt.state[model.weight] = {"row": model.weight.data[0], "a": flat[:3], "b": flat[1:]}
        return model, opt

    (model, opt), (other, live) = viewed(0.0), viewed(5.0)
    Snapshot({"m": model, "o": opt}).restore({"m": other, "o": live})
    entry = live.state[other.weight]
    assert entry["row"].data_ptr() == other.weight.data_ptr()
    assert entry["a"][1:].data_ptr() == entry["b"].data_ptr()
    assert torch.equal(other.weight, model.weight)
    assert (entry["a"].tolist(), entry["b"].tolist()) == ([0.0, 1.0, 2.0], [1.0, 2.0, 3.0])


def test_what_was_one_tensor_is_one_again_wherever_it_stood() -> None:
    """In an entry, in a list beside it, under a key of no parameter, and as a hyperparameter."""
    model, opt = stepped()
    one = torch.ones(3)
    opt.state[model.weight] |= {"last": one, "history": [torch.zeros(3), one]}
    opt.state["all"] = {"one": one}  # torch allows any key
    opt.param_groups[0]["scale"] = one
    other, live = stepped()
    Snapshot({"m": model, "o": opt}).restore({"m": other, "o": live})
    entry, there = live.state[other.weight], live.param_groups[0]["scale"]
    assert entry["last"] is entry["history"][1] is there
    assert live.state["all"]["one"] is there  # torch allows any key
    assert entry["history"][0].tolist() == [0.0] * 3


def groups(*rates: Tensor) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    """A group a layer, each with its rate as a tensor."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    layers = [{"params": layer.parameters()} for layer in model]
    opt = torch.optim.SGD(layers, lr=rates[0])
    for group, rate in zip(opt.param_groups, rates, strict=True):
        group["lr"] = rate
    return model, opt


def test_rates_that_were_two_tensors_are_two_again() -> None:
    """A fresh optimizer has one for all groups; filled in place it kept the last one's value."""
    model, opt = groups(torch.tensor(0.5), torch.tensor(0.25))
    rate = torch.tensor(0.5)
    other, live = groups(rate, rate)
    Snapshot({"m": model, "o": opt}).restore({"m": other, "o": live})
    assert [group["lr"].item() for group in live.param_groups] == [0.5, 0.25]
    assert live.param_groups[0]["lr"] is rate  # what holds it sees the value


def test_a_rate_that_was_one_tensor_is_one_again() -> None:
    """Whoever fills it fills all groups', as before."""
    rate = torch.tensor(0.5)
    model, opt = groups(rate, rate)
    other, live = groups(torch.tensor(0.1), torch.tensor(0.2))
    Snapshot({"m": model, "o": opt}).restore({"m": other, "o": live})
    assert live.param_groups[0]["lr"] is live.param_groups[1]["lr"]


def test_a_rate_comes_back_with_its_dtype() -> None:
    """A tensor of another dtype is none that could hold it."""
    model, opt = groups(*[torch.tensor(0.1, dtype=torch.float64)] * 2)
    other, live = groups(*[torch.tensor(0.1)] * 2)
    Snapshot({"m": model, "o": opt}).restore({"m": other, "o": live})
    assert live.param_groups[0]["lr"].dtype == torch.float64


class Flat(nn.Module):
    """A flat buffer, and a head that is a part of it, or its own."""

    def __init__(self, *, apart: bool, at: int = 0, turned: bool = False) -> None:
        super().__init__()
        self.register_buffer("flat", torch.arange(6.0).view(2, 3))
        part = self.flat[at] if not turned else self.flat.t()[at]
        self.register_buffer("head", part.clone() + 1 if apart else part)


def test_overlapping_tensors_are_refused_where_the_saved_ones_disagree() -> None:
    """One would be filled over the other. Where the saved ones overlapped alike they agree."""
    apart = Snapshot({"m": Flat(apart=True)})
    for turned in (False, True):
        found = apart.differences({"m": Flat(apart=False, turned=turned)}, strict=True)
        if turned:
            assert [d.what for d in found] == ["shape"]
            continue
        assert [str(d) for d in found] == [
            "m/flat: memory: saved values of its own, live bytes that m/head has, too"
        ]
    # alone, it would change what is not restored
    assert apart.differences({"m": Flat(apart=False)}, only=("m/head",))
    assert not apart.differences({"m": Flat(apart=True)}, only=("m/head",))
    for at in (0, 1):
        alike = Snapshot({"m": Flat(apart=False, at=at)})
        live = Flat(apart=False, at=at)
        live.flat.zero_()
        alike.restore({"m": live})
        assert live.head.tolist() == [3.0 * at, 3.0 * at + 1, 3.0 * at + 2]
    assert alike.differences({"m": Flat(apart=False, at=0)})


def test_overlapping_tensors_of_other_looks_are_tried_as_they_lie() -> None:
    """Real parts of complex numbers, transposed, conjugated: the bytes decide."""
    base = torch.tensor([[1 + 2j, 3 + 4j], [5 + 6j, 7 + 8j]])
    looks = {"a": base, "b": torch.view_as_real(base)[..., 0], "c": base.t(), "d": base.conj(),
             "e": torch.view_as_real(base.conj().resolve_conj())}  # fmt: skip
    saved = Snapshot({"box": [looks]})
    live = torch.zeros(2, 2, dtype=torch.complex64)
    fits = {"a": live, "b": torch.view_as_real(live)[..., 0], "c": live.t(), "d": live.conj(),
            "e": torch.zeros(2, 2, 2)}  # fmt: skip
    saved.restore({"box": [fits]})
    assert torch.equal(live, base)
    assert fits["d"].resolve_conj().tolist() == base.conj().resolve_conj().tolist()
    wrong = fits | {"c": live.t().conj()}
    assert {d.what for d in saved.differences({"box": [wrong]})} == {"memory"}


def test_a_trained_optimizer_keeps_its_tensors() -> None:
    """Shows that a restore in the same process fills what is there, and makes nothing."""
    model = nn.Linear(4, 2)
    opt = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01))
    train(model, opt)
    saved = Snapshot({"m": model, "o": opt})
    before = {id(value) for entry in opt.state.values() for value in entry.values()}
    rate = opt.param_groups[0]["lr"]
    train(model, opt)
    saved.restore({"m": model, "o": opt})
    assert before == {id(value) for entry in opt.state.values() for value in entry.values()}
    assert opt.param_groups[0]["lr"] is rate


def test_a_rate_that_stands_in_the_state_too_stays_one() -> None:
    """A box has it as well: who fills it fills the optimizer's. So it is with a state's tensor."""

    def parts(value: float, *, made: bool) -> dict[str, Any]:
        model, opt = stepped()
        rate, seen = torch.tensor(value), torch.full((2,), value)
        opt.param_groups[0]["lr"] = rate
        if made:
            opt.state[model.weight]["seen"] = seen
        return {"o": opt, "m": model, "box": {"lr": rate, "seen": seen}}

    saved = Snapshot(parts(0.5, made=True))
    for made in (True, False):
        live = parts(0.1, made=made)
        saved.restore(live)
        live["box"]["lr"].fill_(7.0)
        live["box"]["seen"].fill_(8.0)
        assert live["o"].param_groups[0]["lr"].item() == 7.0
        assert live["o"].state[live["m"].weight]["seen"].tolist() == [8.0, 8.0]


def test_a_tensor_of_two_optimizers_stays_one() -> None:
    """Their rate, here; made apart one of them would not see it change."""

    def parts(value: float) -> dict[str, Any]:
        (_, one), (_, two) = stepped(), stepped()
        one.param_groups[0]["lr"] = two.param_groups[0]["lr"] = torch.tensor(value)
        return {"one": one, "two": two}

    live = parts(0.1)
    Snapshot(parts(0.5)).restore(live)
    rates = [live[name].param_groups[0]["lr"] for name in ("one", "two")]
    assert rates[0] is rates[1]
    assert rates[0].item() == 0.5


def test_columns_of_one_buffer_are_filled_where_they_lie() -> None:
    """The bytes of each lie in the gaps of the other."""

    def parts(value: float) -> dict[str, Any]:
        model, opt = stepped()
        base = torch.arange(6.0).view(3, 2) + value
        opt.state[model.weight] = {"a": base[:, 0], "b": base[:, 1]}
        return {"base": [base], "m": model, "o": opt}

    live = parts(9.0)
    Snapshot(parts(0.0)).restore(live)
    assert live["base"][0].tolist() == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    entry = live["o"].state[live["m"].weight]
    assert entry["b"].data_ptr() == live["base"][0][:, 1].data_ptr()


def test_what_is_not_restored_is_left_alone() -> None:
    """Another optimizer, a rate that is to be kept, a buffer that is not saved."""
    model, opt = stepped(seen=torch.full((2,), 1.0))
    opt.param_groups[0]["lr"] = torch.tensor(0.5)
    _, second = stepped(seen=torch.full((2,), 2.0))
    second.param_groups[0]["lr"] = torch.tensor(0.25)
    saved = Snapshot({"m": model, "one": opt, "two": second})
    other, live = stepped()
    beside, rest = stepped()
    rate, around = torch.tensor(0.1), torch.full((3,), 7.0)
    lost = around[:2]
    live.param_groups[0]["lr"] = rest.param_groups[0]["lr"] = rate
    live.state[other.weight]["seen"] = lost
    other.register_buffer("lost", around, persistent=False)
    state = {"m": other, "one": live, "two": rest}
    apply(state, saved.saved, saved.values, only=("one",))
    assert (rate.item(), rest.param_groups[0]["lr"].item()) == (torch.tensor(0.1).item(),) * 2
    assert live.param_groups[0]["lr"].item() == 0.5
    assert (lost.tolist(), live.state[other.weight]["seen"].tolist()) == ([7.0, 7.0], [1.0, 1.0])
    kept = torch.tensor(0.1)
    live.param_groups[0]["lr"] = rest.param_groups[0]["lr"] = kept
    apply(state, saved.saved, saved.values, keep_live=("one/param_groups[0]/lr",))
    assert live.param_groups[0]["lr"] is kept
    assert kept.item() == torch.tensor(0.1).item()
    assert rest.param_groups[0]["lr"].item() == 0.25
    assert beside.weight is rest.param_groups[0]["params"][0]


def test_two_storages_over_one_array_are_one_memory() -> None:
    """NumPy's, say: what counts are addresses."""
    array = np.arange(4, dtype=np.float32)
    model, opt = stepped()
    opt.state[model.weight]["seen"] = torch.tensor([7.0, 8.0])
    saved = Snapshot({"m": model, "o": opt})
    other = nn.Linear(2, 1, bias=False)
    other.weight = nn.Parameter(torch.from_numpy(array)[:2].view(1, 2))
    live = torch.optim.SGD(other.parameters(), lr=0.1)
    live.state[other.weight]["seen"] = torch.from_numpy(array)[:2]
    saved.restore({"m": other, "o": live})
    assert torch.equal(other.weight, model.weight)
    assert live.state[other.weight]["seen"].tolist() == [7.0, 8.0]


def test_tensors_at_odd_addresses_are_tried_too() -> None:
    """As `frombuffer` makes them."""

    def parts() -> dict[str, Any]:
        held = bytearray(range(32))
        return {"box": [torch.frombuffer(held, dtype=torch.float32, count=3, offset=3),
                        torch.frombuffer(held, dtype=torch.uint8, count=16)]}  # fmt: skip

    Snapshot(parts()).restore(parts())


def test_a_rate_that_is_a_buffer_which_is_not_saved_stays_one_with_it() -> None:
    """The very same tensor, that the forward pass reads."""
    model, opt = stepped()
    opt.param_groups[0]["lr"] = torch.tensor(0.5)
    other, live = stepped()
    rate = live.param_groups[0]["lr"] = torch.tensor(0.1)
    other.register_buffer("rate", rate, persistent=False)
    Snapshot({"m": model, "o": opt}).restore({"m": other, "o": live})
    assert live.param_groups[0]["lr"] is rate
    assert rate.item() == 0.5


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")  # a prototype
def test_what_has_no_plain_memory_is_in_nobodys_way() -> None:
    """A sparse adjacency, say, that is not saved; nor in a meta tensor's, at address 0."""
    model, opt = stepped()
    other, live = stepped()
    for module in (model, other):
        module.register_buffer("adj", torch.eye(3).to_sparse(), persistent=False)
        module.register_buffer("late", nn.UninitializedBuffer(), persistent=False)
        parts = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])
        module.register_buffer("parts", parts, persistent=False)
        module.register_buffer("none", torch.ones(2, device="meta"), persistent=False)
    Snapshot({"m": model, "o": opt}).restore({"m": other, "o": live})
    assert torch.equal(other.weight, model.weight)


def test_a_flat_tensor_and_its_many_views_cost_what_they_are() -> None:
    """Nobody asks whom plain tensors meet: they are filled for themselves."""
    held = torch.zeros(4000)
    memory = Memory()
    memory.hold("flat", held)
    for at in range(1000):
        memory.hold(str(at), held[at * 4 : at * 4 + 4])
    found = memory.claim("one", held[6:7])
    assert [path for path, _ in found] == ["flat", "1"]
