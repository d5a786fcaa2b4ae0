"""Measures a round: ``python gate_scale.py RANKS STACKS [torch]``, over memory or torch's store."""

from __future__ import annotations

import sys
import time

from gatekit import FLEETS, meet, ranks, read, rules_of

from handfast.fleet.gate.keys import Keys, Memory, Torch


def members(count: int, stacks: int) -> list[tuple[str, dict[str, str | None]]]:
    """Ranks, eight a node, of so many stacks, one of them with another NCCL."""
    one = ranks(read(FLEETS / "legit-nic-names.yaml"))[0][1]
    found = [
        (f"node-{rank // 8}", {**one, "kernel.release": f"6.8.{rank // 8 % stacks}"})
        for rank in range(count)
    ]
    found[count // 2][1]["nccl.version"] = "2.20.5"
    return found


def main(count: int, stacks: int, store: str) -> None:
    """Hold one round, and say how long it took from the first post to the last that heard."""
    keys: Keys = Memory()
    if store == "torch":
        from torch.distributed import TCPStore

        keys = Torch(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    who, rules = members(count, stacks), rules_of("")
    began = time.perf_counter()
    verdicts = meet(who, rules, keys=keys)
    print(f"{time.perf_counter() - began:.2f} s for {len(verdicts)} ranks: {verdicts[0].line}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), "".join(sys.argv[3:]))
