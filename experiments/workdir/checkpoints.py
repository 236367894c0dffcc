"""Orbax checkpoints in the workdir, to continue a run from.

A checkpoint holds the whole training state. Random numbers and the position of the
input follow from the seed and the state's step, so a run that was killed goes on as if
nothing had happened. Where many processes train, the first one alone reads and writes.
"""

import contextlib
import hashlib
import itertools
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from rich.console import Console
from rich.markup import escape

import processes
from errors import UserError
from paths import by_path
from workdir.digests import find_damage, write_digests
from workdir.files import cause, writing

__all__ = [
    "closing",
    "open_checkpoints",
    "quiet_unraisable",
    "restore",
    "save",
    "wait",
]

_UNFINISHED = "*.orbax-checkpoint-tmp"
"""What is being written, or what a kill left of it."""


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
    """The newest two checkpoints of the workdir, written in the background.

    Raises:
        UserError: If the folder cannot be written to, or holds what is no checkpoint.
    """
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
    )
    folder = workdir.resolve() / "checkpoints"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        folder = folder.resolve()
        _check_no_strangers(folder)
        for unfinished in folder.glob(_UNFINISHED):
            shutil.rmtree(unfinished)

    def seal() -> None:  # before what is written gets its name
        for written in folder.glob(_UNFINISHED):
            write_digests(written)

    return _Checkpoints(
        folder,
        options=ocp.CheckpointManagerOptions(
            create=False,
            max_to_keep=2,
            async_options=ocp.AsyncOptions(post_finalization_callback=seal),
            multiprocessing_options=alone,
        ),
        item_handlers={
            "state": ocp.StandardCheckpointHandler(),
            "digest": ocp.JsonCheckpointHandler(),
        },
    )


def _check_no_strangers(folder: pathlib.Path) -> None:
    """Nothing has the name of a checkpoint that was not written as one.

    Checkpoints are removed when newer ones are there, and so would this be.
    """
    for path in folder.iterdir():
        ours = [path / name for name in ("_CHECKPOINT_METADATA", "state", "digest")]
        named = path.name.isdecimal()
        if named and (path.is_symlink() or not any(map(os.path.lexists, ours))):
            kind = "a symbolic link" if path.is_symlink() else "no checkpoint"
            raise UserError(
                f"{path} is {kind}, but has the name of a checkpoint: it was left as "
                "it is; move it away, and the same command goes on"
            )


def save(
    checkpoints: ocp.CheckpointManager,
    step: int,
    state: Any,
    data: Mapping[str, Any] | None = None,
) -> None:
    """Starts to write the state after ``step`` steps; the first process does.

    Args:
        checkpoints: The workdir's checkpoints.
        step: How many steps led to it.
        state: The training state.
        data: What tells whether the images are the same, as ``sources.Data.identity``.

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
                digest=ocp.args.JsonSave(
                    {"blake2b": _digest(state), "data": dict(data or {})}
                ),
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


def restore(
    checkpoints: ocp.CheckpointManager,
    state: Any,
    console: Console,
    data: Mapping[str, Any] | None = None,
) -> Any:
    """The state of the newest whole checkpoint, or ``state`` itself if there is none.

    The first process reads, and hands the state to the others.

    Args:
        checkpoints: The workdir's checkpoints.
        state: A state of the structure, shapes and dtypes to expect.
        console: Where to warn of a damaged checkpoint.
        data: What tells whether the images are the same, as ``sources.Data.identity``.

    Raises:
        UserError: If the checkpoint belongs to another model or optimizer, or to other
            images, or cannot be read, or if all are damaged.
    """
    with processes.agreeing():
        if jax.process_index() == 0:
            state = _newest(checkpoints, state, data or {}, console)
    return _from_first_process(state) if jax.process_count() > 1 else state


def quiet_unraisable(unraisable: Any) -> None:
    """As ``sys.unraisablehook``: leaves out what only follows an error that is told.

    If one of many arrays cannot be read or written, Orbax raises and closes its event
    loop, and every other array would print a traceback about that.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _newest(
    checkpoints: ocp.CheckpointManager,
    state: Any,
    data: Mapping[str, Any],
    console: Console,
) -> Any:
    damaged: dict[int, str] = {}
    for step in sorted(checkpoints.all_steps(), reverse=True):
        try:
            restored = _read(checkpoints, step, state, data)
        except _Damaged as damage:
            damaged[step] = str(damage)
            continue
        for bad, reason in damaged.items():
            place = _move_aside(checkpoints, bad)
            console.print(
                f"[bold]warning:[/] the checkpoint of step {bad} is damaged ({reason});"
                f" it is in {escape(str(place))} now; going on from the one of step "
                f"{step}"
            )
        return restored
    for step, reason in damaged.items():
        raise UserError(
            f"every checkpoint in {checkpoints.directory} is damaged (step {step}: "
            f"{reason}): remove that folder to start from the beginning"
        )
    return state


