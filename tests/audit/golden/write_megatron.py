"""Writes the golden checkpoints of Megatron: legacy, distributed, and NVRx's local ones.

    python tests/audit/golden/write_megatron.py [VARIANT ...]

Written with megatron-core 0.16.1, nvidia-resiliency-ext 0.4.1 and torch 2.13.0, each installed with
``--no-deps`` but torch (and einops, packaging, which they import). A GPT of some thousand
parameters is trained for real by Megatron-Core's own model, optimizers and pipeline schedules, over
gloo. It knows GPUs alone, so what it asks of CUDA the CPU answers (``pretend``). Distributed and
local checkpoints are saved by ``megatron.core.dist_checkpointing.save`` and by NVRx's
``LocalCheckpointManager``. The package has not ``megatron.training``: the files of a legacy
checkpoint, and what is put together for all three, follow its rule (Megatron-LM of August 2026,
megatron/training/checkpointing.py: ``save_checkpoint``, ``generate_state_dict``,
``get_rng_state``). What it refuses to overwrite is golden.
"""

import argparse
import os
import random
import shutil
import tempfile
import warnings
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.multiprocessing as processes
from torch import distributed
from torch.overrides import TorchFunctionMode

HERE = Path(__file__).parent / "megatron"
BATCH, LENGTH, WORDS, HIDDEN = 2, 5, 16, 8


class Variant(NamedTuple):
    """What differs between the golden runs; ``kind`` is legacy, torch_dist or local."""

    kind: str
    world: int
    tensor: int = 1
    pipeline: int = 1
    precision: str = "bf16"
    sharded: bool = False
    sharding: str = "dp_reshardable"
    tied: bool = True
    steps: tuple[int, ...] = (2, 4)
    copies: bool = False
    release: bool = False


VARIANTS = {
    "legacy-tp2-dp2": Variant("legacy", 4, tensor=2, tied=False),
    "legacy-pp2-dp2-sharded": Variant("legacy", 4, pipeline=2, sharded=True, steps=(3,)),
    "legacy-tp2-fp16": Variant("legacy", 2, tensor=2, precision="fp16", steps=(6,)),
    "dist-dp2": Variant("torch_dist", 2, sharded=True),
    "dist-pp2": Variant(
        "torch_dist", 2, pipeline=2, sharded=True, sharding="fully_reshardable", steps=(3,)
    ),
    "dist-tp2-release": Variant(
        "torch_dist", 2, tensor=2, precision="fp32", tied=False, steps=(3,), release=True
    ),
    "local-alone": Variant("local", 1),
    "local-tp2": Variant("local", 2, tensor=2, sharded=True),
    "local-pp2-copies": Variant("local", 2, pipeline=2, precision="fp32", copies=True),
}


class OnCpu(TorchFunctionMode):
    """Makes on the CPU what is asked for on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Turn the device round."""
        named = dict(kwargs or {})
        if "cuda" in str(named.get("device", "")):
            named["device"] = "cpu"
        return func(*args, **named)


def pretend() -> None:
    """Let the CPU answer for CUDA. Its generators' states are 16 bytes, as a GPU's are."""
    plain = torch.Tensor.type

    def kind(self: torch.Tensor, dtype: Any = None, *rest: Any, **named: Any) -> Any:
        found = plain(self) if dtype is None else plain(self, dtype, *rest, **named)
        on_gpu = isinstance(found, str) and "cuda" not in found
        return found.replace("torch.", "torch.cuda.") if on_gpu else found

    def state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.arange(16, dtype=torch.uint8)

    torch.Tensor.type = kind
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *_, **__: self
    torch.cuda._lazy_init = torch.cuda.random._lazy_init = lambda: None
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.device_count = lambda: 1
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.manual_seed = lambda _: None
    for place in (torch.cuda, torch.cuda.random):
        place.get_rng_state = state
        place.set_rng_state = lambda *_, **__: None
    OnCpu().__enter__()


def arguments(variant: Variant) -> Namespace:
    """The arguments that a training of Megatron's has, as far as they matter here."""
    copies = variant.world // variant.tensor // variant.pipeline
    return Namespace(
        num_layers=variant.pipeline, hidden_size=HIDDEN, num_attention_heads=2, seq_length=LENGTH,
        max_position_embeddings=LENGTH, padded_vocab_size=WORDS, add_position_embedding=False,
        untie_embeddings_and_output_weights=not variant.tied,
        world_size=variant.world, data_parallel_size=copies,
        tensor_model_parallel_size=variant.tensor,
        pipeline_model_parallel_size=variant.pipeline, expert_model_parallel_size=1,
        micro_batch_size=BATCH, global_batch_size=2 * BATCH * copies, consumed_train_samples=0,
        skipped_train_samples=0, iteration=0, train_iters=100, optimizer="adam",
        adam_beta1=0.9, adam_beta2=0.95, bf16=variant.precision == "bf16",
        fp16=variant.precision == "fp16", use_distributed_optimizer=variant.sharded,
        no_save_optim=variant.release or None, no_load_optim=None, finetune=False,
        data_parallel_random_init=False,
        ckpt_format="torch_dist" if variant.kind != "legacy" else "torch",
    )  # fmt: skip


