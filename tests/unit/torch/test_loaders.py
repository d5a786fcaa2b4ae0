"""Shows that torchdata's loaders are read without a trace, and that lost orders are told of."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from statekit import Snapshot
from torch import Generator
from torch.utils.data import IterableDataset, RandomSampler, SequentialSampler, SubsetRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from handfast.errors import Poisoned
from handfast.torch import loaders
from handfast.torch.rng import unmoved_streams

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it

ITEMS: Any = range(9)


@pytest.fixture(autouse=True)
def _no_worker_stays() -> Iterator[None]:
    """Iterators are in cycles, and their workers go with them."""
    yield
    gc.collect()


def loader(sampler: Any = None, *, batch_size: int | None = 3, **options: Any) -> Any:
    """Nine items in threes."""
    shuffle = sampler is None
    return StatefulDataLoader(ITEMS, batch_size, shuffle=shuffle, sampler=sampler, **options)


def items(it: Iterator[Any]) -> list[int]:
    """What the rest of a pass gives."""
    return [int(item) for batch in it for item in batch]


def test_reading_what_nobody_has_begun_leaves_no_trace() -> None:
    """No iterator, no worker, no draw: the first pass is the one that it would have been."""
    held = loader(num_workers=2)
    with unmoved_streams():
        ahead = torch.rand(3)
    drawn = held.sampler.generator.get_state()
    saved = Snapshot({"loader": held})
    assert held._iterator is None
    assert torch.equal(torch.rand(3), ahead)
    assert torch.equal(held.sampler.generator.get_state(), drawn)
    torch.manual_seed(1)
    other = loader(num_workers=2)
    saved.restore({"loader": other})
    assert other._iterator is None
    assert items(iter(other)) == items(iter(held))


def test_what_was_loaded_and_not_begun_is_saved_as_it_was() -> None:
    """A loader of another phase of the training goes through two restores."""
    one, two, three = (loader() for _ in range(3))
    first = iter(one)
    next(first)
    Snapshot({"loader": one}).restore({"loader": two})
    assert two._iterator is None
    Snapshot({"loader": two}).restore({"loader": three})
    assert items(iter(three)) == items(first) == items(iter(two))


def test_a_loader_that_had_begun_is_set_back_to_its_beginning() -> None:
    """Where it had not begun when it was saved; and forgets what it was restored to in between."""
    one, two, begun = loader(), loader(), loader()
    next(iter(begun))
    saved = Snapshot({"loader": one})
    Snapshot({"loader": begun}).restore({"loader": two})
    saved.restore({"loader": two})
    assert "_get_iterator" not in vars(two)
    assert items(iter(two)) == items(iter(one))


def test_another_loader_takes_the_place_of_one_that_had_not_begun() -> None:
    """It has not begun either: there is nothing that it could be told."""

    class Own(list[int]):
        def state_dict(self) -> dict[str, Any]:
            return {"mine": 1}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pytest.fail("told of a position that there was not")

    Snapshot({"loader": loader()}).restore({"loader": Own()})


def test_a_loader_that_keeps_more_than_torchdatas_is_asked() -> None:
    """A class with a state_dict() of its own knows what belongs to it."""

    class Own(StatefulDataLoader[Any]):
        def state_dict(self) -> dict[str, Any]:
            return super().state_dict() | {"stage": 3}

    state: Any = loaders.read(Own(ITEMS))
    assert state["stage"] == 3


@pytest.mark.parametrize(
    ("sampler", "named"),
    [
        (SubsetRandomSampler(ITEMS), "SubsetRandomSampler"),
        (RandomSampler(ITEMS), "RandomSampler"),
        (SubsetRandomSampler(ITEMS, Generator()), ""),
        (SequentialSampler(ITEMS), ""),
        (None, ""),
    ],
    ids=["subset", "random", "own", "sequential", "shuffle"],
)
def test_a_sampler_that_draws_from_the_process_is_told_of(
    sampler: Any, named: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Data are repeated and skipped after a resume, in silence."""
    plain = torch.utils.data.DataLoader([1])
    loaders.warn_of_orders({"train": [loader(sampler)], "n": {"plain": plain}})
    assert (f"train[0]: its {named} has no state" in caplog.text) == bool(named)
    assert bool(caplog.text) == bool(named)


@pytest.mark.parametrize(
    ("sampler", "seeded", "told"),
    [
        (lambda: SubsetRandomSampler(ITEMS, Generator()), False, True),
        (lambda: SubsetRandomSampler(ITEMS, Generator()), True, False),
        (lambda: None, False, False),
        (lambda: SequentialSampler(ITEMS), False, False),
    ],
    ids=["unseeded", "seeded", "shuffle", "sequential"],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_an_order_that_nobody_has_seeded_since_the_restore_is_told_of(
    workers: int, sampler: Any, seeded: bool, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """In the second pass it is another one; a state, or no draw at all, needs no seed."""
    one, other = (loader(sampler(), num_workers=workers, generator=Generator()) for _ in range(2))
    first = iter(one)
    next(first)
    Snapshot({"loader": one}).restore({"loader": other})
    if seeded:
        other.sampler.generator.manual_seed(3)
    assert len(items(iter(other))) == 6
    assert ("nobody has seeded its generator since" in caplog.text) == told


def test_a_loader_without_batches_has_its_sampler() -> None:
    """And one whose sampler gives whole batches, that one."""
    alone = loader(batch_size=None)
    saved = Snapshot({"loader": alone})
    other = loader(batch_size=None)
    saved.restore({"loader": other})
    assert [int(x) for x in other] == [int(x) for x in alone]
    batches = StatefulDataLoader(ITEMS, batch_sampler=[[0, 1], [2, 3]])
    next(iter(batches))
    saved = Snapshot({"loader": batches})
    again = StatefulDataLoader(ITEMS, batch_sampler=[[0, 1], [2, 3]])
    saved.restore({"loader": again})
    assert items(iter(again)) == [2, 3]


class Late(IterableDataset[int]):
    """Takes its state up when it is iterated, as Hugging Face's do."""

    def __init__(self) -> None:
        self.at = 0
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        self.at = self.start
        while self.at < 9:
            self.at += 1
            yield self.at - 1

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, tree: dict[str, int]) -> None:
        self.start = tree["at"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_that_takes_its_state_up_late_goes_on_where_it_was(
    workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    """It reads back as it was before; every restore was refused half-way because of that."""
    one, two = (StatefulDataLoader(Late(), 3, num_workers=workers) for _ in range(2))
    first = iter(one)
    next(first)
    Snapshot({"loader": one}).restore({"loader": two})
    assert "dataset_state" in caplog.text
    assert "takes its state up only when it is iterated" in caplog.text
    assert items(iter(two)) == items(first) == [3, 4, 5, 6, 7, 8]


class Deaf(StatefulDataLoader[int]):
    """A loader that forgets what it is given."""

    def load_state_dict(self, tree: Any) -> None:
        super().load_state_dict({**tree, "_num_yielded": 0})


def test_a_loader_that_is_elsewhere_is_an_error() -> None:
    """Whatever its dataset says: its own count is another one."""
    one, two = Deaf(Late(), 3), Deaf(Late(), 3)
    next(iter(one))
    with pytest.raises(Poisoned, match=r"reads back as another value than the one it was given"):
        Snapshot({"loader": one}).restore({"loader": two})