class _Damaged(Exception):  # noqa: N818  it says what happened to a disk
    """A checkpoint's bits are not those that were written."""


def _move_aside(checkpoints: ocp.CheckpointManager, step: int) -> pathlib.Path:
    """Puts a damaged checkpoint where nothing looks for one, and removes nothing."""
    folder = pathlib.Path(checkpoints.directory)
    with writing(folder.parent):
        (folder.parent / "damaged").mkdir(exist_ok=True)
        for number in itertools.count():
            place = folder.parent / "damaged" / f"{step}{f'-{number}' * (number > 0)}"
            if not place.exists():
                shutil.move(folder / str(step), place)
                checkpoints.reload()
                return place
    raise AssertionError("counting ends")


def _read(
    checkpoints: ocp.CheckpointManager, step: int, state: Any, data: Mapping[str, Any]
) -> Any:
    """The state of a checkpoint.

    Raises:
        UserError: If it belongs to another model, optimizer or data set, or cannot be
            read.
        _Damaged: If its bits are not those that were written.
    """
    folder = pathlib.Path(checkpoints.directory) / str(step)
    try:
        damage = find_damage(folder)
        if damage:
            raise _Damaged(damage)
        metadata = checkpoints.item_metadata(step)["state"]
        _check_shapes(folder, metadata, state)
        restored = checkpoints.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(state), digest=ocp.args.JsonRestore()
            ),
        )
    except (UserError, _Damaged):
        raise
    except Exception as error:  # libraries raise of many kinds
        raise UserError(
            f"the checkpoint {folder} cannot be read ({cause(error)}): nothing says "
            "that it is damaged, so it was left as it is; mend that, or move it away "
            "to go on from the one before"
        ) from error
    digest = restored["digest"] if isinstance(restored["digest"], dict) else {}
    if digest.get("blake2b") != _digest(jax.device_get(restored["state"])):
        raise _Damaged("its bits are not those that were written")
    _check_data(folder, digest.get("data", {}), data)
    return restored["state"]


def _check_shapes(folder: pathlib.Path, metadata: Any, state: Any) -> None:
    """The checkpoint is one of this model and optimizer."""
    there, here = _shapes(metadata), _shapes(state)
    for name in here | there:
        if here.get(name) != there.get(name):
            stored, expected = there.get(name, "absent"), here.get(name, "absent")
            raise UserError(
                f"the checkpoint in {folder.parent} (step {folder.name}) is of "
                f"another model or optimizer: {name} is {stored} there and {expected} "
                "here; choose another --workdir=..."
            )


def _check_data(
    folder: pathlib.Path, there: Mapping[str, Any], here: Mapping[str, Any]
) -> None:
    """The images are those that it was trained with, wherever they are now."""
    for split, now in here.items():
        then = there.get(split, now)
        if then != now:
            same = then["images"] == now["images"]
            what = "with other names, labels or sizes" if same else f"{now['images']:,}"
            raise UserError(
                f"the images to {split} on have changed since the checkpoint {folder} "
                f"was written ({then['images']:,} then, {what} now): data.dir may move,"
                " but its content may not change; put it back, or choose another "
                "--workdir=..."
            )


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
