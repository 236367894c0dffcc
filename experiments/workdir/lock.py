"""One run at a time in a workdir."""

import contextlib
import datetime
import json
import os
import pathlib
import socket
from collections.abc import Iterator

import filelock

from errors import UserError
from workdir.files import cause, replace_file

__all__ = ["only_run"]


@contextlib.contextmanager
def only_run(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps other runs out of the workdir, which is made if it is not there.

    The operating system holds the lock, and gives it up when the process ends, however
    it ends. It holds over all hosts if the file system passes locks on, as NFS and
    Lustre (mounted with ``flock``) do; where one has none, a file stands for it.

    Raises:
        UserError: If another run is using the workdir, or it cannot be written to.
    """
    owner = workdir / "owner.json"
    lock = filelock.FileLock(workdir / "lock", blocking=False)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        since = f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}"
        me = {"host": socket.gethostname(), "process": os.getpid(), "since": since}
        replace_file(owner, json.dumps(me))
    except filelock.Timeout:
        raise UserError(
            f"another run{_described(owner)} is using the workdir {workdir}: wait for "
            "its end, stop it, or choose another with --workdir=..."
        ) from None
    except OSError as error:
        raise UserError(
            f"the workdir {workdir} cannot be written to ({cause(error)}): choose "
            "another with --workdir=..."
        ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a workdir that is gone
            owner.unlink()
        with contextlib.suppress(OSError):
            lock.release()


def _described(owner: pathlib.Path) -> str:
    """Which run it is; nothing if it has not told yet."""
    try:
        told = json.loads(owner.read_text())
        return f" (on {told['host']}, process {told['process']}, since {told['since']})"
    except (OSError, ValueError, LookupError, TypeError):
        return ""
