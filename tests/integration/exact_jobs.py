"""Trainings as users write them, to try out how they resume; each can be broken on purpose."""

from __future__ import annotations

import copy
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from training import WIDTH, Loader

from handfast.torch import Checkpointer


class Normed(nn.Module):
    """Subtracts a running mean of what it saw, which is a buffer, kept or not."""

    def __init__(self, kept: bool) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH), persistent=kept)
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (batch, WIDTH) to the same."""
        self.mean.lerp_(x.mean(0), 0.1)
        return self.layer(x - self.mean)


def train(path: str, steps: int, fault: str = "", every: int = 1) -> None:
    """A training in which all matters: a scheduler, dropout, a loader that shuffles, a count."""
    torch.set_num_threads(1)
    torch.manual_seed(secrets.randbits(32) if fault == "noise" else 1)
    model = nn.Sequential(Normed(fault != "buffer"), nn.Dropout(0.2), nn.Linear(WIDTH, WIDTH))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9)
    loader = Loader()
    shift = torch.zeros(WIDTH)  # not in the state: it matters only where it is moved
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
    state.pop(fault, None)
    with Checkpointer(path, state, every=every, rng=fault != "rng") as ckpt:
        start = ckpt.restore()
        known: Any = ckpt.extra or {"seen": 0, "at": 0.0}
        seen = 0 if fault == "extra" else known["seen"]
        for step in range(start + 1, steps + 1):
            x = loader.next()
            loss = (model(x + shift) - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            seen += len(x)
            if fault == "tensor":
                shift += 0.1
            at = time.monotonic() if fault == "clock" else 0.0
            ckpt.save(step, extra={"seen": seen, "at": at})


class Trainer:
    """A training that keeps its things on itself, and its data in a generator that is under way."""

    def __init__(self, path: str, *, generator_in_state: bool) -> None:
        torch.manual_seed(1)
        self.model = nn.Linear(WIDTH, WIDTH)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.noise = torch.Generator().manual_seed(3)
        state = {"model": self.model, "optimizer": self.optimizer}
        if generator_in_state:
            state["noise"] = self.noise
        self.checkpointer = Checkpointer(path, state)

    def batches(self) -> Iterator[Tensor]:
        """Noise without end."""
        while True:
            yield torch.randn(2, WIDTH, generator=self.noise)

    def fit(self, steps: int) -> None:
        """Train until a step."""
        batches = self.batches()
        for step in range(self.checkpointer.restore() + 1, steps + 1):
            x = next(batches)
            self.optimizer.zero_grad()
            (self.model(x) - x).square().mean().backward()
            self.optimizer.step()
            self.checkpointer.save(step)


def fit(path: str, steps: int, kept: bool = True) -> None:
    """A training by a class, which never closes its Checkpointer."""
    Trainer(path, generator_in_state=kept).fit(steps)


def of_plain_sgd(path: str, steps: int, fault: str = "", every: int = 1) -> None:
    """An optimizer without a state of its own; the weights may be anywhere but in the state."""
    torch.manual_seed(1)
    model = nn.Linear(WIDTH, WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state: dict[str, object] = {"model": model, "optimizer": optimizer}
    if fault in ("nothing of it", "by hand"):
        state = {"counts": {"steps": 0}}
    elif fault == "a copy":
        state = {"model": copy.deepcopy(model), "counts": {"steps": 0}}
    elif fault:
        del state["model"]
    losses: Iterator[Tensor] = _losses(model)
    if fault == "hidden":
        losses, model = map(torch.abs, losses), nn.Linear(1, 1)  # a map shows nobody what it holds
    with Checkpointer(path, state, every=every, rng=False) as ckpt:
        for step in range(ckpt.restore() + 1, steps + 1):
            optimizer.zero_grad()
            next(losses).backward()
            if fault == "by hand":
                with torch.no_grad():
                    for weight in model.parameters():
                        weight.sub_(weight.grad, alpha=0.1)
            else:
                optimizer.step()
            ckpt.save(step)


@dataclass(slots=True)
class Held:
    """What a training keeps, on an object that has no dict."""

    weight: Tensor


def by_gradients_of_its_own(path: str, steps: int, fault: str = "") -> None:
    """Weights that require no gradients: it gives them, and plain SGD or itself steps."""
    held = Held(torch.zeros(3))
    optimizer = torch.optim.SGD([held.weight], lr=0.1)
    state: dict[str, object] = {"steps": torch.zeros(())}
    if fault == "slots":
        held.weight.requires_grad_()
    elif not fault:
        state["weight"] = held.weight
    with Checkpointer(path, state, rng=False) as ckpt:
        for step in range(ckpt.restore() + 1, steps + 1):
            with torch.no_grad():
                if fault == "slots":
                    held.weight += 1
                else:
                    held.weight.grad = torch.ones(3)
                    optimizer.step()
                    held.weight.grad = None
            ckpt.save(step)


def _losses(model: nn.Module) -> Iterator[Tensor]:
    """Without end."""
    while True:
        yield (model(torch.ones(2, WIDTH)) - 1).square().mean()


def over_a_loader(path: str, steps: int, late: bool = True) -> None:
    """torchdata's own loader; where it is not iterated ``late``, it is before the restore."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    torch.manual_seed(1)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = StatefulDataLoader(torch.arange(40, dtype=torch.float32), 4, shuffle=True)
    with Checkpointer(path, {"model": model, "optimizer": optimizer, "loader": loader}) as ckpt:
        batches = None if late else iter(loader)
        step = ckpt.restore()
        for batch in iter(loader) if batches is None else batches:
            if step == steps:
                break
            step += 1
            optimizer.zero_grad()
            model(batch[:, None]).square().mean().backward()
            optimizer.step()
            ckpt.save(step)


