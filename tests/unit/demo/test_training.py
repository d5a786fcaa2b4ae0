"""Shows that the demo's loader forgets nothing, and that its savers are all that it names."""

import random

import pytest
import torch

from handfast.demo import peers
from handfast.demo.corpus import Corpus, read
from handfast.demo.job import SAVERS, Job
from handfast.demo.training import Loader
from handfast.errors import HandfastError

JOB = Job(run="", letters=4_000)
CORPUS: Corpus = read(limit=JOB.letters)


def batches(loader: Loader, count: int) -> list[list[int]]:
    return [loader.next()[0].flatten().tolist() for _ in range(count)]


def test_a_loader_goes_on_after_the_last_batch_consumed() -> None:
    """meta-pytorch/data#1437 and its like: no batch is seen twice, none is left out."""
    random.seed(1)
    straight = batches(Loader(CORPUS, JOB, 1), 40)
    random.seed(1)
    one = Loader(CORPUS, JOB, 1)
    begun = batches(one, 25)
    other = Loader(CORPUS, JOB, 1)
    other.load_state_dict(one.state_dict())
    assert begun + batches(other, 15) == straight
    assert other.state_dict()["round"] > 0  # the text was gone through more than once


def test_each_rank_reads_a_share_of_its_own() -> None:
    """Without jitter no window is read by two ranks in one round."""
    shares = [set(Loader(CORPUS, JOB, rank)._order) for rank in range(JOB.world)]
    assert sum(map(len, shares)) == len(set.union(*shares))


def test_what_follows_is_what_is_seen_one_letter_on() -> None:
    """Or the model would learn to copy."""
    seen, following = Loader(CORPUS, JOB, 0).next()
    assert seen.shape == (JOB.batch, JOB.context)
    assert torch.equal(seen[:, 1:], following[:, :-1])


def test_the_jitter_is_drawn_from_pythons_own_stream() -> None:
    """So that a checkpoint without this stream is found out by the last bits."""
    random.seed(1)
    one = batches(Loader(CORPUS, JOB, 0), 3)
    random.seed(2)
    assert batches(Loader(CORPUS, JOB, 0), 3) != one


def test_another_text_or_seed_is_refused() -> None:
    """A demo resumed by another Python has another standard library."""
    loader = Loader(CORPUS, JOB, 0)
    state = loader.state_dict()
    with pytest.raises(HandfastError, match="and seed 7"):
        loader.load_state_dict({**state, "seed": 7})
    with pytest.raises(HandfastError, match="text elsewhere"):
        loader.load_state_dict({**state, "text": "elsewhere"})


def test_every_saver_that_a_job_can_name_exists() -> None:
    """A name in one table and not in the other would fail in a forked rank, far from here."""
    assert {"none", "handfast", *peers.SAVERS} == set(SAVERS)
