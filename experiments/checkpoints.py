"""The workdir: whose run it holds, and Orbax checkpoints to continue it from.

A checkpoint holds the whole training state and the position of the input, so a run
that was killed goes on as if nothing had happened.
"""

import json
import pathlib
from typing import Any

import grain
import ml_collections
import orbax.checkpoint as ocp

from errors import UserError
from st3jax.trees import named_leaves

__all__ = ["claim_workdir", "open_checkpoints", "restore", "save"]


def claim_workdir(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Makes the workdir and leaves the configuration in it.

    Raises:
        UserError: If it cannot be written to, or holds a run of other settings.
    """
    claim = workdir / "config.json"
    settings = config.to_json_best_effort(indent=2)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not claim.exists():
            claim.write_text(settings)
        with (workdir / "metrics.jsonl").open("a"):
            pass
    except OSError as error:
        raise UserError(
            f"the workdir {workdir} cannot be written to ({error.strerror}): choose "
            "another with --workdir=..."
        ) from None
    there, here = (_flat(json.loads(text)) for text in (claim.read_text(), settings))
    differing = [
        f"{name} = {there.get(name)!r} there, {here.get(name)!r} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    if differing:
        raise UserError(
            f"the workdir {workdir} holds a run with other settings "
            f"({'; '.join(differing[:3])}): choose another with --workdir=..."
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        flat |= _flat(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return flat


def open_checkpoints(workdir: pathlib.Path) -> ocp.CheckpointManager:
    """The newest two checkpoints of the workdir, written in the background."""
    return ocp.CheckpointManager(
        workdir.resolve() / "checkpoints",
        options=ocp.CheckpointManagerOptions(max_to_keep=2),
        item_handlers={
            "state": ocp.StandardCheckpointHandler(),
            "input": grain.checkpoint.CheckpointHandler(),
        },
    )


def save(
    checkpoints: ocp.CheckpointManager, step: int, state: Any, batches: Any
) -> None:
    """Starts to write the state after ``step`` steps and the position of the input."""
    checkpoints.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            input=grain.checkpoint.CheckpointSave(batches),
        ),
    )


def restore(checkpoints: ocp.CheckpointManager, state: Any, batches: Any) -> Any:
    """The state of the newest checkpoint, or ``state`` itself if there is none yet.

    Args:
        checkpoints: The workdir's checkpoints.
        state: A state of the structure, shapes and dtypes to expect.
        batches: The input iterator, which is moved to its saved position.

    Raises:
        UserError: If the checkpoint belongs to another model or optimizer.
    """
    step = checkpoints.latest_step()
    if step is None:
        return state
    there, here = _shapes(checkpoints.item_metadata(step)["state"]), _shapes(state)
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
            state=ocp.args.StandardRestore(state),
            input=grain.checkpoint.CheckpointRestore(batches),
        ),
    )
    return restored["state"]


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in named_leaves(tree).items()}
