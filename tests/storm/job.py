"""A small sharded training that witnesses itself: one rank of the storm's job.

Every rank writes to a log of its own, outside of handfast's directories: what it resumed from, a
digest of its whole state after every step, and each step that it was told had converged. The
digests of an uninterrupted run without handfast are the measure.
"""

from __future__ import annotations

import hashlib
import os
import random
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

WIDTH = 96


def build(kind: str, rank: int, size: int) -> tuple[nn.Module, torch.optim.Optimizer, object]:
    """Build model, optimizer and scheduler, the same on every start."""
    torch.manual_seed(1)
    model: nn.Module = nn.Sequential(
        nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * WIDTH, WIDTH)
    )
    if kind == "fsdp":
        mesh = dist.device_mesh.init_device_mesh("cpu", (size,))
        for layer in (model[0], model[3]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(100 + rank)
    random.seed(100 + rank)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.97)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: object) -> None:
    """Do one step whose result hangs on every random stream and on all of the state."""
    x = torch.randn(4, WIDTH) * random.uniform(0.5, 1.5)
    loss = (model(x) - x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()


def digest(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: object) -> str:
    """Digest everything that a resume must bring back, this rank's part of it."""
    h = hashlib.blake2b(digest_size=8)
    for name, parameter in model.named_parameters():
        h.update(name.removeprefix("module.").encode())
        for value in (parameter.detach(), *_moments(optimizer, parameter)):
            local = value.to_local() if hasattr(value, "to_local") else value
            h.update(local.contiguous().numpy().tobytes())
    h.update(torch.get_rng_state().numpy().tobytes())
    h.update(repr((random.getstate(), scheduler.state_dict())).encode())
    return h.hexdigest()


def _moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> list[torch.Tensor]:
    held = optimizer.state.get(parameter, {})
    return [held[key] for key in sorted(held)]


def start(rank: int, size: int, meet: str) -> None:
    """Join the job's process group through a file that no other start uses."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=size)


def reference(rank: int, size: int, meet: str, kind: str, steps: int, out: str) -> object:
    """Train without interruption and without handfast; one digest a line.

    Gives what was trained, to be kept until the process ends: freeing DDP's reducer may hang (it
    joins gloo's threads with the GIL held, and they may want it: pytorch#56297).
    """
    start(rank, size, meet)
    parts = build(kind, rank, size)
    if kind == "ddp":  # as the job does: the order of the reduction is that of primed buckets
        streams = torch.get_rng_state()
        parts[0](torch.zeros(4, WIDTH)).square().mean().backward()
        parts[1].zero_grad()
        torch.set_rng_state(streams)
    with open(f"{out}.{rank}", "w", encoding="utf-8") as log:
        log.write(digest(*parts) + "\n")
        for _ in range(steps):
            train_step(*parts)
            log.write(digest(*parts) + "\n")
    dist.destroy_process_group()
    return parts


def main(rank: int, size: int, meet: str, kind: str, steps: int, path: str, out: str) -> object:
    """Restore, train on and save every step, and write down what happens; gives what was trained,
    to be kept as that of :func:`reference`.
    """
    from handfast import Keep
    from handfast.torch import Checkpointer

    start(rank, size, meet)
    model, optimizer, scheduler = parts = build(kind, rank, size)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    with (
        open(f"{out}.{rank}", "a", encoding="utf-8") as log,
        Checkpointer(path, state, every=2, keep=Keep(newest=4), patience_s=120.0) as checkpointer,
    ):
        if kind == "ddp":
            x = torch.zeros(4, WIDTH)
            checkpointer.prime(lambda: model(x).square().mean().backward())
        began = checkpointer.restore()
        _say(log, "R", began, digest(*parts), checkpointer)
        if os.environ.get("STORM_BACK") and (back := _agreed(checkpointer)):
            _say(log, "I", back, "", checkpointer)  # a kill may come before "B" is written
            began = checkpointer.restore(step=back)
            _say(log, "B", began, digest(*parts), checkpointer)
        told = began
        for step in range(began, steps):
            train_step(*parts)
            _say(log, "S", step + 1, digest(*parts), checkpointer)
            checkpointer.save(step + 1)
            latest = checkpointer.latest_step() or 0
            if latest > told:
                told = latest
                _say(log, "C", latest, "", checkpointer)
            time.sleep(float(os.environ.get("STORM_PAUSE_S", "0.01")))
    dist.destroy_process_group()
    return parts


def _agreed(checkpointer: object) -> int:
    """The newest step below the one resumed that all ranks still hold; 0 if there is none."""
    found: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, checkpointer.all_steps())
    shared = set.intersection(*map(set, found)) - {checkpointer.restored.step}
    return max(shared, default=0)


def _say(log: object, what: str, step: int, said: str, checkpointer: object) -> None:
    """A line: what happened, the step, a digest, the generation and the base that it lives from."""
    base = checkpointer.restored
    log.write(f"{what} {step} {said or '-'} {checkpointer.lattice.generation} {base}\n")
    log.flush()