class Job:
    """One rank's model and what trains it."""

    def __init__(self, variant: Variant) -> None:
        from megatron.core import parallel_state as grid
        from megatron.core import tensor_parallel
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.transformer import TransformerConfig
        from megatron.core.transformer.module import Float16Module

        self.variant, self.grid, self.args = variant, grid, arguments(variant)
        grid.initialize_model_parallel(
            variant.tensor, variant.pipeline, create_gloo_process_groups=True
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        self.tracker = tensor_parallel.get_cuda_rng_tracker()
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        dtype = dtypes[variant.precision]
        half = {"bf16": variant.precision == "bf16", "fp16": variant.precision == "fp16"}
        config = TransformerConfig(
            num_layers=variant.pipeline, hidden_size=HIDDEN, num_attention_heads=2,
            ffn_hidden_size=12, add_bias_linear=False, normalization="RMSNorm",
            use_cpu_initialization=True, params_dtype=dtype, pipeline_dtype=dtype,
            tensor_model_parallel_size=variant.tensor,
            pipeline_model_parallel_size=variant.pipeline, hidden_dropout=0.0,
            attention_dropout=0.0, gradient_accumulation_fusion=False, bias_dropout_fusion=False,
            masked_softmax_fusion=False, bias_activation_fusion=False, **half,
        )  # fmt: skip
        torch.manual_seed(7)
        model = GPTModel(
            config, get_gpt_layer_local_spec(), vocab_size=WORDS, max_sequence_length=LENGTH,
            pre_process=grid.is_pipeline_first_stage(), post_process=grid.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=variant.tied, position_embedding_type="rope",
        )  # fmt: skip
        self.model = model if variant.precision == "fp32" else Float16Module(config, model)
        self.wrapped = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(use_distributed_optimizer=variant.sharded),
            self.model,
        )
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam", lr=0.01, min_lr=0.0, params_dtype=dtype, adam_beta2=0.95,
                use_distributed_optimizer=variant.sharded, initial_loss_scale=2.0**20,
                hysteresis=1, loss_scale_window=1000, min_loss_scale=1.0, **half,
            ),
            [self.wrapped],
        )  # fmt: skip
        self.scheduler = OptimizerParamScheduler(
            self.optimizer, init_lr=0.0, max_lr=0.01, min_lr=0.0, lr_warmup_steps=16,
            lr_decay_steps=1000, lr_decay_style="linear", start_wd=0.01, end_wd=0.01,
            wd_incr_steps=100, wd_incr_style="constant",
        )  # fmt: skip
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss
        self.both = get_forward_backward_func()

    def step(self) -> None:
        """One iteration, as Megatron's train_step goes: skipped updates count as iterations."""
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.both(
            forward_step_func=self.forward, data_iterator=None, model=[self.wrapped],
            num_microbatches=2, seq_length=LENGTH, micro_batch_size=BATCH, forward_only=False,
        )  # fmt: skip
        updated, *_ = self.optimizer.step()
        if updated:
            self.scheduler.step(increment=self.args.global_batch_size)
        self.args.iteration += 1
        self.args.consumed_train_samples += self.args.global_batch_size

    def forward(self, _: Any, model: Any) -> tuple[torch.Tensor, Any]:
        """One micro-batch: every rank of a copy of the model draws the same one."""
        draw = torch.Generator().manual_seed(
            100 * self.args.iteration + self.grid.get_data_parallel_rank()
        )
        tokens = torch.randint(0, WORDS, (BATCH, LENGTH), generator=draw)
        places = torch.arange(LENGTH).expand(BATCH, LENGTH)
        mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)
        out = model(tokens, places, mask, labels=tokens)
        return out, lambda losses: (losses.float().mean(), {})

    def generators(self) -> list[dict[str, Any]]:
        """The state of the generators, as get_rng_state puts it together."""
        return [
            {
                "random_rng_state": random.getstate(),
                "np_rng_state": np.random.get_state(),
                "torch_rng_state": torch.get_rng_state(),
                "cuda_rng_state": torch.cuda.get_rng_state(),
                "rng_tracker_states": self.tracker.get_states(),
            }
        ]

    def common(self) -> dict[str, Any]:
        """What is no tensor of the model's."""
        return {
            "args": self.args,
            "checkpoint_version": 3.0,
            "iteration": self.args.iteration,
            "opt_param_scheduler": self.scheduler.state_dict(),
            "num_floating_point_operations_so_far": 1e6 * self.args.iteration,
        }

    def save_legacy(self, run: Path) -> None:
        """A directory a model-parallel rank: what DP rank 0 has of model and optimizer."""
        tensor = self.grid.get_tensor_model_parallel_rank()
        stage = self.grid.get_pipeline_model_parallel_rank()
        name = f"mp_rank_{tensor:02d}" + (f"_{stage:03d}" if self.variant.pipeline > 1 else "")
        folder = run / f"iter_{self.args.iteration:07d}" / name
        folder.mkdir(parents=True, exist_ok=True)
        if self.variant.sharded:
            self.optimizer.save_parameter_state(str(folder / "distrib_optim.pt"))
        if self.grid.get_data_parallel_rank() == 0:
            state = self.common()
            state["model"] = self.model.state_dict_for_save_checkpoint()
            state["optimizer"] = self.optimizer.state_dict()
            state["rng_state"] = self.generators()
            torch.save(state, folder / "model_optim_rng.pt")

    def sharded(self) -> dict[str, Any]:
        """The state whose tensors say where they lie in the whole."""
        from megatron.core.dist_checkpointing.mapping import ShardedObject

        group = self.grid.get_data_parallel_group(with_context_parallel=True)
        about = {
            "distrib_optim_sharding_type": self.variant.sharding,
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
            "dp_cp_group": group,
        }
        state = self.common()
        state["model"] = self.model.sharded_state_dict(metadata=about)
        if not self.variant.release:
            state["optimizer"] = self.optimizer.sharded_state_dict(state, metadata=about)
        state["rng_state"] = ShardedObject(
            "rng_state",
            self.generators(),
            (self.variant.pipeline, self.variant.tensor),
            (
                self.grid.get_pipeline_model_parallel_rank(),
                self.grid.get_tensor_model_parallel_rank(),
            ),
            replica_id=self.grid.get_data_parallel_rank(with_context_parallel=True),
        )
        return state

    def save_dist(self, run: Path) -> None:
        """A distributed checkpoint."""
        from megatron.core import dist_checkpointing

        name = "release" if self.variant.release else f"iter_{self.args.iteration:07d}"
        folder = run / name
        folder.mkdir(parents=True, exist_ok=True)
        distributed.barrier()
        dist_checkpointing.save(
            self.sharded(), str(folder),
            content_metadata={"distrib_optim_sharding_type": self.variant.sharding},
        )  # fmt: skip

    def save_local(self, run: Path) -> None:
        """A local one, by NVRx's manager."""
        from megatron.core.dist_checkpointing.tensor_aware_state_dict import (
            MCoreTensorAwareStateDict,
        )
        from nvidia_resiliency_ext.checkpointing.local.ckpt_managers.local_manager import (
            LocalCheckpointManager,
        )
        from nvidia_resiliency_ext.checkpointing.local.replication.strategies import (
            CliqueReplicationStrategy,
        )

        if not hasattr(self, "manager"):
            copying = self.variant.copies and CliqueReplicationStrategy(
                distributed.new_group(list(range(self.variant.world)))
            )
            self.manager = LocalCheckpointManager(run, repl_strategy=copying or None)
        state, _ = MCoreTensorAwareStateDict.from_state_dict(self.sharded(), algo="atomic")
        self.manager.save(state, self.args.iteration)


