"""What trainers can be told to do; see :mod:`trainers`."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from trainers import Desk
from training import Training
from training import digest as digest_of

import handfast
from handfast.core.lattice import Epoch
from handfast.torch import Checkpointer
from handfast.torch.group import _Meeting


def build(desk: Desk, kind: str = "plain", **options: Any) -> str:
    """Build a training; gives the digest of its state."""
    desk.training = Training(kind, rank=desk.rank, **options)
    desk.step = 0
    return desk.training.digest()


def begin(
    desk: Desk, path: str, kind: str = "plain", model: dict[str, Any] | None = None, **options: Any
) -> str:
    """Build a training and a Checkpointer for it; gives the digest of the state."""
    found = build(desk, kind, **(model or {}))
    attach(desk, path, **options)
    return found


def attach(desk: Desk, path: str, **options: Any) -> None:
    """Make a Checkpointer for what was built."""
    options.setdefault("patience_s", 30.0)
    desk.checkpointer = Checkpointer(path, desk.training.state(), **options)


def prime(desk: Desk) -> None:
    """One throwaway forward and backward."""
    desk.checkpointer.prime(lambda: desk.training.loss().backward())


def meddle(desk: Desk, how: str) -> None:
    """Hang something on the step that changes nothing, as a progress bar does, or a timer."""
    optimizer = desk.training.optimizer
    if how == "wrapped":
        step = optimizer.step
        optimizer.step = lambda closure=None: step(closure)
    else:
        getattr(optimizer, f"register_step_{how}_hook")(lambda *_: None)


def go_apart(desk: Desk, kind: str) -> None:
    """Have what DDP does not keep alike on all ranks, and looks as if it did."""
    training = desk.training
    net, loss, step = training.model.module, training.loss, training.step
    if kind == "parameter":
        net.late = nn.Parameter(torch.full((4,), 0.1))
        training.optimizer.add_param_group({"params": [net.late]})
        training.loss = lambda: loss() + (net.late * torch.randn(4)).square().sum()
    elif kind == "buffer":
        net.register_buffer("late", torch.zeros(4))
        training.step = lambda: (step(), net.late.add_(torch.randn(4)))
    elif kind == "average":
        average = torch.optim.swa_utils.AveragedModel(training.model, use_buffers=True)
        training.more["average"] = average
        training.step = lambda: (step(), average.update_parameters(training.model))
    else:

        def post(optimizer: Any, *_: object) -> None:
            for state in optimizer.state.values():
                state["exp_avg"].add_(desk.rank)

        register_optimizer_step_post_hook(post)
        for group in training.optimizer.param_groups:
            group["lr"] = 0.0  # or the weights would go apart, too


def apart(desk: Desk, kind: str) -> str:
    """The digest of what :func:`go_apart` made."""
    training = desk.training
    if kind == "average":
        return digest_of(dict(training.more["average"].named_buffers()))
    if kind == "hook":
        return digest_of([s["exp_avg"] for s in training.optimizer.state.values()])
    return digest_of(training.model.module.late)


def wander(desk: Desk) -> None:
    """Let one weight of the model differ by rank from now on."""
    with torch.no_grad():
        next(desk.training.model.parameters()).add_(desk.rank)


def restore(desk: Desk, **options: Any) -> int:
    """Resume; gives the step."""
    desk.step = desk.checkpointer.restore(**options)
    return desk.step


def resume(desk: Desk, path: str, kind: str = "plain", **options: Any) -> int:
    """Build, attach and restore."""
    begin(desk, path, kind, **options)
    return restore(desk)


def train(desk: Desk, to: int, *, save: bool = True, **options: Any) -> list[str]:
    """Train up to a step, saving after each; gives the digest after each step."""
    digests = []
    while desk.step < to:
        desk.training.step()
        desk.step += 1
        digests.append(desk.training.digest())
        if save:
            desk.last = desk.checkpointer.save(desk.step, **options)
    return digests


def save(desk: Desk, step: int, **options: Any) -> tuple[bool, str]:
    """Save as it stands; says whether it was taken, and why not."""
    desk.last = desk.checkpointer.save(step, **options)
    return bool(desk.last), desk.last.reason


def persisted(desk: Desk, timeout: float = 30.0) -> str:
    """Wait for the last save; gives its phase."""
    return str(desk.last.persisted(timeout).phase)


def converged(desk: Desk, timeout: float = 30.0) -> Epoch:
    """Wait for the last save; gives the epoch of the certificate."""
    certificate = desk.last.converged(timeout)
    return certificate.epoch


def save_best(desk: Desk, step: int, ours: bool) -> float:
    """Save the best weights along: the live ones, taken without a clone, or older ones."""
    weight = next(desk.training.model.parameters()).detach()
    best = weight if ours else torch.full_like(weight, 3.0)
    desk.last = desk.checkpointer.save(step, extra={"best": best})
    return float(best.flatten()[0])


def best(desk: Desk) -> float:
    """The best weights that came back."""
    return float(desk.checkpointer.extra["best"].flatten()[0])


def phase(desk: Desk) -> str:
    """How far the last save has come."""
    return str(desk.last.phase)


def blocked_by(desk: Desk) -> tuple[str, ...]:
    """Whom the lattice waits for."""
    return tuple(desk.checkpointer.lattice.blocked_by)


def keep(desk: Desk) -> None:
    """Lay the newest handle aside."""
    desk.kept = desk.last


def kept(desk: Desk) -> tuple[str, str]:
    """What the handle that was laid aside says, and why it will not converge."""
    try:
        desk.kept.converged(10.0)
    except handfast.SaveFailed as error:
        return desk.kept.phase, str(error)
    return desk.kept.phase, ""


def call(desk: Desk, name: str, *args: Any, **options: Any) -> Any:
    """Call a method of the Checkpointer, or give an attribute."""
    value = getattr(desk.checkpointer, name)
    return value(*args, **options) if callable(value) else value


def digest(desk: Desk) -> str:
    """The digest of the live state."""
    return desk.training.digest()


def warnings(desk: Desk) -> list[str]:
    """What was warned of since the last time."""
    found, desk.warnings = desk.warnings, []
    return found


def close(desk: Desk, timeout: float = 30.0) -> None:
    """Wait for the last save, and leave."""
    desk.checkpointer.close(timeout)


def save_and_die(desk: Desk, step: int) -> None:
    """Be killed the moment that save has returned."""
    desk.checkpointer.save(step)
    os.kill(os.getpid(), signal.SIGKILL)


def overwrite(desk: Desk) -> None:
    """Change every tensor and stream behind the Checkpointer's back."""
    with torch.no_grad():
        for value in desk.training.model.state_dict().values():
            value.fill_(float("nan"))
        for held in desk.training.optimizer.state.values():
            for value in held.values():
                value.fill_(-1.0)
    torch.manual_seed(0)


