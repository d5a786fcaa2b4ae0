"""Writes golden/orbax, golden/ocdbt and golden/flax with the real libraries, once, by hand:

    pip install jax==0.10.2 orbax-checkpoint==0.12.8 optax==0.2.8 flax==0.12.8
    python -P tests/audit/golden/write_orbax.py  # -P: else golden/tensorflow is taken for one

What was trained is a network of 800 parameters (2,500 in `sharded`, so that not all of a shard lies
inside of the B+tree), on a CPU; `sharded` by two processes of two devices each.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent / "orbax"


def network(width: int) -> dict[str, Any]:
    """Two layers and a norm."""
    import jax

    one, two = jax.random.split(jax.random.key(0))
    return {
        "first": {"kernel": jax.random.normal(one, (8, width)), "bias": jax.numpy.zeros(width)},
        "norm": {"scale": jax.numpy.ones(width)},
        "last": {"kernel": jax.random.normal(two, (width, 16)), "bias": jax.numpy.zeros(16)},
    }


def loss(params: Any, batch: Any) -> Any:
    """How far the network's output is from a sum of its input."""
    import jax.numpy as jnp

    hidden = jnp.tanh(batch @ params["first"]["kernel"] + params["first"]["bias"])
    hidden *= params["norm"]["scale"]
    out = hidden @ params["last"]["kernel"] + params["last"]["bias"]
    return ((out - batch.sum(-1, keepdims=True)) ** 2).mean()


def trained(
    tx: Any, steps: int, *, width: int = 32, dtype: Any = None, place: Any = None
) -> Iterator[tuple[int, Any]]:
    """A flax TrainState after each of some steps."""
    import jax
    from flax.training.train_state import TrainState

    params = network(width)
    if dtype is not None:
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    if place is not None:
        params = place(params)
    state = TrainState.create(apply_fn=loss, params=params, tx=tx)
    step = jax.jit(lambda state, batch: state.apply_gradients(
        grads=jax.grad(loss)(state.params, batch)))  # fmt: skip
    for number in range(steps):
        batch = jax.random.normal(jax.random.key(100 + number), (16, 8))
        state = step(state, batch.astype(dtype) if dtype is not None else batch)
        yield number + 1, state


def managed(to: Path) -> None:
    """CheckpointManager as it comes: OCDBT, zarr 2; AdamW with a schedule; step 1 was deleted."""
    import optax
    import orbax.checkpoint as ocp

    tx = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 10))
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(to, options=options) as manager:
        for number, state in trained(tx, 3):
            manager.save(number, args=ocp.args.StandardSave(state))


def plain(to: Path) -> None:
    """No OCDBT: a directory a tensor. Gradients accumulate over 2 steps; names with a prefix."""
    import optax
    import orbax.checkpoint as ocp

    tx = optax.MultiSteps(optax.chain(optax.clip(1.0), optax.sgd(1e-2, momentum=0.9)), 2)
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    options = ocp.CheckpointManagerOptions(step_prefix="ckpt", step_format_fixed_length=6)
    with ocp.CheckpointManager(
        to, options=options, item_names=("state",), item_handlers={"state": handler}
    ) as manager:
        for number, state in trained(tx.gradient_transformation(), 4):
            if number % 2 == 0:
                manager.save(number, args=ocp.args.Composite(state=ocp.args.PyTreeSave(state)))


def zarr3(to: Path) -> None:
    """Two steps of zarr 3 in shards of chunks, each saved by a Checkpointer without a manager."""
    import jax
    import optax
    import orbax.checkpoint as ocp

    tx = optax.apply_if_finite(optax.chain(optax.scale_by_lion(), optax.scale(-1e-3)), 3)
    with ocp.PyTreeCheckpointer(use_ocdbt=True, use_zarr3=True) as checkpointer:
        for number, state in trained(tx, 2):
            args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=512), state)
            checkpointer.save(to / f"epoch_{number}", state, save_args=args)


def directories(to: Path) -> None:
    """No OCDBT, zarr 3: a directory a tensor; a Checkpointer without a manager."""
    import optax
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer(use_ocdbt=False, use_zarr3=True) as checkpointer:
        for number, state in trained(optax.adam(optax.linear_schedule(1e-2, 1e-3, 5)), 2):
            checkpointer.save(to / f"{number:04d}", state)


