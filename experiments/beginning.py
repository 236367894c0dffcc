"""What a program does before it imports what takes seconds: it can be stopped.

Importing this module changes nothing; ``tell`` is called first of all.
"""

import os
import signal
import sys
from types import TracebackType
from typing import Any

__all__ = ["tell"]


def tell() -> None:
    """Has Ctrl-C, and what goes wrong while modules are imported, told in a line.

    As long as nothing better takes their place: Ctrl-C ends the program at once.
    """
    os.environ["MPLBACKEND"] = "Agg"  # whatever it was: nothing is shown in a window
    sys.excepthook = _told
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: Any) -> None:
    """Not by an exception, which a library may swallow."""
    del number, frame
    try:
        os.write(2, b"\nstopped at once: the same command goes on from the last save\n")
    finally:
        os._exit(130)


def _told(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    del trace
    hint = ""
    if kind is ModuleNotFoundError:
        hint = ": pip install -e '.[experiments]' installs what the experiments need"
    text = " ".join(str(error).split())
    print(f"error: {kind.__name__}: {text}{hint}", file=sys.stderr)
