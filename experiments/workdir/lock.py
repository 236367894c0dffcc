"""One run at a time in a workdir."""

import contextlib
import datetime
import json
import os
import pathlib
import socket
from collections.abc import Callable, Iterator

import filelock

from errors import UserError
from workdir.files import cause, replace_file

__all__ = ["only_run"]


@contextlib.contextmanager
def only_run(workdir: pathlib.Path) -> Iterator[Callable[[], None]]:
    """Keeps other runs out of the workdir, which is made if it is not there.

    The operating system holds the lock, and gives it up when the process ends, however
    it ends. It holds over all hosts if the file system passes locks on, as NFS and
    Lustre (mounted with ``flock``) do; where one has none, a file stands for it.

    Yields:
        A function that raises UserError if the workdir was moved or removed since, and
        whatever is there now is not the one that is locked.

    Raises:
        UserError: If another run is using the workdir, or it cannot be written to.
    """
    owner = workdir / "owner.json"
    lock = filelock.FileLock(workdir / "lock", blocking=False)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        began = workdir.stat()
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

    def check_here() -> None:
        if not _is_there(workdir, began):
            raise UserError(
                f"the workdir {workdir} is no longer the one that this run began in: "
                "put it back, and the same command goes on from the last checkpoint"
            )

    try:
        yield check_here
    finally:
        if _is_there(workdir, began):
            owner.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            lock.release()


def _is_there(folder: pathlib.Path, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(folder.stat(), status)
    except OSError:
        return False


def _described(owner: pathlib.Path) -> str:
    """Which run it is; nothing if it has not told yet."""
    try:
        told = json.loads(owner.read_text())
        return f" (on {told['host']}, process {told['process']}, since {told['since']})"
    except (OSError, ValueError, LookupError, TypeError):
        return ""
