"""Writes golden/tensorflow with the real library. Run once, by hand, with these:

    pip install tensorflow-cpu==2.21.0
    python tests/audit/golden/write_tensorflow.py

What was trained is a network of 150 parameters, for real, on a CPU.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"

import numpy as np
import tensorflow as tf

HERE = Path(__file__).resolve().parent / "tensorflow"


def network() -> Any:
    """Two layers and a norm between them."""
    tf.keras.utils.set_random_seed(0)
    return tf.keras.Sequential([
        tf.keras.layers.Input((4,)),
        tf.keras.layers.Dense(8, activation="tanh"),
        tf.keras.layers.BatchNormalization(),
        tf.keras.layers.Dense(3),
    ])  # fmt: skip


def batch(number: int) -> tuple[Any, Any]:
    """Some numbers, and sums of them."""
    x = np.random.default_rng(number).normal(size=(16, 4)).astype("float32")
    return x, x.sum(-1, keepdims=True).repeat(3, -1)


def update(model: Any, optimizer: Any, number: int) -> None:
    """One update."""
    x, y = batch(number)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
    gradients = tape.gradient(loss, model.trainable_variables)
    optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))


def managed(to: Path) -> None:
    """CheckpointManager, Adam, a step of the user's; the oldest of three was deleted."""
    model, step = network(), tf.Variable(0, dtype=tf.int64)
    optimizer = tf.keras.optimizers.Adam(1e-2)
    checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer, step=step)
    manager = tf.train.CheckpointManager(checkpoint, str(to), max_to_keep=2)
    for number in range(6):
        update(model, optimizer, number)
        step.assign_add(1)
        if number % 2:
            manager.save(checkpoint_number=number + 1)


def plain(to: Path) -> None:
    """Checkpoint.save, with SGD's momentum, numbered by its save counter."""
    model, optimizer = network(), tf.keras.optimizers.SGD(1e-2, momentum=0.9)
    checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer)
    for number in range(2):
        update(model, optimizer, number)
        checkpoint.save(str(to / "ckpt"))


def fitted(to: Path) -> None:
    """Checkpoint.write after each epoch of ``fit``, with RMSprop: no tracker, no counter."""
    model = network()
    model.compile(tf.keras.optimizers.RMSprop(1e-3), "mse")
    checkpoint = tf.train.Checkpoint(net=model, half=tf.Variable([0.5, 1.5], dtype=tf.bfloat16))
    for epoch in range(2):
        model.fit(*batch(epoch), verbose=0)
        checkpoint.write(str(to / f"weights-{epoch + 1:02d}"))


def sharded(to: Path) -> None:
    """Three files of values a checkpoint, and a large name."""
    from tensorflow.python.checkpoint.sharding import sharding_policies

    policy = sharding_policies.MaxShardSizePolicy(max_shard_size=512)
    options = tf.train.CheckpointOptions(experimental_sharding_callback=policy)
    model, optimizer = network(), tf.keras.optimizers.AdamW(1e-2)
    checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer)
    manager = tf.train.CheckpointManager(checkpoint, str(to), max_to_keep=None)
    for number in range(2):
        update(model, optimizer, number)
        manager.save(options=options)


VARIANTS = (managed, plain, fitted, sharded)


def main() -> None:
    """Write all of them anew, below a directory whose name says nothing of the machine."""
    with tempfile.TemporaryDirectory() as scratch:
        for variant in VARIANTS:
            (Path(scratch) / variant.__name__).mkdir()
            variant(Path(scratch) / variant.__name__)
        shutil.rmtree(HERE, ignore_errors=True)
        shutil.copytree(scratch, HERE)


if __name__ == "__main__":
    main()
