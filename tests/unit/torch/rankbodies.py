"""What the ranks of `test_ranks.py` run; each is a process of its own, so they live in a module."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from statekit import Snapshot, same_bytes, train, unclean_gradients
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult
from torch.distributed.tensor import (
    DeviceMesh,
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from handfast.errors import Blocked, Poisoned, Refused, Unstorable
from handfast.torch.apply import apply, look
from handfast.torch.capture import capture
from handfast.torch.compare import homeless, refuse_homeless
from handfast.torch.gradients import Watch
from handfast.torch.group import Group
from handfast.torch.state import TorchState
from handfast.torch.tensors import local


def net(seed: int = 0, width: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, width))


def refused(state: dict[str, Any], why: str) -> bool:
    """Whether the capture names the cause."""
    try:
        capture(state)
    except Unstorable as error:
        return why in str(error)
    return False


def ddp_is_known_to_be_replicated(rank: int) -> None:
    """Parameters, broadcast buffers and moments are; what stands beside them is not."""
    model = DistributedDataParallel(net(rank))
    opt = torch.optim.AdamW(model.parameters())
    train(model, opt)
    head = nn.Linear(2, 2)
    loose = torch.optim.SGD(head.parameters(), momentum=0.9)
    train(head, loose, width=2)
    state = {"model": model, "opt": opt, "head": head, "loose": loose, "t": torch.ones(1)}
    captured = capture(state)
    every = {spec.path for spec in captured.specs}
    known = {path for path in every if path.startswith(("model/", "opt/"))}
    assert set(captured.replicated) == known
    assert "model/0.weight" in known  # and not model/module.0.weight
    assert "opt/state/0.weight/step" in known
    assert capture(state, replicated=("t",)).replicated == tuple(sorted(known | {"t"}))

    alone = DistributedDataParallel(net(rank), broadcast_buffers=False)
    found = capture({"model": alone}).replicated
    assert set(found) == {f"model/{name}" for name, _ in alone.module.named_parameters()}

    ignoring = net(rank)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(ignoring, ["0.weight"])
    found = capture({"model": DistributedDataParallel(ignoring)}).replicated
    assert "model/0.weight" not in found
    assert "model/0.bias" in found


def ddp_over_a_part_of_the_job_is_not_known(rank: int) -> None:
    """Replicas of one expert are alike; two experts are not."""
    groups = [dist.new_group([0]), dist.new_group([1])]
    model = DistributedDataParallel(net(rank), process_group=groups[rank])
    assert capture({"model": model}).replicated == ()


class Running(nn.Module):
    """Divides by an average of its own inputs, which each rank has others of."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(4, 4)
        self.register_buffer("average", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x) / self.average.clone()
        if self.training:
            with torch.no_grad():
                self.average.mul_(0.5).add_(0.5 * x.abs().mean(0) + 0.1)
        return y


def ddp_buffers_of_an_accumulation_are_each_ranks_own(rank: int) -> None:
    """DDP broadcasts them again only after the next forward that synchronizes."""

    def build(seed: int) -> tuple[DistributedDataParallel, torch.optim.Optimizer]:
        model = DistributedDataParallel(Running(seed))
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def go(model: Any, opt: torch.optim.Optimizer, *batches: int) -> None:
        for batch in batches:
            torch.manual_seed(100 * rank + batch)
            x = torch.randn(3, 4)
            if batch % 2:
                model(x).square().mean().backward()
                opt.step()
            else:
                opt.zero_grad()
                with model.no_sync():
                    model(x).square().mean().backward()

    model, opt = build(0)
    state = {"model": model, "opt": opt}
    known = {"model/linear.weight", "model/linear.bias"}
    go(model, opt, 0, 1)
    moments = {path.replace("model/", "opt/state/") + "/momentum_buffer" for path in known}
    assert set(capture(state).replicated) == known | moments | {"model/average"}
    go(model, opt, 2)
    before = capture(state, grads=True)
    assert set(before.replicated) == known | moments
    with torch.no_grad():  # as a validation does: the next forward pass broadcasts nothing
        model.eval()(torch.ones(1, 4))
        model.train()
    assert set(capture(state, previous=before).replicated) == known | moments
    saved = Snapshot(state, grads=True)
    other, live = build(1)
    go(other, live, 1)
    saved.restore({"model": other, "opt": live})
    for one in (model, opt), (other, live):
        go(*one, 3, 4, 5)
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(same_bytes(one, two) for one, two in pairs)
    assert other.require_forward_param_sync


