"""One rank of a small FSDP2 training under torchrun; rank 1 can kill itself once, half-way.

``python under_torchrun.py RUN OUT STEPS KILL_AT``: writes a digest of its state after each step to
``OUT.<rank>``.
"""

from __future__ import annotations

import os
import signal
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from training import digest

from handfast.torch import Checkpointer


def meet() -> None:
    """Join the group of this start: torchrun keeps one store over its restarts (docs/guide.md)."""
    env = os.environ
    served = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
    store = dist.PrefixStore(f"start-{env['TORCHELASTIC_RESTART_COUNT']}", served)
    rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)


def main(run: str, out: str, steps: int, kill_at: int) -> None:
    """Train, save each step, and die once."""
    meet()
    torch.manual_seed(7)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 8)
    )
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = {"model": model, "optimizer": optimizer}
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    with (
        open(f"{out}.{dist.get_rank()}", "a", encoding="utf-8") as log,
        Checkpointer(run, state, patience_s=60.0) as checkpointer,
    ):
        began = checkpointer.restore()
        print(f"began {began}", file=log, flush=True)
        for step in range(began + 1, steps + 1):
            x = torch.randn(4, 8)
            optimizer.zero_grad()
            (model(x) - x).square().mean().backward()
            optimizer.step()
            parts = [model.state_dict(), optimizer.state_dict(), torch.get_rng_state()]
            print(f"{step} {digest(parts)}", file=log, flush=True)
            saved = checkpointer.save(step)
            if step == kill_at - 2:
                saved.converged(60.0)
            if first and step == kill_at and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
