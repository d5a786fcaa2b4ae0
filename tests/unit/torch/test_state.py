"""Shows what a comparison before a restore refuses, and that it moves nothing."""

import gc
import random
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
import torch
from statekit import State, shelved
from torch import nn

from handfast.checkpoint.validated import Validated
from handfast.errors import Poisoned, Refused
from handfast.store.image import Layout
from handfast.store.manifest import Left
from handfast.torch.capture import capture
from handfast.torch.state import TorchState


def held(state: State) -> TorchState:
    return TorchState(state, rng=True, replicated=(), pickle=(), verify="fsync")


def saved(state: State) -> Validated:
    """A copy of the state as an agent would hand it over; its values are zeros."""
    made = held(state).capture(None, False, lambda _, digests: list(digests))
    assert made is not None
    layout = Layout(made.slots, made.header, made.nbytes, made.padded)
    fields = {"environment": made.environment, "structure": made.structure}
    return shelved(capture(state), layout, bytearray(made.padded), **fields)


def build() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(2, 2))
    opt = torch.optim.AdamW(model.parameters())
    return {"model": model, "optimizer": opt, "box": {"n": 1, "layers": [nn.Linear(1, 1), 2]}}


@pytest.mark.parametrize(
    "pattern",
    ["optimiser/**", "optim", "optimizer/state/**", "model/1.weight", "rng/torch", "extra", "m"],
)
def test_a_pattern_that_names_nothing_is_refused_by_name(pattern: str) -> None:
    """A slip restored nothing of the optimizer, and said nothing."""
    state = build()
    copy = saved(state)
    with pytest.raises(ValueError, match=r"names nothing that was saved") as caught:
        held(state).compare([copy], ("model/**", pattern), strict=True)
    assert f"only={pattern!r}" in str(caught.value)
    assert "box, model, optimizer, rng, box/layers" in str(caught.value)
    held(state).compare([copy], ("model/**", pattern), strict=False)


def test_patterns_that_name_something_are_taken() -> None:
    """Components, tensors, entries of boxes and what stands in them; and all of nothing."""
    state = build()
    names = ("model", "optimizer/**", "rng/*", "model/0.*", "box/n", "box/layers[[]1]", "b*/**")
    held(state).compare([saved(state)], names, strict=True)
    held({}).compare([saved({})], ("**",), strict=True)


class Collecting:
    """Tells at each call whether garbage is collected meanwhile; fails if it is told to."""

    def __init__(self) -> None:
        self.seen: list[bool] = []
        self.fails = False

    def state_dict(self) -> dict[str, int]:
        if self.fails:
            raise RuntimeError("no state")
        return {"n": 1}

    def load_state_dict(self, state: object) -> None:
        self.seen.append(gc.isenabled())
        if self.fails:
            raise RuntimeError("no load")


def test_the_collector_is_left_as_it_was_found() -> None:
    """Shows it after a restore, after one that failed, where it was off, and that it is on while
    things load themselves: that may be long, and makes what it likes."""
    thing = Collecting()
    state = {**build(), "thing": thing}
    copy, live = saved(state), held(state)
    live.compare([copy], ("**",), strict=True)
    live.apply([copy], ("**",), ())
    assert gc.isenabled()
    thing.fails = True
    with pytest.raises(RuntimeError):
        live.compare([copy], ("**",), strict=True)
    assert gc.isenabled()
    with pytest.raises(Poisoned):
        live.apply([copy], ("**",), ())
    assert gc.isenabled()
    gc.disable()
    try:
        thing.fails = False
        live.compare([copy], ("**",), strict=True)
        live.apply([copy], ("**",), ())
        assert not gc.isenabled()
    finally:
        gc.enable()
    assert thing.seen == [True, False]


def test_what_was_compared_serves_one_restore_of_the_same_copies() -> None:
    """Shows that a restore takes the epoch that it is given, and live things as they are by then:
    after a comparison with another epoch, twice after one, and after parameters came and went."""
    state: dict[str, Any] = {"box": {"n": [1], "w": torch.ones(2)}, "rest": [5]}
    copies = []
    for number in (1, 2):
        state["box"]["n"][0] = number
        copies.append(saved(state))
    live = held(state)
    live.compare([copies[0]], ("**",), strict=True)
    live.apply([copies[1]], ("**",), ())
    assert state["box"]["n"] == [2]
    live.compare([copies[0]], ("**",), strict=True)
    for _ in range(2):
        state["box"]["n"].append(7)  # the saved list must not have become the live one
        state["box"]["w"] = torch.ones(2)
        live.apply([copies[0]], ("**",), ())
        assert state["box"]["n"] == [1]
        assert state["box"]["w"].tolist() == [0.0, 0.0]