class Average:
    """An average of a model's weights, as users write it: plain tensors in a dict."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow = {name: value.clone() for name, value in model.state_dict().items()}

    def update(self, model: nn.Module) -> None:
        """Go a tenth of the way to what the weights are now."""
        for name, value in model.state_dict().items():
            self.shadow[name].lerp_(value, 0.1)

    def state_dict(self) -> dict[str, Any]:
        """The average."""
        return {"shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with it."""
        self.shadow = state["shadow"]


class Clock:
    """Seconds: each run has others."""

    def __init__(self) -> None:
        self.seconds, self.begun = 0.0, time.monotonic()

    def lap(self) -> None:
        """Read it."""
        self.seconds = time.monotonic() - self.begun

    def state_dict(self) -> dict[str, float]:
        """The time."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from there."""
        self.seconds = state["seconds"]


class Order(torch.utils.data.Dataset[int]):
    """Data that count what was asked for, which the training does not go by."""

    def __init__(self) -> None:
        self.asked = 0

    def __getitem__(self, index: int) -> int:
        self.asked += 1
        return index

    def state_dict(self) -> dict[str, int]:
        """What was asked for."""
        return {"asked": self.asked}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self.asked = state["asked"]


def with_things_beside(path: str, steps: int, forget: str = "", compiled: bool = False) -> None:
    """What it keeps changes nothing that is trained, and of it some things may be forgotten."""
    torch.manual_seed(1)
    model = nn.Linear(WIDTH, WIDTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    average, swa = Average(model), torch.optim.swa_utils.AveragedModel(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    rate = torch.optim.lr_scheduler.StepLR(optimizer, 1000)
    best, clock, data = {"loss": 9.0}, Clock(), Order()
    same = torch.compile(model) if compiled else model  # to import what compiles takes seconds
    tracked, ema = nn.BatchNorm1d(WIDTH), {k: t.clone() for k, t in model.state_dict().items()}
    state: dict[str, object] = {
        "model": model, "optimizer": optimizer, "average": average, "swa": swa, "scaler": scaler,
        "rate": rate, "best": best, "tracked": tracked, "ema": ema,
    }  # fmt: skip
    for name in forget.split():
        state.pop(name, None)
    with Checkpointer(path, state) as ckpt:
        for step in range(ckpt.restore() + 1, steps + 1):
            x = torch.ones(2, WIDTH)
            loss = (model(x + data[step] * 0) + step).square().mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            rate.step()
            average.update(model)
            swa.update_parameters(model)
            tracked(torch.randn(4, WIDTH))
            for name, tensor in model.state_dict().items():
                ema[name].lerp_(tensor, 0.1)
            best["loss"] = min(best["loss"], -step) if forget != "best" else best["loss"] - 1
            clock.lap()
            ckpt.save(step)
    assert isinstance(same, nn.Module)


def with_a_rate_made_anew(path: str, steps: int, forget: str = "") -> None:
    """Its scheduler goes by the step that was restored, which brings all back that matters."""
    torch.manual_seed(1)
    model = nn.Linear(WIDTH, WIDTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state, seen = {"model": model, "optimizer": optimizer}, 0.0
    state.pop(forget, None)
    with Checkpointer(path, state) as ckpt:
        start = ckpt.restore()
        for group in optimizer.param_groups:
            group["initial_lr"] = 1e-2
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.9**n, last_epoch=start - 1)
        for step in range(start + 1, steps + 1):
            loss = model(torch.ones(2, WIDTH)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
            seen += loss.item()
            ckpt.save(step)


def of_ranks(path: str, steps: int, fault: int | None = None) -> None:
    """DDP, as torchrun starts it; a rank may draw from a generator that it does not save."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Linear(WIDTH, 4), nn.Linear(4, 1))
    model = nn.parallel.DistributedDataParallel(layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = torch.Generator().manual_seed(rank)
    state: dict[str, object] = {"model": model, "optimizer": optimizer, "box": {}}
    if fault != rank:
        state["box"] = {"data": data}
    with Checkpointer(path, state, patience_s=60.0) as ckpt:
        ckpt.prime(lambda: model(torch.zeros(2, WIDTH)).sum().backward())
        for step in range(ckpt.restore() + 1, steps + 1):
            optimizer.zero_grad()
            model(torch.randn(2, WIDTH, generator=data)).square().mean().backward()
            optimizer.step()
            ckpt.save(step)
    dist.destroy_process_group()


def until_told(path: str, steps: int, deaf: bool = False) -> None:
    """One that saves and stops when it gets SIGTERM, or is deaf to it."""
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(True))
    model = {"weight": torch.zeros(3)}
    with Checkpointer(path, {"model": model}, every=3) as ckpt:
        for step in range(ckpt.restore() + 1, steps + 1):
            model["weight"] += torch.randn(3)
            ckpt.save(step)
            if told and not deaf:
                ckpt.save(step, force=True)
                return


def of_some_steps(path: str, steps: int, of: list[int]) -> None:
    """One that calls save only now and then, by itself."""
    weight = torch.zeros(3)
    with Checkpointer(path, {"weight": weight}) as ckpt:
        for step in range(ckpt.restore() + 1, steps + 1):
            weight += 1
            if step in of:
                ckpt.save(step)


def wrong(path: str, steps: int, how: str) -> None:
    """One that does not do its part."""
    again = os.path.exists(path)
    if how in BEGINNINGS:
        BEGINNINGS[how]()
    if how == "silent" or (how == "forgets" and again):
        return
    if how == "elsewhere":
        path = f"{path}-{secrets.token_hex(4)}"
    if how == "fixed":
        path = os.path.join(os.path.dirname(os.path.dirname(path)), "fixed")
    weight = torch.full((3,), float(how == "odd" and "/killed/" in path))
    with Checkpointer(path, {"weight": weight}, every=steps + 1 if how == "rare" else 1) as ckpt:
        start = ckpt.restore()
        if how == "two":
            Checkpointer(f"{path}-ema", {"weight": weight})
        short = how == "short" or (how == "lazy" and again)
        for step in range(start + 1, steps + (0 if short else 1)):
            weight += 1
            if how == "idle" or (how == "shy" and step == 1 and "/killed/" in path):
                continue
            ckpt.save(step)
            if how in ENDINGS and step == 2:
                ENDINGS[how]()


def cry() -> None:
    """Raise."""
    raise RuntimeError("out of cheese")


def cry_or_wait() -> None:
    """Raise on one rank, for which the other one waits."""
    if os.environ["RANK"] == "1":
        cry()
    time.sleep(3600)


BEGINNINGS: dict[str, Callable[[], None]] = {
    "raises": cry,
    "one raises": cry_or_wait,
    "dies": lambda: os.kill(os.getpid(), signal.SIGSEGV),
}
ENDINGS: dict[str, Callable[[], None]] = {
    "hangs": lambda: time.sleep(3600),
    "stops": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}


if __name__ == "__main__":  # as a script that tries itself out
    from functools import partial

    from handfast.testing import assert_exact_resume

    print(assert_exact_resume(partial(of_some_steps, of=[2, 4]), steps=4, kill_at=2))