def ddp_that_is_wrapped_anew_is_seen(rank: int) -> None:
    """Around the same module, at the root or inside: what is told is told of the new one.

    A wrapper of the user's that calls its child ``module`` as DDP does gives way to DDP, too.
    """

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    inner = Running(0)
    for around in (lambda m: m, nn.Sequential):
        first = capture({"model": around(DistributedDataParallel(inner))})
        anew = DistributedDataParallel(inner)
        with torch.no_grad():
            anew.eval()(torch.ones(1, 4))  # the next forward pass of this one broadcasts nothing
        state = {"model": around(anew)}
        again, fresh = capture(state, previous=first), capture(state)
        assert again.objects["model"] == fresh.objects["model"] != first.objects["model"]
        assert again.replicated == fresh.replicated != first.replicated
        bare = capture({"model": around(Wrapper(inner))})
        assert not bare.replicated
        assert capture(state, previous=bare).replicated == fresh.replicated


def ddp_that_lets_its_ranks_differ_is_not_known(rank: int) -> None:
    """Local SGD and compressed gradients with what they leave behind: each rank stores its own."""
    model = DistributedDataParallel(net(rank))
    opt = torch.optim.AdamW(model.parameters())
    train(model, opt)
    state = {"model": model, "opt": opt}
    before = capture(state)
    assert len(before.replicated) == len(before.specs)
    for entry in opt.state.values():
        entry["error"] = torch.full((2,), float(rank))
    every = {spec.path for spec in capture(state).specs}
    beside = {path for path in every if path.endswith("/error")}
    assert len(beside) == len(opt.state)
    assert set(capture(state).replicated) == every - beside
    with model.no_sync():
        assert capture(state, previous=before).replicated == ()
        assert capture(state, grads=True).replicated != ()
    model.register_comm_hook(None, allreduce_hook)
    assert capture(state, previous=before).replicated == ()
    del model._comm_hooks  # a torch that keeps them elsewhere
    assert capture(state).replicated != ()


class Shared(torch.optim.Optimizer):
    """Muon's reference: each rank updates every second parameter, and then all are exchanged."""

    def __init__(self, params: Any, everywhere: bool = False) -> None:
        super().__init__(list(params), {"lr": 0.1})
        self.everywhere = everywhere

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        params = self.param_groups[0]["params"]
        for index, p in enumerate(params):
            mine = index % 2 == dist.get_rank()
            if mine or self.everywhere:
                state = self.state[p]
                state.setdefault("momentum_buffer", torch.zeros_like(p)).add_(
                    p.grad, alpha=int(mine)
                )
                p.add_(state["momentum_buffer"], alpha=-0.1)
            dist.broadcast(p, index % 2)


class Fused(torch.optim.AdamW):
    """A user's own: nothing is known of what it does."""


