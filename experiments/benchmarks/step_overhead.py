"""What a method adds to a training step: time and memory next to the same dense step.

python experiments/benchmarks/step_overhead.py

Times whole training steps of ``cifar10_st3.py`` (ResNet-20, batch 128) on random
images, dense and with the method in its ramp, interleaved in one run. Only the ratios
mean anything. ``--settings.sparsity.method=gmp`` takes another method than ST-3.
``--settings=experiments/imagenet_st3.py --settings.batch_size=8`` does the same for
ResNet-50.
"""

import numpy as np
from absl import flags
from harness import EXPERIMENTS, run_main
from ml_collections import config_flags
from step_timing import Step, in_turn

import st3jax

CONFIG = config_flags.DEFINE_config_file(
    "settings", str(EXPERIMENTS / "cifar10_st3.py"), "Configuration file."
)
REPETITIONS = flags.DEFINE_integer("repetitions", 9, "Timed steps of each kind.")


def main(argv: list[str]) -> None:
    """Times both steps and prints the ratios."""
    del argv
    method = CONFIG.value.sparsity.method
    dense = CONFIG.value.copy_and_resolve_references()
    dense.sparsity.method = "none"
    both = {"none": Step(dense), method: Step(CONFIG.value)}
    times = in_turn(both, REPETITIONS.value)
    weights = st3jax.summary(both[method].state.params).weights
    print(f"{weights:,} kernel weights, batch {CONFIG.value.batch_size}")
    milliseconds = 1e3 * np.median(times["none"])
    print(f"dense step {milliseconds:.0f} ms, median of {REPETITIONS.value}")
    ratio = np.median(times[method] / times["none"])
    print(f"{method} step / dense step, median of pairs: {ratio:.3f}")
    memory = both[method].memory / both["none"].memory
    print(f"{method} memory / dense memory, as compiled: {memory:.3f}")


if __name__ == "__main__":
    run_main(main)