class Deadly:
    """A value that is stored by dying: its trainer is killed half-way through the copy."""


def _die(_: Deadly) -> object:
    os.kill(os.getpid(), signal.SIGKILL)
    return None


def save_half(desk: Desk, step: int) -> None:
    """Be killed when the tensors are in the image, and the objects are not."""
    handfast.register(Deadly, _die, lambda _: Deadly())
    desk.checkpointer.save(step, extra=Deadly())


TEN_LINES = (
    """
from handfast.torch import Checkpointer

with Checkpointer("runs/gpt", state={"model": model, "optimizer": opt, "scheduler": sched, """
    """"loader": loader}) as ckpt:
    start = ckpt.restore()            # recovery line of the whole job; 0 on a first start
    for step in range(start, steps):
        train_step()
        ckpt.save(step + 1)           # returns at once: .staged() .persisted() .converged()
"""
)


def ten_lines(desk: Desk, home: str, steps: int) -> tuple[int, str]:
    """Run the lines of the design as they stand; gives the start and the digest of the end."""
    os.chdir(home)
    one = Training(full=True)
    names: dict[str, Any] = {
        "model": one.model,
        "opt": one.optimizer,
        "sched": one.scheduler,
        "loader": one.loader,
        "steps": steps,
        "train_step": one.step,
    }
    exec(TEN_LINES, names)  # noqa: S102 - they are to be run as they are printed
    parts = (one.model, one.optimizer, one.scheduler, one.loader)
    return names["start"], digest_of([part.state_dict() for part in parts])


def break_reading(desk: Desk, broken: bool = True) -> None:
    """Let a look at the live state fail with an error that is not handfast's."""

    def fail(*_: Any) -> Any:
        raise OSError("the disk of the user's object is gone")

    if broken:
        desk.training.scheduler.state_dict = fail
    else:
        del desk.training.scheduler.state_dict


def break_loading(desk: Desk, broken: bool = True) -> None:
    """Let the loader refuse what it is given."""

    def fail(_: Any) -> None:
        raise OSError("no such shard of the data set")

    loader = desk.training.loader
    if broken:
        loader.load_state_dict = fail
    else:
        del loader.load_state_dict


