"""Whole training steps of a configuration, compiled and timed side by side."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import jax_utils

from data.sources import Data
from job import steps
from job.build import assemble
from job.settings import settle
from models.layers import BATCH_AXIS

__all__ = ["Step", "in_turn"]

STEPS_PER_EPOCH = 1000


class Step:
    """A compiled training step and the state it works on."""

    def __init__(self, config: ml_collections.ConfigDict):
        """Compiles the step of a configuration, in the middle of its ramp, if any."""
        images: list[Any] = [None] * (STEPS_PER_EPOCH * config.batch_size)
        job = assemble(settle(config), Data(images, [], num_classes=10))
        config = job.config
        size, channels = config.data.image_size, len(config.data.mean)
        state = steps.create_train_state(config, job.model, job.tx)
        if config.sparsity.begin_epoch is not None:
            middle = (config.sparsity.begin_epoch + config.sparsity.end_epoch) / 2
            count = jnp.array(round(middle * STEPS_PER_EPOCH), jnp.int32)
            state = state.replace(opt_state=state.opt_state._replace(count=count))
        rng = np.random.default_rng(0)
        shape = (1, config.batch_size, size, size, channels)
        self.batch = {
            "image": rng.integers(0, 256, shape, np.uint8),
            "label": rng.integers(0, 10, shape[:2], np.int32),
            "valid": np.ones(shape[:2], bool),
        }
        self.state = jax_utils.replicate(state, axis_name=BATCH_AXIS)
        step = jax.pmap(
            lambda state, batch: steps.train_step(state, batch, config),
            BATCH_AXIS,
            donate_argnums=0,
        )
        self.run = step.lower(self.state, self.batch).compile()
        memory: Any = self.run.memory_analysis()
        self.memory = memory.temp_size_in_bytes + memory.argument_size_in_bytes

    def seconds(self) -> float:
        """Wall time of one step."""
        start = time.perf_counter()
        self.state, _ = self.run(self.state, self.batch)
        jax.block_until_ready(self.state)
        return time.perf_counter() - start


def in_turn(steps: dict[str, Step], repetitions: int) -> dict[str, np.ndarray]:
    """Seconds of steps of each kind, in turn and in changing order: noise meets all."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    rng = np.random.default_rng(0)
    for turn in range(repetitions + 2):
        for name in rng.permutation(list(steps)):
            taken = steps[name].seconds()
            if turn >= 2:  # the first threshold has nothing to start from
                times[name].append(taken)
    return {name: np.array(each) for name, each in times.items()}