def state_that_ranks_share_out_is_not_known(rank: int) -> None:
    """ZeRO by hand, Muon: rank 1's moments were stored by nobody, or came back as rank 0's."""

    def known(make: Any, steps: int = 1) -> set[bool]:
        """Whether the optimizer state is known; the model must be."""
        model = DistributedDataParallel(net(0))
        opts = make(list(model.parameters()))
        train(model, *opts.values(), steps=steps)
        captured = capture({"model": model, **opts})
        shared = set(captured.replicated)
        assert {path for path in shared if path.startswith("model/")} == {
            f"model/{name}" for name in model.module.state_dict()
        }
        state = [spec.path for spec in captured.specs if "/state/" in spec.path]
        return {path in shared for path in state}

    adamw = torch.optim.AdamW
    for make in (
        lambda ps: {"opt": adamw(ps[rank::2])},
        lambda ps: {"one": adamw(ps[rank:3]), "two": torch.optim.SGD(ps[4:], momentum=0.9)},
        lambda ps: {"opt": Shared(ps)},
        lambda ps: {"opt": Shared(ps, everywhere=True)},
        lambda ps: {"opt": Fused(ps)},
        lambda ps: {"opt": adamw(ps[:3]), "muon": Shared(ps[3:])},
        hooked,
        patched,
    ):
        assert known(make) == {False}, make
    for make in (
        lambda ps: {"opt": adamw(ps)},
        lambda ps: {"one": adamw(ps[:2]), "two": torch.optim.SGD(ps[2:], lr=0.1)},
        lambda ps: {"one": adamw(ps[:2]), "two": torch.optim.SGD(ps[2:], momentum=0.9)},
        scheduled,
        watched,
        frozen,
    ):
        assert known(make) == {True}, make
    assert known(lambda ps: {"opt": adamw(ps)}, steps=0) == set()

    model = DistributedDataParallel(net(0))
    opt = adamw(model.parameters())
    model(torch.randn(3, 4)).square().sum().backward()
    for p in list(model.parameters())[1 - rank :: 2]:
        p.grad = None  # torch's own step leaves out what another rank is to step
    opt.step()
    assert not any("/state/" in path for path in capture({"model": model, "opt": opt}).replicated)


def optimizer_state_is_left_out_where_nothing_speaks_against_it(rank: int) -> None:
    """The first of a node stores it all the same; a hook on the step makes it each rank's own."""
    model = DistributedDataParallel(net(0))
    opt = torch.optim.AdamW(model.parameters())
    held = TorchState(
        {"model": model, "opt": opt}, rng=False, replicated=(), pickle=(), verify="fsync"
    )
    train(model, opt)

    def stored() -> int:
        """How many tensors of the optimizer it stores."""
        made = held.capture(None, False, lambda _, digests: list(digests))
        return sum(slot.spec.path.startswith("opt/") for slot in made.slots)

    every = 3 * len(list(model.parameters()))
    assert stored() == every
    held.shares(1, [0, 1])
    assert stored() == 0
    held.shares(0, [0, 1])
    assert stored() == every
    held.shares(1, [0, 1])
    hook = opt.register_step_post_hook(lambda *_: None)
    assert stored() == every
    hook.remove()
    assert stored() == 0


def hooked(params: list[torch.Tensor]) -> dict[str, Any]:
    opt = torch.optim.AdamW(params)
    opt.register_step_pre_hook(lambda *_: None)
    return {"opt": opt}


def patched(params: list[torch.Tensor]) -> dict[str, Any]:
    opt = torch.optim.AdamW(params)
    step = opt.step
    setattr(opt, "step", lambda closure=None: step(closure))  # noqa: B010 - as a scheduler does
    return {"opt": opt}


def scheduled(params: list[torch.Tensor]) -> dict[str, Any]:
    opt = torch.optim.AdamW(params)
    torch.optim.lr_scheduler.StepLR(opt, 3)
    return {"opt": opt}


def watched(params: list[torch.Tensor]) -> dict[str, Any]:
    opt = torch.optim.AdamW(params)
    Watch({"opt": opt})
    return {"opt": opt}


def frozen(params: list[torch.Tensor]) -> dict[str, Any]:
    """LoRA: what has no gradient is nobody's to step."""
    params[0].requires_grad_(False)
    return {"opt": torch.optim.AdamW(params[1:])}


