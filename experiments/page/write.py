"""Writes the page: one file of HTML that asks for nothing from anywhere."""

import pathlib
from collections.abc import Sequence

import jinja2
from markupsafe import Markup, escape

from errors import UserError
from page import runs, words
from page.contents import contents
from workdir.files import replace_file

__all__ = ["PAGE", "write_page"]

PAGE = "report.html"
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def _breakable(name: str) -> Markup:
    """A name that may be broken into lines where its words end."""
    text = str(escape(name))
    return Markup(text.replace("_", "_<wbr>").replace("/", "/<wbr>"))


TEMPLATES.filters |= {"percent": words.percent, "breakable": _breakable}


def write_page(path: pathlib.Path, workdirs: Sequence[pathlib.Path]) -> None:
    """Writes the page of a run, or of two side by side, from what is in their folders.

    Args:
        path: The file to write.
        workdirs: Of one finished run or of two.

    Raises:
        UserError: If a folder holds no finished run, or something damaged.
        OSError: If the page cannot be written.
    """
    found = [runs.read_run(workdir) for workdir in workdirs]
    try:
        text = TEMPLATES.get_template("page.html").render(contents(found))
    except (
        *(ArithmeticError, AttributeError, LookupError, RuntimeError),
        *(TypeError, ValueError, jinja2.TemplateError),
    ) as error:
        names = " or ".join(map(str, workdirs))
        raise UserError(
            f"what is in {names} is damaged, or of another version of this project "
            f"({type(error).__name__}: {error}): the command that trained the run, "
            f"given again, writes {runs.REPORT} anew; {runs.HISTOGRAMS} and "
            f"{runs.LATENCY} may be moved away"
        ) from error
    replace_file(path, text)
