"""One run over many processes: joining, stopping together, and when one is lost."""

import contextlib
import hashlib
import os
import re
import signal
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from errors import UserError

__all__ = [
    "HEARTBEAT_SECONDS",
    "Interrupted",
    "Request",
    "agreeing",
    "asked_to_stop",
    "check_same",
    "join",
]

HEARTBEAT_SECONDS = 60
"""How long a silent process counts as alive; after it the others end."""
LONGEST = 2000
"""Bytes of a sentence that processes tell each other."""
WAIT_SECONDS = 5
"""How long a run that was asked to stop still waits for images."""
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> None:
    """Joins the other processes of the run, before anything else is done with JAX.

    Args:
        coordinator: ``host:port`` of the first process. This and the rest are found
            by JAX itself on TPU pods, Slurm, Open MPI and Kubernetes.
        processes: Number of processes.
        process: Number of this one, from 0.

    Raises:
        UserError: If these do not make a run, or the others cannot be reached.
    """
    if coordinator and not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(f"--coordinator is host:port, got {coordinator!r}")
    if coordinator and not (processes and process in range(processes)):
        raise UserError(
            "--coordinator needs --processes, 1 or more, and --process, from 0 to one "
            f"less, got {processes} and {process}"
        )
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the other processes of the run cannot be joined ({reason}): see --help"
        ) from error


def check_same(what: str, facts: Any) -> None:
    """Every process has the same facts.

    Raises:
        UserError: On all of them, if one has others.
    """
    if jax.process_count() == 1:
        return
    mine = np.frombuffer(hashlib.sha256(repr(facts).encode()).digest(), np.uint8)
    for process, other in enumerate(multihost_utils.process_allgather(mine)):
        if not np.array_equal(other, mine):
            raise UserError(
                f"{what} of process {process} are not those of process "
                f"{jax.process_index()}: give all the same config.data and content"
            )


@contextlib.contextmanager
def agreeing() -> Iterator[None]:
    """What one process finds wrong ends all of them, with its sentence.

    Otherwise the others would wait for it, and break off with pages about that.

    Raises:
        UserError: On all processes, if one raises it.
    """
    mine = ""
    try:
        yield
    except UserError as error:
        if jax.process_count() == 1:
            raise
        mine = str(error)
    if jax.process_count() == 1:
        return
    text = np.frombuffer(mine.encode()[:LONGEST].ljust(LONGEST), np.uint8)
    for row in multihost_utils.process_allgather(text):
        told = row.tobytes().decode(errors="replace").strip()
        if told:
            raise UserError(mine or told)


class Interrupted(Exception):  # noqa: N818  it is no mistake
    """The run was asked to stop while it waited."""


class Request:
    """Whether a run was asked to stop, by a signal to this process alone."""

    def __init__(self) -> None:
        self._asked = self._waits = False

    def __call__(self, step: int) -> bool:
        """Whether the run is to stop after this step."""
        del step
        return self._asked

    def note(self) -> None:
        """A signal came: what works goes on to its end, what waits does not long."""
        self._asked = True
        self._limit()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """For what may take for ever.

        Raises:
            Interrupted: If it takes longer than a few seconds more when the run is
                asked to stop.
        """
        self._waits = True
        self._limit()
        try:
            yield
        finally:
            self._waits = False
            if self._asked:  # or the timer is somebody else's
                signal.setitimer(signal.ITIMER_REAL, 0)

    def interrupt(self) -> None:
        """The few seconds have passed."""
        if self._waits:
            raise Interrupted

    def _limit(self) -> None:
        if self._asked and self._waits:
            signal.setitimer(signal.ITIMER_REAL, WAIT_SECONDS)


class SharedRequest(Request):
    """The same where many processes train: they agree after each step, or never."""

    def __call__(self, step: int) -> bool:
        """Whether all processes are to stop after this step."""
        return multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Request]:
    """Whether the run was asked to stop after a step: with SIGTERM, SIGHUP or Ctrl-C.

    Of many processes, one that gets SIGTERM stops all, after the same step. A second
    signal to a single process does what it does otherwise. SIGHUP is ignored where it
    was so at the start, as under ``nohup``.

    Yields:
        A function of the step, to be called after each one.
    """
    if jax.process_count() > 1:
        yield SharedRequest()
        return
    request = Request()
    noted = (*STOPS, signal.SIGALRM)
    before: dict[int, Any] = {number: signal.getsignal(number) for number in noted}

    def note(number: int, frame: Any) -> None:
        del frame
        signal.signal(number, before[number])
        with contextlib.suppress(OSError):  # the terminal may be what is gone
            os.write(2, b"\nstopping after this step; once more ends at once\n")
        request.note()

    for number in STOPS:
        if number != signal.SIGHUP or before[number] != signal.SIG_IGN:
            signal.signal(number, note)
    signal.signal(signal.SIGALRM, lambda number, frame: request.interrupt())
    try:
        yield request
    finally:
        for number in noted:
            signal.signal(number, before[number])