def a_run_saved_under_ddp_loads_without(rank: int) -> None:
    """And the other way: names are the same, and so is what comes after."""
    model = DistributedDataParallel(net(rank))
    opt = torch.optim.AdamW(model.parameters())
    train(model, opt)
    saved = Snapshot({"model": model, "opt": opt})
    plain = net(7)
    fresh = torch.optim.AdamW(plain.parameters())
    saved.restore({"model": plain, "opt": fresh})
    pairs = zip(plain.state_dict().values(), model.state_dict().values(), strict=True)
    assert all(same_bytes(a, b) for a, b in pairs)
    back = DistributedDataParallel(net(8))
    Snapshot({"model": plain, "opt": fresh}).restore(
        {"model": back, "opt": torch.optim.AdamW(back.parameters())}
    )


def a_rank_that_does_not_come_is_named(rank: int) -> None:
    """Whatever torch's default device is: a token on another one would not be waited for."""
    group = Group(None, "run", 0.5)
    if rank == 0:
        with torch.device("meta"), pytest.raises(Blocked) as caught:
            group.gather("peek", b"")
        assert caught.value.by == ("rank 1",)
    dist.barrier()


def a_gathering_gives_all_the_data_of_all_and_leaves_none_of_it(rank: int) -> None:
    """In the order of the ranks, whatever bytes they are; the job's store is not filled up."""
    group = Group(None, "run", 30.0)
    for _ in range(3):
        assert group.gather("peek", b"\0 %d \xff" % rank) == [b"\0 0 \xff", b"\0 1 \xff"]
    dist.barrier()
    store = dist.distributed_c10d._get_default_store()
    room = f"handfast/{dist.distributed_c10d._get_default_group().group_name}/1/peek"
    assert store.check([f"{room}/{n}/outcome" for n in range(3)])
    assert not any(store.check([f"{room}/{n}/{r}"]) for n in range(3) for r in range(2))


def zeros_that_outlive_steps_are_put_back(rank: int) -> None:
    """For parameters in DDP's buckets, and for those in parts."""
    for views in (False, True):
        models = [DistributedDataParallel(net(n), gradient_as_bucket_view=views) for n in range(2)]
        resume_zeros(*((m, torch.optim.AdamW(m.parameters())) for m in models))
    resume_zeros(sharded(0, 4), sharded(1, 4))


def resume_zeros(*pairs: tuple[nn.Module, torch.optim.Optimizer]) -> None:
    (model, opt), (other, live) = pairs
    end = Watch({"opt": opt}).end

    def go(model: nn.Module, opt: torch.optim.Optimizer) -> None:
        torch.manual_seed(dist.get_rank())
        for _ in range(3):  # DDP makes its bucket views anew after the first
            opt.zero_grad(set_to_none=False)
            model(torch.randn(3, 4)).square().sum().backward()
            opt.step()

    go(model, opt)
    Snapshot({"model": model, "opt": opt}).restore({"model": other, "opt": live})
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert (mine.grad is None) is (theirs.grad is None)
        assert mine.grad is None or not local(mine.grad.detach()).any()
    states = []
    for one, its in pairs:
        go(one, its)
        states.append(Snapshot({"model": one, "opt": its}, rng=False).buffer)
    assert states[0] == states[1]
    end()


def ddp_accumulation_is_seen(rank: int) -> None:
    """Under no_sync, and where gradients are views into buckets."""
    for views in (False, True):
        model = DistributedDataParallel(net(rank), gradient_as_bucket_view=views)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        state = {"model": model, "opt": opt}
        Watch(state)
        for to_none in (True, False):
            for _ in range(2):
                with model.no_sync():
                    model(torch.randn(3, 4)).sum().backward()
                assert "model/0.weight" in unclean_gradients(state)
                model(torch.randn(3, 4)).sum().backward()
                assert "model/0.weight" in unclean_gradients(state)
                opt.step()
                assert unclean_gradients(state) == ()
                opt.zero_grad(set_to_none=to_none)
                assert unclean_gradients(state) == ()


def sharded(seed: int, width: int = 1) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    """Uneven shards of five rows, empty ones of one row; frozen rows; moments sharded alike."""
    model = net(seed, width)
    model[0].bias.requires_grad_(False)
    fully_shard(model[0])
    fully_shard(model)
    return model, torch.optim.AdamW(model.parameters())