class Drawing:
    """Draws the seed of its workers when it is asked for its state, as torchdata's loader does."""

    wrong = False

    def state_dict(self) -> dict[str, Any]:
        if self.wrong:
            random.random()
            raise RuntimeError("no state now")
        return {"seed": int(torch.randint(0, 2**31, ())), "other": random.random()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def test_a_comparison_moves_no_random_stream() -> None:
    """Whether it agrees, refuses, or an object of the user's raises."""
    drawing = Drawing()
    state: dict[str, Any] = {"model": nn.Linear(2, 2), "d": drawing}
    copy = saved(state)
    streams = torch.get_rng_state(), random.getstate()

    def unmoved() -> bool:
        return torch.equal(torch.get_rng_state(), streams[0]) and random.getstate() == streams[1]

    held(state).compare([copy], ("**",), strict=True)
    assert unmoved()
    other = {"model": nn.Linear(2, 3), "d": drawing}
    streams = torch.get_rng_state(), random.getstate()
    with pytest.raises(Refused):
        held(other).compare([copy], ("**",), strict=True)
    assert unmoved()
    drawing.wrong = True
    with pytest.raises(RuntimeError, match="no state now"):
        held(state).compare([copy], ("**",), strict=True)
    assert unmoved()


def every(_: int, digests: Mapping[str, bytes]) -> list[str]:
    """A node whose first rank holds everything alike."""
    return list(digests)


def sharing(state: Mapping[str, object], *replicated: str) -> TorchState:
    """A state whose rank is not the first of its node."""
    found = TorchState(state, rng=False, replicated=replicated, pickle=(), verify="fsync")
    found.shares(1, [0, 1])
    return found


def test_a_rank_keeps_its_ties_to_what_it_leaves_to_another() -> None:
    """The rank that stores the weights for the node need not have the tie: then nobody had it."""
    weight = torch.ones(2)
    one = sharing({"model": {"w": weight}, "best": {"w": weight}}, "model")
    made = one.capture([weight], False, every)
    assert [slot.spec.path for slot in made.slots] == []
    assert made.left == ("model/w",)
    assert made.aliases == {"best/w": "model/w", "extra[0]": "model/w"}


def test_only_what_was_proven_alike_is_left_to_another() -> None:
    """What differs stays, and is not asked for again; what could not be found out is. Another first
    rank is asked about all but what is known to differ."""
    asked: list[tuple[int, list[str]]] = []
    answers: list[list[str] | None] = [None, ["b"], ["c"]]

    def prove(first: int, digests: Mapping[str, bytes]) -> list[str] | None:
        asked.append((first, sorted(digests)))
        return answers.pop(0)

    state: dict[str, object] = {"a": torch.ones(2), "b": torch.ones(2)}
    one = sharing(state, "*")

    def left() -> tuple[str, ...]:
        plan = one.capture(None, False, prove)
        assert {slot.spec.path for slot in plan.slots}.isdisjoint(plan.left)
        assert len(plan.slots) + len(plan.left) == len(state)
        assert (plan.left_to, plan.leads) == (0, False)
        return plan.left

    assert left() == ()
    assert left() == ("b",)
    assert left() == ("b",)
    state["c"] = torch.zeros(2)
    assert left() == ("b", "c")
    assert asked == [(0, ["a", "b"]), (0, ["a", "b"]), (0, ["c"])]
    one.keeps(["c"])
    assert left() == ("b",)
    one.shares(3, [2, 3])
    answers.append(["b"])
    assert one.capture(None, False, prove).left_to == 2
    assert (asked[3:], answers) == ([(2, ["b"])], [])


def test_the_first_of_a_node_stores_all_and_asks_nobody() -> None:
    """And so does one that is alone on its node."""

    def prove(*_: object) -> list[str]:
        raise AssertionError("the first rank asks")

    one = TorchState({"a": torch.ones(2)}, rng=False, replicated=("a",), pickle=(), verify="fsync")
    plan = one.capture(None, False, prove)
    assert (plan.left, plan.leads, len(plan.slots)) == ((), False, 1)
    one.shares(0, [0, 1])
    plan = one.capture(None, False, prove)
    assert (plan.left, plan.leads, len(plan.slots)) == ((), True, 1)
    assert one.capture(None, False, prove) is plan


def test_what_turned_out_to_differ_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    one = sharing({"a": torch.ones(2)}, "a")
    for _ in range(2):
        one.keeps(["a"])
    assert caplog.text.count("a seemed to be alike on all ranks, and is not") == 1


def test_what_another_holds_otherwise_is_refused_by_name() -> None:
    """Directories that were not written together: all ranks hear of it, before anything changes."""
    state = build()
    copy = saved(state)
    other = sharing(state, "model/**")
    plan = other.capture(None, False, every)
    digests = {path: bytes(16) for path in plan.left}
    kept = {"slots": plan.slots, "image_bytes": plan.nbytes, "left": Left(0, digests)}
    mine = Validated(copy._shelf, msgspec.structs.replace(copy.manifest, **kept))
    with pytest.raises(Refused, match=r"model/0\.weight.*left them to") as caught:
        held(state).compare([mine, copy], ("**",), strict=False)
    assert (caught.value.verdict, caught.value.shards) == ("mixed", ("d0",))
    held(state).compare([mine, copy], ("optimizer",), strict=True)
