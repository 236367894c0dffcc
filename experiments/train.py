"""Trains a sparse network: the whole loop, visible from top to bottom.

python experiments/train.py --config=experiments/digits_st3.py

Any field of the configuration can be given on the command line, as in
``--config.sparsity.final=0.95``. Started again, the same command goes on where it
stopped. For many hosts the same command is started on each, with ``--distributed`` or
with ``--coordinator=host:port --processes=... --process=...``.
"""

import beginning

if __name__ == "__main__":
    beginning.tell()

import contextlib
import difflib
import functools
import hashlib
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import ml_collections
import numpy as np
from absl import app, flags, logging
from flax import jax_utils
from ml_collections import config_flags
from rich.console import Console

import base_config
import processes
import st3jax
import terminal
from data import input_pipeline, sources
from errors import Stopped, UserError
from fields import described
from job.build import Job, build
from job.settings import KINDS
from job.steps import (
    TrainState,
    create_train_state,
    effective_params,
    eval_step,
    eval_variables,
    finite_names,
    train_step,
)
from models.layers import BATCH_AXIS
from workdir import checkpoints, histograms, report, ship
from workdir.claim import FREE, claim_workdir
from workdir.lock import only_run
from workdir.monitor import Monitor

MOST_UNREAD = 32  # images in a row that may be broken, in batches with no other


