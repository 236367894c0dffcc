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
import fractions
import math
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import flags
from flax import jax_utils
from harness import EXPERIMENTS, run_main

import base_config
import digits_st3
import train
from data import input_pipeline
from errors import UserError
from fields import Field, shown
from job.build import Job, build
from job.methods import METHODS
from job.settings import KINDS
from job.steps import create_train_state

__all__ = ["CONTEXTS", "ODD", "changed", "job_or_sentence", "limited", "odd_values"]

CASES = flags.DEFINE_integer("cases", 2000, "How many are tried.")
SEED = flags.DEFINE_integer("seed", 0, "What draws them.")
LIMIT = flags.DEFINE_integer("limit", 60, "Seconds that a case may take.")
STEPS = flags.DEFINE_integer("steps", 10, "How many train a step.")
COMMANDS = flags.DEFINE_integer("commands", 5, "How many are given to train.py.")
SENTENCES = flags.DEFINE_integer("sentences", 0, "How many sentences are printed.")

WIDE = {"model.name": "wide_resnet", "model.depth": 10, "model.width": None}
MOBILE = {"model.name": "mobilenet_v1", "model.depth": None, "model.width": None}
STEPWISE = {"learning_rate.schedule": "step"}
CONTEXTS: dict[str, dict[str, Any]] = {
    **{method: {"sparsity.method": method} for method in METHODS},
    "model.widen": WIDE,
    "model.dropout": WIDE,
    "model.multiplier": MOBILE,
    "learning_rate.drop_epochs": STEPWISE,
    "learning_rate.drop_factor": STEPWISE,
}
"""What makes a field, or the fields of a section, of use; others are so anyway."""

TEXTS = ["", " ", "abc", "None", "ünïcode", "🙂", "../etc", "/etc", "a\0b", "a\nb", "~"]
PATHS = ["*", "**", "stem/*", "*/kernel", "[", "stem/kernel"]
SPLITS = ["nope", "[:0]", "train[:0]", "train[50%:", "train[9:3]", "all", ".", ".."]
SPLITS += ["train[200%:]", "train+test", "train[:1]", "test", "train"]
OWN: dict[str, list[Any]] = {
    "data.name": ["digits:2.0.0", "a/b", "mnist/nope", "mnist:9.9.9", "cifar10"],
    "data.train_split": SPLITS,
    "data.test_split": SPLITS,
    "data.dir": ["/etc/passwd", "/proc/none", "gs://nope", "x" * 900],
    "sparsity.pattern": ["2:4", "4:2", "0:4", "1x1", "4x8", "0x4", "9" * 30 + "x1"],
    "sparsity.dense": [(path,) for path in PATHS],
}
"""Values that are odd in one field."""
ODD: list[Any] = [
    *(None, True, 0, -1, 1, 2, 1.5, -0.0, 5e-324, 1e308, 10**30, 10**5000),
    *(math.nan, math.inf, -math.inf, 1j, fractions.Fraction(1, 3), np.float32("nan")),
    *(np.int64(-1), np.float64(0.5), np.bool_(True), np.ones(2), b"abc", object()),
    *((), [], (1,), [0.5], ((),), {}, {"a": 1}, {"stem": 0.5}, *TEXTS, "x" * 5000),
]
"""Values that are odd in any field."""


def odd_values(name: str) -> list[Any]:
    """Odd values for a field: those for any, its own, and at its bounds and choices."""
    field = KINDS[name]
    values = [*ODD, *OWN.get(name, [])]
    if field.type is tuple:
        each = [*_pairs(), "*"] if field.each is None else [*ODD, *_near(field.each)]
        return [*values, *((x,) for x in each), (each[-1],) * 3]
    return values + _near(field)


def _near(field: Field) -> list[Any]:
    """What lies at the bounds and beside them, and the choices and almost those."""
    values: list[Any] = [*field.choices]
    values += [odd for x in field.choices for odd in (f"{x} ", x.upper())]
    for bound in field.bounds.values():
        if field.type is float:
            beside = [math.nextafter(bound, toward) for toward in (-9e9, 9e9)]
        else:
            beside = [bound - 1, bound + 1]
        values += [bound, -bound, *beside]
    return values


def _pairs() -> Iterator[Any]:
    """Entries of ``layers``: a path and its final."""
    for value in ODD:
        yield ("*", value)
        yield (value, 0.5)
    for path in PATHS:
        yield from ((path, 0.5), (path,), (path, 0.5, 0.5))


class Change(NamedTuple):
    """A value for a field.

    Attributes:
        field: Its name.
        value: An odd value.
        door: Where it is put: before the field's name.
    """

    field: str
    value: Any
    door: str = ""


def changed(fields: dict[str, Any], changes: list[Change]) -> ml_collections.ConfigDict:
    """A small configuration with these fields, and then with odd values."""
    config = digits_st3.get_config().unlock()
    small = {"data.in_memory": False, "model.width": 2, "num_epochs": 40}
    for field, value in (small | fields).items():
        _put(config, field, value)
    for change in changes:
        _put(config, change.door + change.field, change.value)
    return config


def _put(config: ml_collections.ConfigDict, field: str, value: Any) -> None:
    """Sets a field to a value of any type."""
    *sections, name = field.split(".")
    for section in sections:
        config = config[section]
    if name in config:
        del config[name]  # with the type that it had
    config[name] = value


def job_or_sentence(config: ml_collections.ConfigDict) -> Job | str:
    """The job of a configuration, or why there is none, in one line.

    Raises:
        ValueError: If that takes more than a line.
    """
    try:
        return build(config)
    except UserError as error:
        sentence = str(error)
    if "\n" in sentence:
        raise ValueError(f"more than a line: {sentence!r}")
    return sentence


class TooLong(BaseException):
    """A case that has taken its time."""


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raises ``TooLong`` in what takes more seconds."""

    def stop(number: int, frame: Any) -> None:
        raise TooLong(f"more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


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


def is_in(config: ml_collections.ConfigDict, field: str) -> bool:
    for name in field.split("."):
        if not isinstance(config, ml_collections.ConfigDict) or name not in config:
            return False
        config = config[name]
    return True


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