def fsdp_blocks_are_recorded(rank: int) -> None:
    """Local shape, offset and global shape are those that torch computes itself."""
    model, opt = sharded(0)
    train(model, opt)
    captured = capture({"model": model, "opt": opt})
    specs = {spec.path: spec for spec in captured.specs}
    shards = {k: v for k, v in model.state_dict().items() if isinstance(v, DTensor)}
    assert len(shards) == len(list(model.parameters()))
    for name, tensor in shards.items():
        for path in (f"model/{name}", f"opt/state/{name}/exp_avg"):
            if name == "0.bias" and path.startswith("opt"):
                assert path not in specs
                continue
            expected = compute_local_shape_and_global_offset(
                tensor.shape, tensor.device_mesh, tensor.placements
            )
            assert (specs[path].shape, specs[path].offset) == expected
            assert specs[path].global_shape == tuple(tensor.shape)
    sizes = {spec.shape[0] for path, spec in specs.items() if path.startswith("model/2")}
    world = dist.get_world_size()
    assert sizes == ({1} if world == 1 or rank == 0 else {0})
    assert not any(isinstance(t, DTensor) for t in captured.tensors)
    assert captured.replicated == ()
    assert capture({"model": model}, replicated=("model",)).replicated == tuple(
        sorted(f"model/{k}" for k, v in model.state_dict().items() if not isinstance(v, DTensor))
    )


def fsdp1_is_refused_with_its_successor(rank: int) -> None:
    """Its state_dict gathers over the ranks, and a save contains no collective that blocks."""
    model = nn.Sequential(FullyShardedDataParallel(net(), device_id=torch.device("cpu")))
    assert refused({"model": model}, "fully_shard()")
    assert refused({"model": model}, "model/0: ")


def fsdp_goes_on_bit_for_bit(rank: int) -> None:
    """Into a fresh model and optimizer, whose moments must become DTensors again."""
    one, other = sharded(0), sharded(1)
    train(*one, steps=2)
    saved = Snapshot(dict(zip(("model", "opt"), one, strict=True)))
    live = dict(zip(("model", "opt"), other, strict=True))
    saved.restore(live)
    for name in ("exp_avg", "step"):
        mine = [state[name] for state in other[1].state.values()]
        theirs = [state[name] for state in one[1].state.values()]
        assert [type(t) for t in mine] == [type(t) for t in theirs]
        assert all(a.stride() == b.stride() for a, b in zip(mine, theirs, strict=True))
    states = []
    for model, opt in (one, other):
        torch.manual_seed(5 + rank)
        train(model, opt, steps=3)
        states.append(Snapshot({"model": model, "opt": opt}, rng=False).buffer)
    assert states[0] == states[1]


def fsdp_accumulation_is_seen(rank: int) -> None:
    """Reduced gradients in place, and unsharded ones that wait for their reduction."""
    model, opt = sharded(0)
    state = {"model": model, "opt": opt}
    Watch(state)
    for to_none in (True, False):
        for _ in range(3):
            model.set_requires_gradient_sync(False)
            model(torch.randn(3, 4)).square().sum().backward()
            model.set_requires_gradient_sync(True)
            assert "model/0.weight (not reduced yet)" in unclean_gradients(state)
            assert "model/0.weight (not reduced yet)" in unclean_gradients(state, stored=True)
            model(torch.randn(3, 4)).square().sum().backward()
            assert "model/0.weight" in unclean_gradients(state)
            held = [local(p.grad).clone() for p in model.parameters() if p.grad is not None]
            saved = Snapshot(state, grads=True)
            model(torch.randn(3, 4)).square().sum().backward()
            saved.restore(state)
            assert all(
                torch.equal(local(p.grad), was)
                for p, was in zip(
                    (q for q in model.parameters() if q.grad is not None), held, strict=True
                )
            )
            opt.step()
            assert unclean_gradients(state) == ()
            model[2].weight.grad.add_(1.0)  # on the DTensor, whose shard is empty on rank 1
            assert ("model/2.weight" in unclean_gradients(state)) is (rank == 0)
            model(torch.randn(3, 4)).square().sum().backward()
            assert "model/0.weight" in unclean_gradients(state)
            opt.zero_grad(set_to_none=to_none)
            assert unclean_gradients(state) == ()