def split_over_devices(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """``[B, ...]`` to ``[devices, B / devices, ...]``."""
    devices = jax.local_device_count()
    return {name: x.reshape(devices, -1, *x.shape[1:]) for name, x in batch.items()}


class Programs(NamedTuple):
    """What runs on the devices, compiled on first use.

    Attributes:
        train_step: As in ``steps``, over all devices.
        eval_step: The same.
        eval_variables: The same.
        summary: The zeros among the kernel weights that the model sees.
    """

    train_step: Any
    eval_step: Any
    eval_variables: Any
    summary: Any


def compile_programs(model: nn.Module, config: ml_collections.ConfigDict) -> Programs:
    """The step functions of a run."""

    def over_devices(fn: Any, donated: Any = (), **options: Any) -> Any:
        fn = functools.partial(fn, config=config, **options)
        return jax.pmap(fn, BATCH_AXIS, donate_argnums=donated)

    @jax.jit
    def summary(params: Any, opt_state: Any) -> st3jax.Summary:
        return st3jax.summary(effective_params(config, params, opt_state))

    return Programs(
        over_devices(train_step, donated=0),
        over_devices(eval_step, apply_fn=model.apply),
        over_devices(eval_variables),
        lambda state: summary(*jax_utils.unreplicate((state.params, state.opt_state))),
    )


def evaluate(
    programs: Programs,
    state: TrainState,
    data: sources.Data,
    config: ml_collections.ConfigDict,
    fixed: bool,
    waiting: Callable[[], Any] = contextlib.nullcontext,
) -> dict[str, float]:
    """Accuracy and loss over every test image, of each network that can differ.

    Args:
        programs: The step functions.
        state: The state of the training, on all devices.
        data: The images.
        config: The experiment's configuration.
        fixed: Whether zeros are zeros in the raw weights, too.
        waiting: Context for waiting for images.
    """
    networks = programs.eval_variables(state)
    if fixed:
        networks.pop("dense_test", None)
    sums: dict[str, list[Any]] = {name: [] for name in networks}
    with _closing(input_pipeline.test_batches(data, config)) as batches:
        while True:
            with waiting():
                batch = next(batches, None)
            if batch is None:
                break
            parts = split_over_devices(batch)
            for name, variables in networks.items():
                sums[name].append(programs.eval_step(variables, parts))
    metrics = {"sparsity": float(programs.summary(state).sparsity)}
    for name, parts in jax.device_get(sums).items():
        total = jax.tree.map(lambda *xs: float(sum(x[0] for x in xs)), *parts)
        skipped = len(data.test) - int(total["images"])
        if skipped == len(data.test):
            raise UserError(f"none of the {skipped:,} test images can be read any more")
        if skipped:
            metrics["skipped_test_images"] = skipped
        metrics[f"{name}_accuracy"] = total["correct"] / total["images"]
        metrics[f"{name}_loss"] = total["loss"] / total["images"]
    return metrics


def unread_in_a_row(before: int, valid: np.ndarray) -> int:
    """How many images, up to and with this batch, were read by none.

    Args:
        before: The same of the batch before.
        valid: Which of this process's images of the batch could be read.

    Raises:
        UserError: If they are so many that it is not the images that are broken.
    """
    unread = 0 if valid.any() else before + len(valid)
    if unread >= MOST_UNREAD:
        raise UserError(
            f"the last {unread:,} images could not be read: see whether the data is "
            "still where config.data.dir says; the same command goes on from the last "
            "checkpoint"
        )
    return unread


def summarise(
    steps: list[Any], last: int, names: list[str], config: ml_collections.ConfigDict
) -> dict[str, float]:
    """Means of the metrics of the last steps, which are fetched from the device.

    Args:
        steps: What ``train_step`` returned, step by step.
        last: Number of the last of these steps.
        names: What each entry of ``finite`` belongs to.
        config: The experiment's configuration.

    Raises:
        UserError: If a step was not finite and ``config.not_finite`` is "stop".
    """
    rows = [jax.tree.map(lambda x: x[0], row) for row in jax.device_get(steps)]
    fine = [bool(row["fine"]) for row in rows]
    if not all(fine) and config.not_finite == "stop":
        first = fine.index(False)
        where = [
            name
            for name, finite in zip(names, rows[first]["finite"], strict=True)
            if not finite
        ] or ["the loss alone"]
        raise UserError(
            f"numbers are not finite any more in step {last - len(rows) + first + 1}, "
            f"whose loss is {rows[first]['train_loss']}: {', '.join(where[:3])}"
            f"{f' and {len(where) - 3} more' if len(where) > 3 else ''}; lower "
            "config.learning_rate.peak, or let such gradients count as zero with "
            "--config.not_finite=skip, in another --workdir=..."
        )
    used = [row for row, ok in zip(rows, fine, strict=True) if ok] or rows
    means = {
        name: float(np.mean([row[name] for row in used]))
        for name in ("train_loss", "train_accuracy")
    }
    counts = {
        "skipped_steps": fine.count(False),
        "skipped_images": int(sum(row["skipped_images"] for row in rows)),
    }
    return means | {name: count for name, count in counts.items() if count}


def images_of(data: sources.Data) -> str:
    """How many images there are, and how many were left out before the start."""
    text = f"{len(data.train):,} to train on, {len(data.test):,} to test on"
    if data.skipped_train or data.skipped_test:
        text += (
            f", without {data.skipped_train:,} and {data.skipped_test:,} that could "
            "not be read"
        )
    return text


@contextlib.contextmanager
def _folder_of_this_process(workdir: pathlib.Path) -> Iterator[pathlib.Path]:
    """The workdir for the first process; for others a folder that nobody reads."""
    if jax.process_index() == 0:
        yield workdir
    else:
        with tempfile.TemporaryDirectory() as scratch:
            yield pathlib.Path(scratch)


def train_and_evaluate(
    config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> dict[str, Any]:
    """Trains to the end, from the beginning or from where the workdir's run stopped.

    Args:
        config: A configuration with the fields of ``base_config.py``.
        workdir: Folder for checkpoints, logs and the report. Of many processes the
            first one alone reads and writes it.

    Returns:
        The report, as in ``report.json``.

    Raises:
        UserError: If the configuration, the data or the workdir is not usable, or the
            training runs into numbers that are not finite.
        Stopped: If the run was asked to stop, and its state is saved.
    """
    with (
        processes.asked_to_stop() as asked_to_stop,
        _folder_of_this_process(pathlib.Path(workdir)) as folder,
    ):
        with processes.agreeing():
            job = build(config)
        processes.check_same("the images", job.data.identity)
        with contextlib.ExitStack() as stack:
            with processes.agreeing():
                check_here = stack.enter_context(only_run(folder))
                claim_workdir(folder, job.config)
            return _train_and_evaluate(job, folder, asked_to_stop, check_here)


def _train_and_evaluate(
    job: Job,
    workdir: pathlib.Path,
    asked_to_stop: processes.Request,
    check_here: Callable[[], None],
) -> dict[str, Any]:
    console = Console(quiet=jax.process_index() > 0)
    config, data = job.config, job.data
    steps, steps_per_epoch = job.steps, job.steps_per_epoch
    state = create_train_state(config, job.model, job.tx)
    manager = checkpoints.open_checkpoints(workdir)
    state = checkpoints.restore(manager, state, console, data.identity)
    start = int(state.step)
    report.print_settings(
        console,
        job,
        {
            "workdir": workdir,
            "images": images_of(data),
            "parameters": f"{sum(x.size for x in jax.tree.leaves(state.params)):,}",
            "kernel weights": f"{st3jax.summary(state.params).weights:,}",
            "steps": f"{start:,} to {steps:,}, {steps_per_epoch:,} an epoch",
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        },
    )

    # Laid out as pmap lays out its results, or the second step would compile again.
    state = jax_utils.replicate(state, axis_name=BATCH_AXIS)
    programs = compile_programs(job.model, config)
    names = finite_names(state)
    last_raw = histograms.recorded_after(job)
    checkpoint_steps = max(1, round(config.checkpoint_every_epochs * steps_per_epoch))

    def test(step: int) -> dict[str, float]:
        fixed = step >= steps_per_epoch * config.num_epochs
        return evaluate(programs, state, data, config, fixed, asked_to_stop.waiting)

    def is_tested(step: int) -> bool:
        epoch, past = divmod(step, steps_per_epoch)
        return step == steps or not (past or epoch % config.eval_every_epochs)

    with (
        checkpoints.closing(manager),
        Monitor(workdir, console, start, steps) as monitor,
        _saving_when_interrupted(manager, job, lambda: state, check_here),
        _closing(input_pipeline.train_batches(data, config, start, steps)) as batches,
    ):
        if start == steps or (start and is_tested(start)):  # stopped while it tested
            tests = test(start)
            monitor.record_once(start, tests)
        recent: list[Any] = []
        since, waited, unread = time.monotonic(), 0.0, 0
        for step in range(start + 1, steps + 1):
            before = time.monotonic()
            with asked_to_stop.waiting():
                batch = next(batches)
            waited += time.monotonic() - before
            unread = unread_in_a_row(unread, batch["valid"])
            state, metrics = programs.train_step(state, split_over_devices(batch))
            recent.append(metrics)
            last, stops = step == steps, asked_to_stop(step)
            saves = last or stops or step % checkpoint_steps == 0
            if step == last_raw:
                check_here()
                histograms.record(workdir, job, jax_utils.unreplicate(state))

            if saves or step % config.log_every_steps == 0:
                means = summarise(recent, step, names, config)
                seconds = time.monotonic() - since
                means["images_per_second"] = len(recent) * config.batch_size / seconds
                means["input_wait"] = waited / seconds
                summary = programs.summary(state)
                means["sparsity"] = float(summary.sparsity)
                monitor.record(step, means)
                monitor.tell_vanished(step, summary.vanished())
                recent, since, waited = [], time.monotonic(), 0.0

            if is_tested(step):
                tests = test(step)
                monitor.record(step, tests)

            if saves:
                one = jax_utils.unreplicate(state)
                check_here()
                checkpoints.save(manager, step, one, data.identity)
            if last or stops:
                checkpoints.wait(manager)
            if stops and not last:
                raise _stopped(step, steps)

    check_here()
    tested = jax_utils.unreplicate(programs.eval_variables(state))
    networks = jax.device_get(tested)
    told = ship.write_networks(workdir, job, networks, tests)
    params = networks["test"]["params"]
    result = report.write_report(workdir, console, job, params, tests)
    for sentence in told:
        console.print(sentence, soft_wrap=True)  # so that it can be copied
    return result


@contextlib.contextmanager
def _closing(batches: Any) -> Iterator[Any]:
    """Closes the batches, unless what they wait for may never come."""
    try:
        yield batches
    except processes.Interrupted:
        raise
    except BaseException:
        batches.close()
        raise
    batches.close()


@contextlib.contextmanager
def _saving_when_interrupted(
    manager: Any,
    job: Job,
    current: Callable[[], TrainState],
    check_here: Callable[[], None],
) -> Iterator[None]:
    """Saves the state if the run is asked to stop while it waits for images."""
    try:
        yield
    except processes.Interrupted:
        state = jax_utils.unreplicate(current())
        step = int(state.step)
        if step != manager.latest_step():
            check_here()
            checkpoints.save(manager, step, state, job.data.identity)
        checkpoints.wait(manager)
        raise _stopped(step, job.steps) from None


def _stopped(step: int, steps: int) -> Stopped:
    return Stopped(
        f"asked to stop: saved after step {step:,} of {steps:,}; the same command goes "
        "on from there"
    )


LONGEST_NAME = 150


def default_workdir(config_file: str, overrides: dict[str, Any]) -> pathlib.Path:
    """``runs/<configuration>``, with the fields that the command line changed."""
    changes = [
        f"{name}={value}"
        for name, value in sorted(overrides.items())
        if name not in FREE
    ]
    name = "-".join([pathlib.Path(config_file).stem, *changes])
    plain = re.sub(r"[^\w.=+-]+", "_", name)
    if plain != name or len(plain) > LONGEST_NAME:  # of a file, on most disks
        digest = hashlib.sha256(name.encode()).hexdigest()
        plain = f"{plain[:LONGEST_NAME]}-{digest[:8]}"
    return pathlib.Path("runs", plain)


CONFIG = config_flags.DEFINE_config_file("config", help_string="Configuration file.")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for checkpoints, logs and the report; a run that is in it "
    "is continued. Default: a folder under runs/ named after the settings.",
)  # fmt: skip
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Join the other processes of this TPU pod, Slurm, Open MPI "
    "or Kubernetes job.",
)  # fmt: skip
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of the first process, elsewhere; needs the next two"
)
PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes.")
PROCESS = flags.DEFINE_integer("process", None, "Number of this process, from 0.")