def train(rank: int, name: str, folder: str) -> None:
    """One rank's training."""
    warnings.simplefilter("ignore")
    variant = VARIANTS[name]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(variant.world))
    pretend()
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=variant.world
    )
    os.chdir(folder)  # DCP's index keeps the path that it was given
    job, run = Job(variant), Path("run")
    saves = {
        "legacy": job.save_legacy,
        "torch_dist": job.save_dist,
        "local": job.save_local,
    }
    for _ in range(max(variant.steps)):
        job.step()
        if job.args.iteration in variant.steps:
            saves[variant.kind](run)
            distributed.barrier()
            if rank == 0 and variant.kind != "local":
                word = "release" if variant.release else str(job.args.iteration)
                (run / "latest_checkpointed_iteration.txt").write_text(word)
    distributed.barrier()
    distributed.destroy_process_group()


def main() -> None:
    """Write what is asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variants", nargs="*", default=list(VARIANTS))
    for name in parser.parse_args().variants:
        folder = HERE / name
        if folder.exists():
            raise SystemExit(f"{folder} is there already, and golden: remove it first")
        with tempfile.TemporaryDirectory() as place:
            processes.spawn(partial(train), (name, place), nprocs=VARIANTS[name].world)
            shutil.copytree(Path(place) / "run", folder)


if __name__ == "__main__":
    main()
