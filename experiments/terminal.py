"""What a person reads of a run, whatever becomes of the terminal; and how it ends."""

import os
import pathlib
import sys
import tempfile
import time
import traceback
from typing import Any, NoReturn

__all__ = ["end", "keep_streams", "tell_crash"]


class _Unfailing:
    """A text stream that is written to nowhere once its other end is gone."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes, or has the whole stream go nowhere from now on."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            self._go_nowhere()
            return len(text)

    def flush(self) -> None:
        """Flushes, or has the whole stream go nowhere from now on."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._go_nowhere()

    def _go_nowhere(self) -> None:
        """Also what is still in the stream's buffer, which is written at the end."""
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def keep_streams() -> None:
    """Has output never end a run: a reader that left, a closed terminal, a full disk.

    Characters that the terminal's encoding lacks are shown as question marks.
    """
    for number in range(3):  # or the next file that is opened would be one of them
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        else:
            stream.reconfigure(errors="replace")
            setattr(sys, name, _Unfailing(stream))


def end(status: int, message: str = "") -> NoReturn:
    """Ends the process at once, with a message to stderr if the status is not 0.

    An ordinary exit waits for threads: of a library that could not write and waits for
    what will never come, or that reads from a disk that does not answer.
    """
    if message:
        print(message, file=sys.stderr if status else sys.stdout)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def tell_crash(error: BaseException, workdir: pathlib.Path) -> str:
    """A sentence about an error that nobody foresaw; its traceback goes to a file."""
    name = f"crash-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    text = "".join(traceback.format_exception(error))
    lines = str(error).strip().splitlines()
    what = f"{type(error).__name__}{f': {lines[0][:200]}' if lines else ''}"
    for folder in (workdir, pathlib.Path(tempfile.gettempdir())):
        try:
            (folder / name).write_text(text)
        except OSError:
            continue
        return f"unexpected {what}; the whole traceback is in {folder / name}"
    return f"unexpected {what}; no folder could be written to for the traceback"
