"""How numbers and names are written, and which names there are."""

from collections.abc import Iterable, Sequence

from page.runs import Run

__all__ = ["amount", "names", "percent", "share", "union", "volume"]


def names(runs: Sequence[Run]) -> list[str]:
    """Of their folders, told apart where these have the same."""
    names = [run.name for run in runs]
    same = len(set(names)) < len(names)
    return [f"{name} ({i})" for i, name in enumerate(names, 1)] if same else names


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
