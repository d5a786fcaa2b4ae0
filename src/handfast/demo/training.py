"""The training that the demo kills: a character transformer over four ranks, sharded by FSDP2.

Everything that decides the next step is state: weights, moments, learning rate, position in the
text, and two streams of random numbers (dropout draws from torch's, the loader's jitter from
Python's). Leave one out of a checkpoint and the last bits differ.
"""

import json
import math
import random
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils import deterministic

from handfast.demo.corpus import Corpus, read
from handfast.demo.events import Log
from handfast.demo.job import Job
from handfast.demo.model import Transformer
from handfast.demo.savers import Saver
from handfast.errors import HandfastError

__all__ = ["Loader", "Training", "local", "make_deterministic", "train"]


def make_deterministic() -> None:
    """One thread a rank and deterministic kernels, or two runs could not be compared bit for bit.

    The first call imports much of torch and takes a second, so the parent of all ranks makes it
    before it forks.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    # Filling fresh memory shows reads of what was never written; it costs a pass over each tensor.
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # set at run time


class Loader:
    """Batches of windows into the text, a shuffled share a rank; remembers the last one consumed.

    The order of an epoch of the text follows from the seed. Where exactly a window starts is
    jittered from Python's own generator, so that this stream is part of the run's state too.
    """

    def __init__(self, corpus: Corpus, job: Job, rank: int) -> None:
        self._codes = torch.tensor(list(corpus.codes), dtype=torch.long)
        self._text = corpus.digest
        self._batch = job.batch
        self._context = job.context
        self._seed = job.seed
        self._rank = rank
        self._world = job.world
        self._round = 0
        self._consumed = 0
        self._order = self._shuffled()

    def _shuffled(self) -> list[int]:
        windows = list(range((len(self._codes) - 1) // self._context - 1))
        random.Random(f"{self._seed}/{self._round}").shuffle(windows)  # noqa: S311 - no secret
        share = windows[self._rank :: self._world]
        return share[: len(windows) // self._world // self._batch * self._batch]

    def next(self) -> tuple[Tensor, Tensor]:
        """The next batch: what is seen and what follows it, both int64 (batch, context)."""
        if self._consumed == len(self._order) // self._batch:
            self._round, self._consumed = self._round + 1, 0
            self._order = self._shuffled()
        first = self._consumed * self._batch
        starts = [
            window * self._context + random.randrange(self._context)  # noqa: S311 - no secret
            for window in self._order[first : first + self._batch]
        ]
        self._consumed += 1
        rows = [self._codes[start : start + self._context + 1] for start in starts]
        block = torch.stack(rows)
        return block[:, :-1], block[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands; the text and the seed are in it so that no other is resumed."""
        return {
            "text": self._text,
            "seed": self._seed,
            "round": self._round,
            "consumed": self._consumed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the last batch consumed. Raises HandfastError for another text or seed."""
        if (state["text"], state["seed"]) != (self._text, self._seed):
            raise HandfastError(
                f"the loader reads text {self._text} with seed {self._seed}, but the checkpoint "
                f"was made with text {state['text']} and seed {state['seed']}. Resume with the "
                "same interpreter and --seed, or start a new run"
            )
        self._round = int(state["round"])
        self._consumed = int(state["consumed"])
        self._order = self._shuffled()


def _pace(step: int, *, warmup: int, steps: int) -> float:
    """The learning rate's factor: linear up, then half a cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


class Training:
    """The live objects of one rank. The process group must be up: `fully_shard` asks it."""

    def __init__(self, job: Job, rank: int) -> None:
        corpus = read(limit=job.letters)
        self.job = job
        self.rank = rank
        torch.manual_seed(job.seed)
        self.model = Transformer(
            len(corpus.alphabet), job.context, job.width, job.layers, job.heads, job.dropout
        )
        for block in self.model.blocks:
            fully_shard(block, reshard_after_forward=False)
        fully_shard(self.model, reshard_after_forward=False)
        self.optimizer = AdamW(self.model.parameters(), lr=job.rate, fused=True)
        self.scheduler = LambdaLR(
            self.optimizer, partial(_pace, warmup=job.warmup, steps=job.steps)
        )
        self.loader = Loader(corpus, job, rank)
        # Each rank drops out and jitters on a stream of its own, as in any data-parallel run.
        torch.manual_seed(job.seed * 1000 + rank)
        random.seed(job.seed * 1000 + rank)

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold, random streams aside."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "loader": self.loader,
        }

    def step(self) -> float:
        """One optimizer update; returns this rank's loss."""
        seen, following = self.loader.next()
        loss = self.model(seen, following)
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return float(loss.item())

    def turn_off(self) -> None:
        """Go another way from here, as an operator who rolls back to get past bad data means to.

        With other random streams: the steps that follow have numbers that were there before, and
        states that were not.
        """
        torch.manual_seed(self.job.seed * 1000 + 500 + self.rank)
        random.seed(self.job.seed * 1000 + 500 + self.rank)

    def prints(self) -> dict[str, str]:
        """A digest of each component of this rank's state: the demo's independent witness."""
        weights = {name: local(p) for name, p in self.model.named_parameters()}
        moments = {
            f"{name}/{key}": local(value)
            for name, p in self.model.named_parameters()
            for key, value in sorted(self.optimizer.state.get(p, {}).items())
        }
        streams = xxhash.xxh3_128(repr(random.getstate()).encode())
        streams.update(_bytes(torch.get_rng_state()))
        return {
            "model": _digest(weights),
            "optimizer": _digest(moments),
            "scheduler": _plain(self.scheduler.state_dict()),
            "loader": _plain(self.loader.state_dict()),
            "rng": streams.hexdigest(),
        }


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of ``tensor``."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _digest(tensors: Mapping[str, Tensor]) -> str:
    hashed = xxhash.xxh3_128()
    for name, tensor in tensors.items():
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(_bytes(tensor.detach()))
    return hashed.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def _plain(state: Mapping[str, Any]) -> str:
    text = json.dumps(state, sort_keys=True, default=str)
    return xxhash.xxh3_128_hexdigest(text.encode())


def train(training: Training, saver: Saver, log: Log) -> None:
    """Resume, train to the end, save every few steps, and tell the log all of it."""
    job = training.job
    start = saver.restore()
    log.tell("resumed", start, prints=training.prints())
    if job.rollback:
        training.turn_off()
    for step in range(start + 1, job.steps + 1):
        log.tell("step", step, loss=training.step())
        if step % job.every == 0 or step == job.steps:
            log.tell("saving", step, prints=training.prints())
            saver.save(step)
            log.tell("saved", step)
    saver.close()
    log.tell("final", job.steps, prints=training.prints())
