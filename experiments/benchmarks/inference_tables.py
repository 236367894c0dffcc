"""The rows of ``inference.py`` as tables in Markdown, and what they mean in words."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Group", "overview", "table"]


class Group(NamedTuple):
    """Rows that are measured in turn, and compared.

    Attributes:
        network: The name of a network.
        distribution: Which of its weights are zero.
        batch: Images at once.
        threads: Of each engine.
    """

    network: str
    distribution: str
    batch: int
    threads: int

    @property
    def clock(self) -> str:
        """The column that counts: CPU time of one thread, wall time of more."""
        return "cpu_ms" if self.threads == 1 else "wall_ms"

    def __str__(self) -> str:
        threads = f", {self.threads} threads" * (self.threads > 1)
        return f"{self.network}, {self.distribution}, batch {self.batch}{threads}"


class _Least(NamedTuple):
    """The least milliseconds of a group: of engines by name, and of MNN by zeros."""

    dense: dict[str, float]
    sparse: dict[float, float]

    @property
    def best(self) -> str:
        return min(self.dense, key=lambda engine: self.dense[engine])

    def gains(self) -> dict[float, float]:
        """By the share of zeros: how many times faster than the best dense engine."""
        least = self.dense[self.best]
        return {share: least / ms for share, ms in self.sparse.items() if ms > 0}


def _least(group: Group, rows: Sequence[Mapping[str, Any]]) -> _Least:
    found = _Least({}, {})
    for row in rows:
        share, ms = float(row["sparsity"]), float(row[group.clock])
        if share:
            found.sparse[share] = ms
        else:
            found.dense[row["engine"]] = ms
    return found


def table(group: Group, rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of a group as a table, and one sentence on what they mean."""
    least = _least(group, rows)
    lines = [
        f"{group}, {'CPU' if group.threads == 1 else 'wall'} time, "
        f"{rows[0]['processor']}:",
        "",
        "| | zeros | file, MB | least ms | median ms | same engine | best dense |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        share, ms = float(row["sparsity"]), float(row[group.clock])
        name = f"| {row['engine']} | {f'{100 * share:g} %' if share else 'dense'} | "
        if np.isnan(ms):
            lines.append(f"{name}whole layers without weights | | | | |")
            continue
        same, best = least.dense[row["engine"]] / ms, least.dense[least.best] / ms
        median = float(row[f"{group.clock}_median"])
        times = f"{row['file_mb']} | {ms:.2f} | {median:.2f}"
        lines.append(f"{name}{times} | {same:.2f} | {best:.2f} |")
    return "\n".join([*lines, "", sentence(group, least)])


def sentence(group: Group, least: _Least) -> str:
    """What a group's ratios to the best dense engine mean."""
    gains, best = least.gains(), least.best
    top = max(gains, key=lambda share: gains[share], default=0.0)
    what = "multiply-adds" if group.distribution == "costs" else "weights"
    if gains.get(top, 0.0) <= 1:
        return f"Zeros make {group.network} no faster here than {best} runs it dense."
    pays = min(share for share, gain in gains.items() if gain > 1)
    return (
        f"{group.network} is {gains[top]:.2f} times as fast as dense in {best}, the "
        f"fastest dense engine, with {100 * top:g} % of its {what} zero; of those that "
        f"were measured, {100 * pays:g} % is the least that pays."
    )


def overview(measured: Mapping[Group, Sequence[Mapping[str, Any]]]) -> str:
    """All groups in one table: milliseconds, and how much faster than the best dense.

    ``none`` is where whole layers have no weights.
    """
    found = {group: _least(group, rows) for group, rows in measured.items()}
    shares = sorted({share for least in found.values() for share in least.sparse})
    heads = ["", "best dense, ms", *(f"{100 * share:g} %" for share in shares)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for group, least in found.items():
        gains = least.gains()
        cells = [
            f"{least.sparse[share]:.1f}, **{gains[share]:.2f}**"
            if share in gains
            else "none"
            for share in shares
        ]
        dense = f"{least.best} {least.dense[least.best]:.1f}"
        lines.append(f"| {group} | {dense} | {' | '.join(cells)} |")
    return "\n".join(lines)