def main(argv: list[str]) -> None:
    """Reads the flags and trains; whatever happens is told in a sentence."""
    flag = flags.FLAGS["config"]
    config_file = config_flags.get_config_filename(flag)
    given = config_flags.get_override_values(flag)
    workdir = pathlib.Path(WORKDIR.value or default_workdir(config_file, given))
    try:
        if argv[1:]:
            raise UserError(f"unknown argument {argv[1]!r}: settings are --config.x=y")
        if not pathlib.Path(config_file).is_file():
            raise UserError(f"there is no configuration file {config_file}")
        _check_name(workdir)
        many = PROCESSES.value is not None or PROCESS.value is not None
        if many and not COORDINATOR.value:
            raise UserError("--processes and --process need --coordinator=host:port")
        if DISTRIBUTED.value or COORDINATOR.value:
            processes.join(COORDINATOR.value, PROCESSES.value, PROCESS.value)
        _check_devices()
        train_and_evaluate(CONFIG.value, workdir)
    except Stopped as stopped:
        print(stopped)
        if jax.process_count() == 1:  # others would take it for lost
            terminal.end(0)
    except UserError as error:
        terminal.end(1, f"error: {error}")
    except KeyboardInterrupt:
        terminal.end(
            130, "stopped at once: the same command goes on from the last checkpoint"
        )
    except Exception as error:
        terminal.end(1, f"error: {_told(error, workdir)}")