def weights(to: Path) -> None:
    """Several items: bfloat16 weights, the optimizer by itself, what a loader said, metrics."""
    import jax.numpy as jnp
    import optax
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["loss"])
    with ocp.CheckpointManager(to, options=options) as manager:
        for number, state in trained(optax.adam(1e-3), 2, dtype=jnp.bfloat16):
            items = ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                opt_state=ocp.args.StandardSave(state.opt_state),
                loader=ocp.args.JsonSave({"batches": number}),
            )
            manager.save(100 * number, args=items, metrics={"loss": 1.0 / number})


def sharded(to: Path, rank: int, port: int) -> None:
    """One process of two: kernels are split over all four devices, the rest is on each."""
    import jax
    import optax
    import orbax.checkpoint as ocp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
    mesh = jax.make_mesh((4,), ("data",))

    def place(params: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.make_array_from_callback(
                leaf.shape,
                NamedSharding(mesh, P(None, "data") if leaf.ndim == 2 else P()),
                lambda index: jax.device_get(leaf)[index],
            ),
            params,
        )

    with ocp.CheckpointManager(to) as manager:
        for number, state in trained(optax.adamw(1e-3), 2, width=96, place=place):
            manager.save(number, args=ocp.args.StandardSave(state))


def flaxen(to: Path) -> None:
    """flax's own files, one a step, without Orbax: with Adam, in bfloat16, and weights alone."""
    import flax
    import jax.numpy as jnp
    import optax
    from flax.training import checkpoints

    flax.config.update("flax_use_orbax_checkpointing", False)
    for number, state in trained(optax.adam(optax.linear_schedule(1e-2, 1e-3, 5)), 3):
        checkpoints.save_checkpoint(to / "adam", state, number, keep=2)
    every = optax.MultiSteps(optax.sgd(1e-2, momentum=0.9), 2).gradient_transformation()
    for number, state in trained(every, 4, dtype=jnp.bfloat16):
        checkpoints.save_checkpoint(to / "half", state, number, keep=2)
        (to / "weights").mkdir(exist_ok=True)
        data = flax.serialization.to_bytes({"params": state.params})
        (to / "weights" / "flax_model.msgpack").write_bytes(data)


def stores(to: Path) -> None:
    """OCDBT alone: a tree of several levels, the same with manifests by number, and none at all."""
    import tensorstore as ts

    for name, kind in (("tall", "single"), ("numbered", "numbered"), ("empty", "single")):
        config = {"max_decoded_node_bytes": 400, "max_inline_value_bytes": 16}
        config |= {"manifest_kind": kind, "version_tree_arity_log2": 1}
        base = {"driver": "file", "path": f"{to / name}/"}
        store = ts.KvStore.open({"driver": "ocdbt", "base": base, "config": config}).result()
        for version in range(5 if name != "empty" else 0):
            with ts.Transaction() as transaction:
                for key in range(0, 100, version + 1):
                    value = f"{key:04d}".encode() * (1 if key % 3 else 6)
                    store.with_transaction(transaction)[f"layer.{key:03d}/0.0"] = value
        if name == "empty":
            store["gone"] = b"1"
            del store["gone"]


VARIANTS = (managed, plain, zarr3, directories, weights)


def main() -> None:
    """Write all of them anew, below a directory whose name says nothing of the machine."""
    with tempfile.TemporaryDirectory() as scratch:
        room = Path(scratch)
        for variant in VARIANTS:
            variant(room / variant.__name__)
        command = [sys.executable, "-P", __file__, str(room / "sharded")]
        flags = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
        ranks = [subprocess.Popen([*command, str(rank), "29571"], env=flags) for rank in (0, 1)]
        if any(rank.wait() for rank in ranks):
            raise SystemExit("a rank of `sharded` failed")
        for commit in room.rglob("commit_success.txt"):  # it names the path it was saved under
            commit.write_text(commit.read_text().replace(scratch, "/runs"))
        for target in (HERE, HERE.parent / "ocdbt", HERE.parent / "flax"):
            shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(room, HERE)
        stores(HERE.parent / "ocdbt")
        flaxen(HERE.parent / "flax")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sharded(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
