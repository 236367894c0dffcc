"""Orbax checkpoints in the workdir, to continue a run from.

A checkpoint holds the whole training state. Random numbers and the position of the
input follow from the seed and the state's step, so a run that was killed goes on as if
nothing had happened. Where many processes train, the first one alone reads and writes.
"""

import contextlib
import hashlib
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from rich.console import Console

from errors import UserError
from paths import by_path
from workdir.files import writing

__all__ = [
    "closing",
    "open_checkpoints",
    "quiet_unraisable",
    "restore",
    "save",
    "wait",
]


class _Checkpoints(ocp.CheckpointManager):
    """Leaves it to the training loop to ask whether all processes are to stop.

    JAX takes the step of the last such question for how far a process has come. One
    about the step that is still being written, from the thread that writes, may have
    all of them stop after a step that this process has left behind.
    """

    def reached_preemption(self, step: int) -> bool:
        del step
        return False


def open_checkpoints(workdir: pathlib.Path) -> ocp.CheckpointManager:
    """The newest two checkpoints of the workdir, written in the background."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
    )
    folder = workdir.resolve() / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    return _Checkpoints(
        folder,
        options=ocp.CheckpointManagerOptions(
            create=False,
            max_to_keep=2,
            cleanup_tmp_directories=True,  # what a kill left of a save
            multiprocessing_options=alone,
        ),
        item_handlers={
            "state": ocp.StandardCheckpointHandler(),
            "digest": ocp.JsonCheckpointHandler(),
        },
    )


def save(checkpoints: ocp.CheckpointManager, step: int, state: Any) -> None:
    """Starts to write the state after ``step`` steps; the first process does.

    Raises:
        UserError: If this checkpoint, or the one before, cannot be written.
    """
    if jax.process_index() > 0:
        return
    state = jax.device_get(state)
    with writing(checkpoints.directory):
        checkpoints.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                digest=ocp.args.JsonSave({"blake2b": _digest(state)}),
            ),
        )


def wait(checkpoints: ocp.CheckpointManager) -> None:
    """Returns when what ``save`` started is on the disk.

    Raises:
        UserError: If it cannot be written.
    """
    with writing(checkpoints.directory):
        checkpoints.wait_until_finished()


@contextlib.contextmanager
def closing(checkpoints: ocp.CheckpointManager) -> Iterator[None]:
    """Waits at the end for what is being written.

    Raises:
        UserError: If it cannot be written.
    """
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):  # another one of the same kind
            checkpoints.close()
        raise
    with writing(checkpoints.directory):
        checkpoints.close()


def _digest(state: Any) -> str:
    """A fingerprint of every bit of the state, so that damage on a disk shows."""
    digest = hashlib.blake2b()
    for leaf in jax.tree.leaves(state):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def restore(checkpoints: ocp.CheckpointManager, state: Any, console: Console) -> Any:
    """The state of the newest whole checkpoint, or ``state`` itself if there is none.

    The first process reads, and hands the state to the others.

    Args:
        checkpoints: The workdir's checkpoints.
        state: A state of the structure, shapes and dtypes to expect.
        console: Where to warn of a damaged checkpoint.

    Raises:
        UserError: If the checkpoint belongs to another model or optimizer, or if there
            are checkpoints and all are damaged.
    """
    if jax.process_index() == 0:
        state = _newest(checkpoints, state, console)
    return _from_first_process(state) if jax.process_count() > 1 else state


def quiet_unraisable(unraisable: Any) -> None:
    """As ``sys.unraisablehook``: leaves out what only follows an error that is told.

    If one of many arrays cannot be read or written, Orbax raises and closes its event
    loop, and every other array would print a traceback about that.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _newest(checkpoints: ocp.CheckpointManager, state: Any, console: Console) -> Any:
    damaged = []
    for step in sorted(checkpoints.all_steps(), reverse=True):
        try:
            restored = _read(checkpoints, step, state)
        except UserError:
            raise
        except Exception as error:  # damage shows in many ways
            reason = (str(error).strip().splitlines() or [""])[0]
            damaged.append((step, f"{type(error).__name__}: {reason[:200]}"))
            continue
        for bad, reason in damaged:
            console.print(
                f"[bold]warning:[/] the checkpoint of step {bad} is damaged ({reason});"
                f" going on from the one of step {step}"
            )
            checkpoints.delete(bad)
        return restored
    if damaged:
        step, reason = damaged[0]
        raise UserError(
            f"every checkpoint in {checkpoints.directory} is damaged (step {step}: "
            f"{reason}): remove that folder to start from the beginning"
        )
    return state


def _read(checkpoints: ocp.CheckpointManager, step: int, state: Any) -> Any:
    metadata = checkpoints.item_metadata(step)["state"]
    if metadata is None:
        raise ValueError("its metadata are missing")
    there, here = _shapes(metadata), _shapes(state)
    for name in here | there:
        if here.get(name) != there.get(name):
            stored, expected = there.get(name, "absent"), here.get(name, "absent")
            raise UserError(
                f"the checkpoint in {checkpoints.directory} (step {step}) is of "
                f"another model or optimizer: {name} is {stored} there and {expected} "
                "here; choose another --workdir=..."
            )
    restored = checkpoints.restore(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(state), digest=ocp.args.JsonRestore()
        ),
    )
    if restored["digest"]["blake2b"] != _digest(jax.device_get(restored["state"])):
        raise ValueError("its bits are not those that were written")
    return restored["state"]


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in by_path(tree).items()}


def _from_first_process(tree: Any) -> Any:
    """The first process's arrays on every process, to the last bit."""
    host = jax.tree.map(np.asarray, jax.device_get(tree))
    raw = jax.tree.map(lambda x: x.reshape(-1).view(np.uint8), host)
    raw = multihost_utils.broadcast_one_to_all(raw)  # sums: -0.0 would not survive
    return jax.tree.map(
        lambda x, like: np.asarray(x).view(like.dtype).reshape(like.shape), raw, host
    )
