"""A run small enough for tests: linear regression with a moving average, and a loader whose position is exact.

As a program, ``python toy_training.py FOLDER STEPS [DELAY]``, it trains and prints a digest of the final parameters.
"""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cast_jax.core.optim import OptimizerConfig
from cast_jax.trainer import TrainConfig, TrainResult, train

DIMENSION, BATCH = 6, 8
TRUTH = np.linspace(-1.0, 1.0, DIMENSION, dtype=np.float32)[:, None]


class Regression:
    """y = x @ kernel + bias, with input noise from the step's key; the metric counts the rows of the batch."""

    def init(self, key):
        return {"head": {"kernel": jax.random.uniform(key, (DIMENSION, 1)), "bias": jnp.zeros((1,))}}

    def loss_fn(self, params, frozen, batch, key):
        x = batch["x"] + 0.02 * jax.random.uniform(key, batch["x"].shape)
        error = x @ params["head"]["kernel"] + params["head"]["bias"] - batch["y"] + frozen.get("offset", 0.0)
        squared = jnp.sum(error**2)
        return squared / len(x), {"loss/squared": (squared, len(x))}


class ToyLoader:
    """Batch number i is made from seed i, so the whole stream follows from the position."""

    def __init__(self, delay: float = 0.0, poison: int | None = None):
        self.position, self.delay, self.poison = 0, delay, poison

    def __next__(self):
        rng = np.random.default_rng(self.position)
        self.position += 1
        time.sleep(self.delay)
        x = rng.normal(size=(BATCH, DIMENSION)).astype(np.float32)
        y = x @ TRUTH
        return {"x": x, "y": y * np.nan if self.position == self.poison else y}

    def get_state(self) -> bytes:
        return str(self.position).encode()

    def set_state(self, state: bytes) -> None:
        self.position = int(state)


def toy_config(steps: int, **changes) -> TrainConfig:
    optimizer = OptimizerConfig(learning_rate=0.05, schedule="cosine", weight_decay=0.01, clip_norm=1.0)
    defaults = {"ema_decay": 0.9, "log_every": 5, "save_every": 7, "tensorboard": False}
    return TrainConfig(steps=steps, optimizer=optimizer, **(defaults | changes))


def digest(tree) -> str:
    """Bit-exact fingerprint of a tree of arrays."""
    parts = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def run_toy(folder: Path, steps: int, *, delay: float = 0.0, **changes) -> TrainResult:
    return train(Regression(), config=toy_config(steps, **changes), folder=folder, loader=ToyLoader(delay))


if __name__ == "__main__":
    result = run_toy(Path(sys.argv[1]), int(sys.argv[2]), delay=float(sys.argv[3]))
    print("digest", digest(result.params))
