"""How numbers and names are written, and which names there are."""

from collections.abc import Iterable, Sequence

from page.runs import Run

__all__ = ["amount", "labels", "percent", "share", "union", "volume"]


def labels(runs: Sequence[Run]) -> list[str]:
    """What two runs are called on the page; names of folders may be very long."""
    return ["A", "B"] if len(runs) > 1 else [""]


def percent(share: float) -> str:
    """A share as a person reads it, to a hundredth of a point."""
    return f"{share:.2%}".replace("%", "\N{NO-BREAK SPACE}%")


def amount(number: float) -> str:
    """Three digits of a large number, or all of a small one."""
    for size, unit in ((1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:,.3g}\N{NO-BREAK SPACE}{unit}"
    return f"{number:,}"


def volume(size: int) -> str:
    """Bytes as a person reads them."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:,.3g}\N{NO-BREAK SPACE}{name}"
    return f"{size}\N{NO-BREAK SPACE}bytes"


def share(part: float, whole: float) -> float:
    """A share, also of nothing."""
    return part / whole if whole else 0.0


def union(tables: Iterable[Iterable[str]]) -> list[str]:
    """All names, in the order in which they come up."""
    return list(dict.fromkeys(name for table in tables for name in table))
