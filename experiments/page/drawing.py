"""Figures as SVG that takes its colours and its font from the page around it."""

import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

__all__ = ["HEIGHT", "RULE", "RUNS", "Line", "outline", "panel"]

INK, FAINT, RULE, RUNS = "#1b1f24", "#667080", "#d9dee4", ("#1f5fa8", "#c8501e")
VARIABLES = {
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    RULE: "var(--rule)",
    RUNS[0]: "var(--run-0)",
    RUNS[1]: "var(--run-1)",
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # letters, not outlines of them
    "svg.hashsalt": "st3jax",  # the same bytes every time
    "font.size": 8.5,
    "text.color": FAINT,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
}
HEIGHT = 40
"""Of a histogram, in its own units; a bin is one unit wide."""


class Line(NamedTuple):
    """A line of a panel: where it goes, and how it looks, with its width in points."""

    xs: Sequence[float]
    ys: Sequence[float]
    colour: str
    style: str = "-"
    width: float = 1.3


def panel(
    name: str,
    lines: Sequence[Line],
    ends: tuple[float | None, float | None],
    marks: Sequence[float] = (),
) -> Markup:
    """Lines over steps.

    Args:
        name: A word that no other figure of the page has.
        lines: What to draw.
        ends: The least and the largest value to show.
        marks: Steps to mark.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.6, 2.05))
        FigureCanvasSVG(figure)
        axes = figure.add_axes((0.115, 0.175, 0.855, 0.78))
        for line in lines:
            axes.plot(line.xs, line.ys, color=line.colour, ls=line.style, lw=line.width)
        for step in marks:
            axes.axvline(step, color=FAINT, linestyle=":", linewidth=0.8)
        longest = max((max(line.xs) for line in lines if len(line.xs)), default=1)
        axes.set(xlim=(0, longest), ylim=ends, xlabel="step")
        axes.locator_params(axis="both", nbins=5)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(axis="y")
        axes.tick_params(length=0)
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    return Markup(_of_the_page(written.getvalue(), name))


def _of_the_page(svg: str, name: str) -> str:
    """An SVG file as an element of HTML, with names of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"(?s)<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg)
    svg = re.sub(r' (xmlns(:\w+)?|version|width|height)="[^"]*"', "", svg, count=5)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    used = set(re.findall(r"#([\w-]+)[\")]", svg))

    def own(found: re.Match[str]) -> str:
        return f' id="{name}-{found[1]}"' if found[1] in used else ""

    svg = re.sub(r' id="([^"]*)"', own, svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    return re.sub(r"\s*\n\s*", " ", svg).strip()


def outline(counts: Sequence[int], highest: int) -> str:
    """The outline of a histogram as the path of an SVG: a bin is one unit wide.

    Example:
        >>> outline([0, 4, 1], 4)
        'M0 40V40.0h1V0.0h1V20.0h1V40Z'

    Heights are square roots of counts, so that few weights beside many are seen.
    """
    tops = (HEIGHT * (1 - (count / max(highest, 1)) ** 0.5) for count in counts)
    return f"M0 {HEIGHT}{''.join(f'V{top:.1f}h1' for top in tops)}V{HEIGHT}Z"