def fsdp_gradients_that_are_held_back_go_at_a_restore(rank: int) -> None:
    """In the middle of an accumulation: they were added to those of the moment that was restored.

    Under HSDP those that only a part of the job has reduced, too.
    """
    model, _ = sharded(0)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    other = net(0)
    other[0].weight.requires_grad_(False)  # the first of its group
    fully_shard(other, mesh=mesh)
    for built, hold, mark in (
        (model, model.set_requires_gradient_sync, "(not reduced yet)"),
        (other, other.set_requires_all_reduce, "(not reduced by all yet)"),
    ):
        opt = torch.optim.SGD(built.parameters(), lr=0.1)
        state = {"model": built, "opt": opt}
        Watch(state)
        train(built, opt)
        saved = Snapshot(state)
        hold(False)
        built(torch.randn(3, 4)).square().sum().backward()
        hold(True)
        assert any(mark in name for name in unclean_gradients(state, stored=True))
        apply(state, saved.saved, saved.values, only=("model",))
        assert any(mark in name for name in unclean_gradients(state, stored=True))
        saved.restore(state)
        assert unclean_gradients(state) == ()


def fsdp_over_several_meshes_is_looked_at(rank: int) -> None:
    """A group of parameters a mesh, where torch has it: no save was possible."""
    whole = init_device_mesh("cpu", (2,))
    part = init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))["b"]
    model = net(0)
    chosen = set(model[0].parameters())
    apart = ShardPlacementResult(placement=Shard(0), mesh_info=FSDPMeshInfo(part, shard_mesh_dim=0))
    fully_shard(model, mesh=whole, shard_placement_fn=lambda p: apart if p in chosen else None)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    state = {"model": model, "opt": opt}
    Watch(state)
    train(model, opt)
    assert unclean_gradients(state) == ()
    model.set_requires_gradient_sync(False)
    model(torch.randn(3, 4)).square().sum().backward()
    found = unclean_gradients(state)
    assert any("(not reduced yet)" in name for name in found), found


def other_placements_are_refused_dry(rank: int) -> None:
    """Another world size or dimension: by path, before anything is touched."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.arange(12.0).reshape(4, 3)
    rows, columns = (distribute_tensor(whole, mesh, [Shard(dim)]) for dim in (0, 1))
    (found,) = Snapshot({"t": rows}).differences({"t": columns})
    assert (found.path, found.what) == ("t", "placement")
    (found,) = Snapshot({"t": rows}).differences({"t": rows.to_local()})
    assert (found.path, found.what) == ("t", "shape")


def a_tensor_that_each_rank_holds_whole_is_known(rank: int) -> None:
    """Replicated over all of the job, not over a part of it; pending sums are refused."""
    whole = torch.arange(6.0).reshape(2, 3)
    mesh = init_device_mesh("cpu", (2,))
    part = init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))["b"]
    state = {
        "all": distribute_tensor(whole, mesh, [Replicate()]),
        "part": distribute_tensor(whole.clone(), part, [Replicate()]),
        "rows": distribute_tensor(whole.clone(), mesh, [Shard(0)]),
    }
    assert capture(state, replicated=("**",)).replicated == ("all",)
    pending = DTensor.from_local(whole, mesh, [Partial()])
    assert refused({"box": {"t": pending}}, "box/t: ")
    assert refused({"box": {"t": pending}}, "no single block")


def a_tensor_that_is_cut_twice_along_one_dimension_is_refused(rank: int) -> None:
    """FSDP2 with tensor parallel: what is said to do can be done, and pickle= is no way out."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))

    def model(**options: Any) -> nn.Module:
        made = nn.Sequential(nn.Linear(4, 4, bias=False))
        parallelize_module(made, mesh["tp"], {"0": ColwiseParallel()})
        fully_shard(made, mesh=mesh["dp"], **options)
        return made

    with pytest.raises(Unstorable, match=r"model/0\.weight: .*along another one") as caught:
        capture({"model": model()})
    assert "pickle" not in str(caught.value)
    saved = model(shard_placement_fn=lambda _: Shard(1))
    (spec,) = capture({"model": saved}).specs
    assert (spec.shape, spec.offset) == ((2, 4), (2 * rank, 0))
    live = model(shard_placement_fn=lambda _: Shard(1))
    Snapshot({"model": saved}).restore({"model": live})
    assert same_bytes(local(live[0].weight), local(saved[0].weight))


