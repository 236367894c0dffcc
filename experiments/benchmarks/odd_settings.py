"""Odd values in the fields of a configuration: a sentence or a start, nothing else.

python experiments/benchmarks/odd_settings.py --cases=2000

The values come from the declarations in ``base_config.py``: the bounds of a field and
what lies beside them, what is no number, other types, texts that are no names. A case
is one of them, or two, with a method and a network drawn at random. It must end in a
``UserError`` of one line, or make a job; any other exception, and a case that takes
longer than ``--limit`` seconds, is a failure. Of the cases that start, the first
``--steps`` small ones train one step; of the others, ``--commands`` that can be typed
are given to ``train.py``.
"""

import collections
import contextlib
import os
import pathlib
import random
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import flags
from flax import jax_utils
from harness import EXPERIMENTS, run_main
from odd_values import (
    CONTEXTS,
    MOBILE,
    STEPWISE,
    WIDE,
    Change,
    TooLong,
    changed,
    is_in,
    job_or_sentence,
    limited,
    odd_values,
)

import base_config
import digits_st3
import train
from data import input_pipeline
from fields import shown
from job.build import Job
from job.methods import METHODS
from job.settings import KINDS
from job.steps import create_train_state

CASES = flags.DEFINE_integer("cases", 2000, "How many are tried.")
SEED = flags.DEFINE_integer("seed", 0, "What draws them.")
LIMIT = flags.DEFINE_integer("limit", 60, "Seconds that a case may take.")
STEPS = flags.DEFINE_integer("steps", 10, "How many train a step.")
COMMANDS = flags.DEFINE_integer("commands", 5, "How many are given to train.py.")
SENTENCES = flags.DEFINE_integer("sentences", 0, "How many sentences are printed.")


class Case(NamedTuple):
    """One or two odd values, in a run that is otherwise a usual one."""

    fields: dict[str, Any]
    changes: list[Change]


def drawn(draw: random.Random, common: ml_collections.ConfigDict) -> Case:
    """A case."""
    fields: dict[str, Any] = {}
    if draw.random() < 0.3:
        fields |= {"sparsity.method": draw.choice([*METHODS])}
        fields |= draw.choice([{}, WIDE, MOBILE, STEPWISE])
    changes = []
    for field in draw.sample([*KINDS], draw.choice([1, 1, 2])):
        section = field.partition(".")[0]
        fields |= CONTEXTS.get(section, {}) | CONTEXTS.get(field, {})
        value = draw.choice(odd_values(field))
        doors = ["", "defaults.common."] if is_in(common, field) else [""]
        changes.append(Change(field, value, draw.choice(doors)))
    return Case(fields, changes)


def train_a_step(job: Job) -> None:
    """Trains one step, with real images."""
    state = create_train_state(job.config, job.model, job.tx)
    programs = train.compile_programs(job.model, job.config)
    batches = input_pipeline.train_batches(job.data, job.config, 0, 1)
    with contextlib.closing(batches):
        batch = train.split_over_devices(next(batches))
    jax.block_until_ready(programs.train_step(jax_utils.replicate(state), batch))


def is_small(job: Job) -> bool:
    """Whether a step takes no time worth speaking of."""
    data = job.config.data
    shapes = jax.eval_shape(
        lambda: job.model.init(
            jax.random.key(0),
            np.zeros((1, data.image_size, data.image_size, len(data.mean)), np.float32),
            train=False,
        )
    )
    weights = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    return weights < 1e6 and data.image_size <= 32 and (data.workers or 0) < 3


def typed(case: Case) -> list[str] | None:
    """The arguments of ``train.py`` that say the same, if there are any."""
    values = case.fields | {x.door + x.field: x.value for x in case.changes}
    if not all(isinstance(x, str | int | float | tuple) for x in values.values()):
        return None
    if any("\\x00" in shown(x) or "long" in shown(x) for x in values.values()):
        return None
    return [f"--config.{field}={value}" for field, value in values.items()]


def fails_in_a_sentence(arguments: list[str]) -> bool:
    """Whether ``train.py`` ends with one line that says what is wrong."""
    run = subprocess.run(
        [
            *(sys.executable, EXPERIMENTS / "train.py", "--workdir=run"),
            *(f"--config={digits_st3.__file__}", "--config.data.in_memory=false"),
            *arguments,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    told = run.stderr.strip().splitlines()
    if run.returncode and told[-1].startswith("error: ") and len(told) == 1:
        return True
    print(f"\n{' '.join(arguments)}: {run.returncode}\n{run.stderr[-3000:]}")
    return False


def main(argv: list[str]) -> None:
    """Tries the cases and prints what became of them."""
    del argv
    draw, counts = random.Random(SEED.value), collections.Counter[str]()
    sentences: list[str] = []
    failed = 0
    common = base_config.get_config().defaults.common
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        os.environ["TFDS_DATA_DIR"] = str(pathlib.Path(folder) / "tfds")
        for number in range(CASES.value):
            case = drawn(draw, common)
            try:
                with limited(LIMIT.value):
                    result = job_or_sentence(changed(case.fields, case.changes))
                    counts["sentences" if isinstance(result, str) else "started"] += 1
                    if isinstance(result, str):
                        sentences.append(result)
                        arguments = typed(case)
                        if arguments and counts["commands"] < COMMANDS.value:
                            counts["commands"] += 1
                            failed += not fails_in_a_sentence(arguments)
                    elif counts["steps"] < STEPS.value and is_small(result):
                        counts["steps"] += 1
                        train_a_step(result)
            except (Exception, TooLong) as error:
                failed += 1
                told = " ".join(f"{type(error).__name__}: {error}".split())
                print(f"case {number}, {shown(case)}: {told[:300]}")
    print("| cases | sentences | started | trained a step | commands | anything else |")
    print("|" + "---:|" * 6)
    row = [CASES.value, *(counts[x] for x in ("sentences", "started", "steps"))]
    print(f"| {' | '.join(f'{x:,}' for x in (*row, counts['commands'], failed))} |")
    for sentence in draw.sample(sentences, min(SENTENCES.value, len(sentences))):
        print(sentence)
    sys.exit(bool(failed))


if __name__ == "__main__":
    run_main(main)
