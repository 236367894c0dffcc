"""One run over many processes: joining, stopping together, and when one is lost."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils

__all__ = ["HEARTBEAT_SECONDS", "asked_to_stop", "join", "leave"]

HEARTBEAT_SECONDS = 60
"""How long a silent process counts as alive; after it the others end."""
STOPS = (signal.SIGTERM, signal.SIGINT)


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
    """
    jax.distributed.initialize(
        coordinator,
        processes,
        process,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=HEARTBEAT_SECONDS,
    )


def leave(message: str) -> NoReturn:
    """Ends this process with a message and status 1, without waiting for others.

    An ordinary exit would wait for processes that may themselves wait for this one.
    """
    if jax.process_count() == 1:
        sys.exit(message)
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Callable[[int], bool]]:
    """Whether the run was asked to stop after a step: with SIGTERM, or Ctrl-C.

    Of many processes, one that gets SIGTERM stops all, after the same step. A second
    signal to a single process does what it does otherwise.

    Yields:
        A function of the step, to be called after each one.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    asked: list[int] = []
    before: dict[int, Any] = {number: signal.getsignal(number) for number in STOPS}

    def note(number: int, frame: Any) -> None:
        del frame
        asked.append(number)
        os.write(2, b"\nstopping after this step; once more ends at once\n")
        signal.signal(number, before[number])

    for number in STOPS:
        signal.signal(number, note)
    try:
        yield lambda step: bool(asked)
    finally:
        for number in STOPS:
            signal.signal(number, before[number])
