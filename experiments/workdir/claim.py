"""Whose run a workdir holds: that of the configuration that lies in it."""

import json
import pathlib
from typing import Any

import ml_collections

from errors import UserError
from workdir.files import cause, replace_file

__all__ = ["FREE", "claim_workdir"]

FREE = ("data.broken_images", "data.dir", "data.max_pixels", "data.workers")
"""Fields that change nothing about the result but for images that cannot be read.

A run may go on with others: where it ends at such an image, two of them are advised.
"""


def claim_workdir(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Makes the workdir and leaves the configuration in it.

    Raises:
        UserError: If it cannot be written to, or holds a run of other settings.
    """
    claim = workdir / "config.json"
    settings = config.to_json_best_effort(indent=2)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        for path in (claim, workdir / "metrics.jsonl"):
            if path.exists() and not path.is_file():  # some are never read to an end
                raise UserError(f"{path} is no ordinary file: move it away")
        if not claim.exists():
            if (workdir / "model.st3").exists():
                raise UserError(
                    f"the workdir {workdir} holds a network of another program, "
                    "model.st3: choose another with --workdir=..."
                )
            replace_file(claim, settings)
        with (workdir / "metrics.jsonl").open("a"):
            pass
        text = claim.read_text(errors="replace")
    except OSError as error:
        raise UserError(
            f"the workdir {workdir} cannot be written to ({cause(error)}): choose "
            "another with --workdir=..."
        ) from None
    try:
        there = _flat(json.loads(text))
    except (ValueError, AttributeError, RecursionError):
        raise UserError(
            f"{claim} is damaged: choose another workdir with --workdir=..., or remove "
            "that file if the run is of the settings given here"
        ) from None
    here = _flat(json.loads(settings))
    differing = [
        f"{name} = {there.get(name)!r} there, {here.get(name)!r} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name) and name not in FREE
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