def _check_name(workdir: pathlib.Path) -> None:
    """Orbax knows names in UTF-8 alone."""
    try:
        str(workdir).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"--workdir is a name in UTF-8, got {str(workdir)!r}: choose another"
        ) from None


def _check_devices() -> None:
    """There is something to compute on."""
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            "JAX finds no device"
            f"{f' ({reason})' if reason else ''}: JAX_PLATFORMS is "
            f"{os.environ.get('JAX_PLATFORMS')!r}, and names what this machine and "
            "this installation have, or is not set"
        ) from error


def _told(error: Exception, workdir: pathlib.Path) -> str:
    """What the user reads of an error that no part of the program explains."""
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
        return (
            f"one of the {jax.process_count()} processes seems to be lost "
            f"({lines[0][:200]}): start all of them again, and they go on from the "
            "last checkpoint"
        )
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in lines[0]:
        return (
            f"there is not enough memory ({lines[0][:200]}): lower config.batch_size, "
            "or work through batches in parts with config.accumulate_steps"
        )
    return (
        f"{terminal.tell_crash(error, workdir)}; the checkpoints are intact, and the "
        "same command goes on from the last one"
    )


def parse_flags(argv: list[str]) -> list[str]:
    """Reads the command line; what is wrong with it is told in a sentence."""
    try:
        return flags.FLAGS(argv)
    except Exception as error:  # of absl, ml_collections or the configuration's file
        first = (str(error).strip().splitlines() or [""])[0]
        unknown = unknown_field(argv)
        if unknown and not isinstance(error, flags.Error):
            sys.exit(f"error: {unknown}: experiments/base_config.py lists them all")
        if isinstance(error, flags.Error):
            field = re.match(r"flag --config\.(?:defaults\.common\.)?([\w.]+)=", first)
            kind = KINDS.get(field[1]) if field else None
            words = f": config.{field[1]} {described(kind)}" if field and kind else ""
            sys.exit(f"error: {first}{words}")
        if "get_config" in first:
            sys.exit("error: a configuration file has a function get_config()")
        sys.exit(
            "error: the configuration cannot be read "
            f"({type(error).__name__}: {first[:200]})"
        )


def unknown_field(argv: list[str]) -> str:
    """What is wrong with the name of the first field that there is not."""
    known = base_config.get_config()
    for argument in argv[1:]:
        named = re.match(r"--?(?:no)?config\.([^=]*)", argument)
        node: Any = known
        for name in named[1].split(".") if named else ():
            inner = node if isinstance(node, ml_collections.ConfigDict) else {}
            if name not in inner:
                meant = difflib.get_close_matches(name, inner, 1)
                return (
                    f"the configuration has no field {name!r}"
                    f"{f', did you mean {meant[0]!r}' if meant else ''}"
                )
            node = inner[name]
    return ""


if __name__ == "__main__":
    terminal.keep_streams()
    logging.set_verbosity(logging.FATAL)  # errors are told in a sentence
    sys.unraisablehook = checkpoints.quiet_unraisable
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)