def shards_that_are_cut_otherwise_between_saves_are_seen(rank: int) -> None:
    """Of two tensors of one shape the other is a DTensor now; a moment is sharded otherwise now."""
    mesh = init_device_mesh("cpu", (2,))
    plain = [torch.rand(4, 4) for _ in range(2)]
    cut = [DTensor.from_local(t, mesh, [Replicate()], run_check=False) for t in plain]
    first = capture({"a": plain[0], "b": cut[1]})
    again = capture({"a": cut[0], "b": plain[1]}, previous=first)
    assert (first.replicated, again.replicated) == (("b",), ("a",))

    weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    opt = torch.optim.SGD([weight], momentum=0.9)
    weight.grad = torch.ones_like(weight)
    opt.step()
    first = capture({"opt": opt})
    moment = opt.state[weight]["momentum_buffer"]
    opt.state[weight]["momentum_buffer"] = moment.redistribute(mesh, [Replicate()])
    again, fresh = capture({"opt": opt}, previous=first), capture({"opt": opt})
    assert again.specs == fresh.specs
    assert again.objects["opt"] == fresh.objects["opt"] != first.objects["opt"]


class Factored(torch.optim.SGD):
    """Keeps state that is not sharded as its parameter is: a whole DTensor, and a plain tensor."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if "row" not in state:
                state["row"] = DTensor.from_local(
                    torch.rand(3), p.device_mesh, [Replicate()], run_check=False
                )
                state["plain"] = torch.rand(p.shape)
            state["row"].mul_(0.5)


def state_that_is_sharded_otherwise_comes_back_as_it_was(rank: int) -> None:
    """Adafactor's rows and columns are whole where the parameter is in parts."""
    opts = []
    for seed in range(2):
        model, _ = sharded(seed)
        opt = Factored(model.parameters(), momentum=0.9)
        train(model, opt)
        opts.append((model, opt))
    (model, opt), (other, live) = opts
    live.state.clear()
    Snapshot({"model": model, "opt": opt}).restore({"model": other, "opt": live})
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        for key in opt.state[theirs]:
            one, two = live.state[mine][key], opt.state[theirs][key]
            assert type(one) is type(two)
            if isinstance(one, DTensor):
                assert one.placements == two.placements
            assert same_bytes(local(one), local(two))


class Average:
    """A user's EMA of a sharded model: a dict of DTensors behind state_dict()."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow = {k: v.clone() for k, v in model.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        return self.shadow

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert {k: type(v) for k, v in state.items()} == {
            k: type(v) for k, v in self.shadow.items()
        }
        self.shadow = state


def a_users_average_of_shards_comes_back(rank: int) -> None:
    """As DTensors on the live mesh; other ranks' shards are not touched."""
    (one, _), (other, _) = sharded(0), sharded(1)
    mine, theirs = Average(one), Average(other)
    Snapshot({"ema": mine}).restore({"ema": theirs})
    for key, value in mine.shadow.items():
        if isinstance(value, DTensor):
            assert theirs.shadow[key].placements == value.placements
            assert theirs.shadow[key].device_mesh == value.device_mesh
        assert same_bytes(local(theirs.shadow[key]), local(value))