def slow_loading(desk: Desk, seconds: float) -> None:
    """Let the loader take its time over what it is given."""
    loader = desk.training.loader
    load = type(loader).load_state_dict

    def slow(state: Any) -> None:
        time.sleep(seconds)
        load(loader, state)

    loader.load_state_dict = slow


def interrupted_restore(desk: Desk, seconds: float) -> str:
    """Begin to restore, and be interrupted after so many seconds."""

    class Interrupt(BaseException):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        desk.checkpointer.restore()
    except Interrupt:
        return "interrupted"
    finally:
        signal.signal(signal.SIGALRM, before)
    return "restored"


def freeze_once_all_go_on(desk: Desk) -> None:
    """Stop as by SIGSTOP at the end of the next meeting, before anything is read or told."""
    attend = _Meeting.attend

    def freeze(*args: Any) -> bool:
        _Meeting.attend = attend
        gone_on = attend(*args)
        os.kill(os.getpid(), signal.SIGSTOP)
        return gone_on

    _Meeting.attend = freeze


def two(desk: Desk, one: str, other: str, **options: Any) -> None:
    """Make two Checkpointers that meet in one process group, each for a run of its own."""
    group = torch.distributed.group.WORLD
    desk.two = {
        path: Checkpointer(path, {"own": torch.zeros(2)}, group=group, **options)
        for path in (one, other)
    }


def restore_one_of_two(desk: Desk, path: str) -> int:
    """Resume one of them."""
    return desk.two[path].restore()


def model_digest(desk: Desk) -> str:
    """The digest of the model alone."""
    return digest_of(desk.training.model.state_dict())


def running_means(desk: Desk) -> str:
    """The digest of the buffers of the model."""
    return digest_of(dict(desk.training.model.named_buffers()))


def train_one(desk: Desk) -> None:
    """One more step, and a save."""
    train(desk, desk.step + 1)


def branch(desk: Desk, seed: int) -> None:
    """Go another way than the run went before."""
    torch.manual_seed(1000 + seed)


def become_nobody(desk: Desk, home: str) -> None:
    """Go on as a user who owns nothing here."""
    os.environ["XDG_RUNTIME_DIR"] = ""
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)


def train_with_workers(desk: Desk, to: int) -> list[str]:
    """Train while forked workers of a loader come and go; each inherits the connection."""
    data = torch.utils.data.TensorDataset(torch.randn(4, 2))
    loader = torch.utils.data.DataLoader(data, num_workers=2, multiprocessing_context="fork")
    found: list[str] = []
    while desk.step < to:
        for _ in loader:
            pass
        found += train(desk, desk.step + 1)
    return found


def misuse_in_a_child(desk: Desk) -> list[str]:
    """What a forked child gets when it uses its parent's Checkpointer, and leaves its ``with``."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = []
        for use in (lambda: desk.checkpointer.save(desk.step + 1), desk.checkpointer.restore):
            try:
                use()
            except RuntimeError as error:
                said.append(str(error))
        with desk.checkpointer:
            pass
        desk.checkpointer.close()
        os.write(theirs, "\n".join(said).encode())
        os._exit(0)
    os.close(theirs)
    os.waitpid(pid, 0)
    with os.fdopen(ours, "rb") as file:
        return file.read().decode().splitlines()


def witness(desk: Desk, to: int, log: str) -> None:
    """Train and save up to a step; what each step's state was is written down before it is saved.

    The state is that of this branch from its first step on: the streams were set anew.
    """
    with open(log, "a", encoding="utf-8", buffering=1) as file:
        while desk.step < to:
            desk.training.step()
            desk.step += 1
            file.write(f"{desk.step} {desk.training.digest()}\n")
            desk.last = desk.checkpointer.save(desk.step)


def steps_of(desk: Desk, path: str) -> list[int]:
    """The steps whose manifests are there, of any branch."""
    found = Path(path).glob("domains/*/*/manifests/*.manifest")
    return sorted({int(each.stem.split("-")[1].split(".")[0]) for each in found})


def speak(desk: Desk, epochs: str) -> None:
    """Let the next agent that this rank starts offer these epochs of the agents' protocol."""
    os.environ["HANDFAST_SPEAKS"] = epochs


def spoken(desk: Desk) -> dict[str, str]:
    """Which epoch this rank's agent speaks with each other one."""
    found: dict[str, str] = desk.checkpointer._session._line.call("status")["spoken"]
    return found


def divergent(desk: Desk) -> bool:
    """Whether this rank's agent has heard of ranks that differ."""
    return bool(desk.checkpointer._session.snapshot.divergent)
