"""Makes the page of a finished run again, or puts two runs side by side on one.

python experiments/report.py --workdir=runs/digits_st3

What it shows is what the run has left in its folder. Exported ONNX files are timed if
ONNX Runtime is installed. With ``--compare=runs/other`` the page is
``report-compare.html``, elsewhere with ``--out=page.html``.
"""

import argparse
import pathlib
import sys

from errors import UserError
from page.latency import measure_latency
from page.runs import read_run
from page.write import PAGE, write_page
from workdir.files import writing

COMPARISON = "report-compare.html"


def main() -> None:
    """Reads the arguments and writes the page; what is wrong is told in a sentence."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--workdir", type=pathlib.Path, required=True, help="folder of a finished run"
    )
    parser.add_argument(
        "--compare", type=pathlib.Path, help="folder of a run to put beside it"
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        help=f"file to write; by default {PAGE} or {COMPARISON} in --workdir",
    )
    given = parser.parse_args()
    workdirs = [given.workdir]
    out = given.out or given.workdir / (COMPARISON if given.compare else PAGE)
    try:
        read_run(given.workdir)  # before anything is timed
        if given.compare:
            read_run(given.compare, "--compare")
            if given.compare.samefile(given.workdir):
                raise UserError(
                    f"{given.compare} is the run of --workdir itself: name another "
                    "with --compare=..."
                )
            workdirs.append(given.compare)
        with writing(out.parent):
            told = measure_latency(workdirs)
            write_page(out, workdirs)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(told + "\n" if told else "", f"the page is {out}", sep="")


if __name__ == "__main__":
    main()