class Asked(torch.optim.AdamW):
    """An optimizer with a ``state_dict`` of its own, so that it is asked for its state."""

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict()


class History(torch.optim.SGD):
    """Keeps its last gradients in a list, as L-BFGS does."""

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                self.state[p].setdefault("past", []).append(p.grad.clone())
        super().step(closure)


def shards_that_are_not_there_yet_are_made_as_shards(rank: int) -> None:
    """A fresh optimizer's moments, in lists too, and what a box is filled with: plain parts of
    rows came back, and the first step raised."""
    for kind in (Asked, History):
        runs = []
        for seed in range(2):
            model, _ = sharded(seed, width=4)
            opt = kind([p for p in model.parameters() if p.requires_grad], 0.1)
            runs.append((model, opt, {"model": model, "opt": opt, "box": {}}))
        (model, opt, state), (other, live, fresh) = runs
        train(model, opt, steps=2)
        state["box"]["best"] = model[0].weight.detach().clone()
        Snapshot(state).restore(fresh)
        best = fresh["box"]["best"]
        assert (best.placements, best.device_mesh) == (
            model[0].weight.placements,
            model[0].weight.device_mesh,
        )
        for one, two in ((model, opt), (other, live)):
            torch.manual_seed(5)
            train(one, two)
        pairs = [(model.state_dict(), other.state_dict()), (opt.state_dict(), live.state_dict())]
        for one, two in pairs:
            assert leaves(one) == leaves(two)


def leaves(value: Any) -> list[Any]:
    """What a tree holds: tensors by their cuts and bytes."""
    if isinstance(value, torch.Tensor):
        placed = value.placements if isinstance(value, DTensor) else None
        return [placed, tuple(value.shape), local(value.detach()).reshape(-1).tolist()]
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in (key, *leaves(item))]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def shards_that_have_no_mesh_are_refused_dry(rank: int) -> None:
    """Where no live DTensor is on such a mesh, or those of two meshes would do."""
    meshes = [init_device_mesh("cpu", (2,), mesh_dim_names=(name,)) for name in "ab"]
    whole = torch.arange(8.0).reshape(4, 2)
    rows = [distribute_tensor(whole, mesh, [Shard(0)]) for mesh in meshes]
    saved = Snapshot({"box": {"best": rows[0], "count": torch.ones(2)}})
    empty: dict[str, Any] = {"box": {}}

    def found(live: dict[str, Any]) -> list[str]:
        return homeless(capture(live), look(live, saved.saved, {})[1])

    assert found(empty) == ["box/best"]
    assert found({**empty, "m": torch.ones(4, 2)}) == ["box/best"]
    assert found({**empty, "m": distribute_tensor(whole[:2], meshes[0], [Replicate()])}) == []
    one, other = rows[0], distribute_tensor(whole, DeviceMesh("cpu", [1, 0]), [Shard(0)])
    assert found({**empty, "m": other}) == ["box/best"]  # its rows lie on the other rank
    assert found({**empty, "m": one, "n": other}) == []
    assert found({**empty, "m": one, "n": rows[1]}) == ["box/best"]
    with pytest.raises(Refused, match=r"1 tensors were parts of DTensors.*: box/best"):
        refuse_homeless(found(empty), "shard 0")
    with pytest.raises(Poisoned, match="no mesh of the live state"):
        apply(empty, saved.saved, saved.values)
    assert empty == {"box": {}}


def shards_are_no_extra(rank: int) -> None:
    """A local part came back in place of what was given: refused by name, with the ways out."""
    mesh = init_device_mesh("cpu", (2,))
    rows = distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)])
    with pytest.raises(Unstorable, match=r"extra/best\[0\]: .*pass its full_tensor\(\)"):
        capture({"t": rows}, extra={"best": [rows]})
    assert Snapshot({"t": rows}, extra=rows.full_tensor()).restore({"t": rows}).shape == (4, 2)
