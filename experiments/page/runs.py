"""What a finished run has left in its workdir, for the page to show."""

import contextlib
import json
import pathlib
from typing import Any, NamedTuple

import st3jax
from errors import UserError
from workdir.files import cause
from workdir.missing import why_missing
from workdir.monitor import read_metrics

__all__ = ["HISTOGRAMS", "LATENCY", "REPORT", "Run", "exported", "read_run"]

REPORT, HISTOGRAMS, LATENCY = "report.json", "histograms.json", "latency.json"


class Run(NamedTuple):
    """A finished run.

    Attributes:
        name: Of its folder.
        report: What ``report.json`` holds.
        rows: Those of ``metrics.jsonl``.
        histograms: What ``histograms.json`` holds; empty if there is none.
        latency: What ``latency.json`` holds; empty if there is none.
        files: From the name of a file to ship to its size, bytes.
    """

    name: str
    report: dict[str, Any]
    rows: list[dict[str, float]]
    histograms: dict[str, Any]
    latency: dict[str, Any]
    files: dict[str, int]


def read_run(workdir: pathlib.Path, option: str = "--workdir") -> Run:
    """The run that a workdir holds.

    Args:
        workdir: The folder.
        option: With which another folder can be named, to be told if this holds none.

    Raises:
        UserError: If none has come to its end there, or a file is damaged.
    """
    try:
        if not (workdir / REPORT).exists():
            if _is_transformer(workdir):
                raise UserError(
                    f"the network in {workdir} is one of transformer.py, which leaves "
                    "no report: the runs of train.py do"
                )
            raise UserError(why_missing(workdir, REPORT, option))
        return Run(
            name=workdir.resolve().name,
            report=_object(workdir / REPORT),
            rows=read_metrics(workdir),
            histograms=_object(workdir / HISTOGRAMS),
            latency=_object(workdir / LATENCY),
            files=_sizes(workdir),
        )
    except OSError as error:
        raise UserError(f"{workdir} cannot be read ({cause(error)})") from error


def _is_transformer(workdir: pathlib.Path) -> bool:
    """Whether a network lies there that says so of itself."""
    with contextlib.suppress(OSError, ValueError):
        metadata = st3jax.read_header(workdir / "model.st3")["metadata"]
        return bool(metadata.get("network") == "transformer")
    return False


def _object(path: pathlib.Path) -> dict[str, Any]:
    if path.name != REPORT and not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(errors="replace"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: {remedy(path.name)}")
    return content


def remedy(name: str) -> str:
    """What to do about a damaged file."""
    if name == REPORT:
        return "the command that trained the run, given again, writes it anew"
    return "move it away, and the page is made without it"


def exported(workdir: pathlib.Path) -> list[pathlib.Path]:
    """What lies under ``export``, without what a killed command has left half done."""
    return [
        path
        for path in sorted(workdir.glob("export/**/*"))
        if not any(part.startswith(".draft-") for part in path.parts)
    ]


def _sizes(workdir: pathlib.Path) -> dict[str, int]:
    """The files of the network, and all that was exported."""
    found = [*sorted(workdir.glob("model*.*")), *exported(workdir)]
    return {
        path.relative_to(workdir).as_posix(): path.stat().st_size
        for path in found
        if path.is_file() and path.suffix != ".draft"
    }
