"""What a person sees while a run goes on: a progress bar, log files, TensorBoard."""

import contextlib
import functools
import json
import math
import pathlib
import socket
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from workdir.files import replace_file, writing

__all__ = ["Monitor", "read_metrics", "skipped_images"]

METRICS = "metrics.jsonl"
SHOWN = {
    "train_loss": "loss {:.2f}",
    "train_accuracy": "acc {:.0%}",
    "test_accuracy": "test {:.1%}",
    "sparsity": "zeros {:.1%}",
    "images_per_second": "{:,.0f} img/s",
}


class Monitor:
    """Shows and records the course of a run.

    Use as a context manager. Metrics go to ``metrics.jsonl`` (one object a line) and to
    TensorBoard event files in the workdir.
    """

    def __init__(self, workdir: pathlib.Path, console: Console, start: int, total: int):
        """Continues the logs of a run at step ``start`` of ``total``."""
        kept = [row for row in read_metrics(workdir) if row["step"] <= start]
        lines = "".join(json.dumps(row) + "\n" for row in kept)
        folder = workdir / "tensorboard"
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        self._writing = functools.partial(writing, workdir)
        with self._writing():
            replace_file(workdir / METRICS, lines)
            self._file = (workdir / METRICS).open("a")
            folder.mkdir(exist_ok=True)
            # Not tensorboardX's SummaryWriter: its thread ends on a full disk, and
            # who waits for the thread waits for ever.
            self._events = RecordWriter(str(folder / name))
            self._event(0, file_version="brain.Event:2")
            self._event(start, session_log=SessionLog(status=SessionLog.START))
        self._progress = Progress(
            TaskProgressColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
        )
        self._task = self._progress.add_task(
            "", total=total, completed=start, status=""
        )
        self._kept = kept
        self._shown: dict[str, float] = {}
        self._vanished: set[str] = set()
        self._skipped = self._skipped_told = skipped_images(kept)
        self._skipped_tests = 0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()
        for file in (self._events, self._file):
            with contextlib.suppress(OSError) if error else self._writing():
                file.close()

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes metrics to the log files and moves the progress bar to ``step``."""
        with self._writing():
            self._file.write(json.dumps({"step": step, **metrics}) + "\n")
            self._file.flush()
            for name, value in metrics.items():
                self._event(step, summary=scalar(name, value))
            self._events.flush()
        self._shown |= metrics
        status = " ".join(
            text.format(self._shown[name])
            for name, text in SHOWN.items()
            if name in self._shown
        )
        self._progress.update(self._task, completed=step, status=status)
        self._tell_skipped(step, metrics)

    def _tell_skipped(self, step: int, metrics: Mapping[str, float]) -> None:
        """Says that images were left out: at first, and when they are twice as many."""
        self._skipped += skipped_images([metrics])
        if self._skipped and self._skipped >= 2 * self._skipped_told:
            self._skipped_told = self._skipped
            self._tell_left_out(step, "training images", self._skipped)
        tests = int(metrics.get("skipped_test_images", 0))
        if tests > self._skipped_tests:
            self._skipped_tests = tests
            self._tell_left_out(step, "test images", tests)

    def _tell_left_out(self, step: int, images: str, number: int) -> None:
        self._progress.console.print(
            f"step {step:,}: {images} left out so far, for they could not be read: "
            f"{number:,}",
            markup=False,
        )

    def record_once(self, step: int, tests: Mapping[str, float]) -> None:
        """Records tests after the step of the start, if that was not done before."""
        done = any(
            row["step"] == step and tests.keys() <= row.keys() for row in self._kept
        )
        if not done:
            self.record(step, tests)

    def tell_vanished(self, step: int, kernels: list[str]) -> None:
        """Names kernels of which nothing is left, each once."""
        new = [kernel for kernel in kernels if kernel not in self._vanished]
        self._vanished |= {*new}
        if new:
            more = f" and {len(new) - 5} more" if len(new) > 5 else ""
            self._progress.console.print(
                f"step {step:,}: every weight is zero in {', '.join(new[:5])}{more}, "
                "so that no signal passes them: docs/options.md, Layers that vanish",
                markup=False,
            )

    def _event(self, step: int, **content: Any) -> None:
        event = Event(wall_time=time.time(), step=step, **content)
        self._events.write(event.SerializeToString())


def skipped_images(rows: Iterable[Mapping[str, float]]) -> int:
    """How often a training image was left out in these rows of the log file."""
    return int(sum(row.get("skipped_images", 0) for row in rows))


def read_metrics(workdir: pathlib.Path) -> list[dict[str, float]]:
    """All rows of the log file; what a kill cut short, or is none, is left out."""
    path = workdir / METRICS
    text = path.read_text(errors="replace") if path.exists() else ""
    rows = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if _is_row(row)]


def _is_row(row: Any) -> bool:
    """Whether it is what ``Monitor.record`` writes."""
    return (
        isinstance(row, dict)
        and type(row.get("step")) is int
        and all(type(x) in (int, float) and math.isfinite(x) for x in row.values())
    )
