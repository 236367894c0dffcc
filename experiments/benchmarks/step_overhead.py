"""What a method adds to a training step: time and memory next to the same dense step.

python experiments/benchmarks/step_overhead.py

Times whole training steps of ``cifar10_st3.py`` (ResNet-20, batch 128) on random
images, dense and with the method in its ramp, interleaved in one run. Only the ratios
mean anything. ``--settings.sparsity.method=gmp`` takes another method than ST-3.
``--settings=experiments/imagenet_st3.py --settings.batch_size=8`` does the same for
ResNet-50.
"""

import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import app, flags, logging
from flax import jax_utils
from ml_collections import config_flags

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import base_config  # noqa: E402  a neighbour of this folder
import st3jax  # noqa: E402
import steps  # noqa: E402
from models import create_model  # noqa: E402
from models.layers import BATCH_AXIS  # noqa: E402

CONFIG = config_flags.DEFINE_config_file(
    "settings", str(HERE.parent / "cifar10_st3.py"), "Configuration file."
)
REPETITIONS = flags.DEFINE_integer("repetitions", 9, "Timed steps of each kind.")
STEPS_PER_EPOCH = 1000


class Step:
    """A compiled training step and the state it works on."""

    def __init__(self, config: ml_collections.ConfigDict, method: str):
        """Compiles the step of one method, in the middle of its ramp."""
        config = ml_collections.ConfigDict(config)
        config.sparsity.method = method
        base_config.use_published(config)
        size, channels = config.data.image_size, len(config.data.mean)
        state = steps.create_train_state(
            ml_collections.FrozenConfigDict(config),
            create_model(config, 10),
            STEPS_PER_EPOCH,
            costs={},
        )
        if method != "none":
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
        frozen = ml_collections.FrozenConfigDict(config)
        step = jax.pmap(
            lambda state, batch: steps.train_step(state, batch, frozen),
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


def main(argv: list[str]) -> None:
    """Times both steps and prints the ratios."""
    del argv
    method = CONFIG.value.sparsity.method
    both = {name: Step(CONFIG.value, name) for name in ("none", method)}
    times: dict[str, list[float]] = {name: [] for name in both}
    for turn in range(REPETITIONS.value + 2):
        for name, step in both.items():
            taken = step.seconds()
            if turn >= 2:  # the first threshold has nothing to start from
                times[name].append(taken)
    dense, sparse = (np.array(times[name]) for name in ("none", method))
    weights = st3jax.summary(both[method].state.params).weights
    print(f"{weights:,} kernel weights, batch {CONFIG.value.batch_size}")
    print(f"dense step {1e3 * np.median(dense):.0f} ms, median of {len(dense)}")
    ratio = np.median(sparse / dense)
    print(f"{method} step / dense step, median of pairs: {ratio:.3f}")
    memory = both[method].memory / both["none"].memory
    print(f"{method} memory / dense memory, as compiled: {memory:.3f}")


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)
    app.run(main)
