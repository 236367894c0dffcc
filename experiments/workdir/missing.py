"""What to say of a folder that lacks what a finished run leaves there."""

import pathlib

__all__ = ["why_missing"]


def why_missing(workdir: pathlib.Path, name: str, option: str = "--workdir") -> str:
    """A sentence about the folder, and what to do.

    Args:
        workdir: The folder.
        name: Of the file that is not there.
        option: With which a folder is named.
    """
    if not workdir.is_dir():
        return f"there is no folder {workdir}: name a run's with {option}=..."
    if (workdir / "config.json").exists():
        return (
            f"the run in {workdir} has not ended: the command that started it goes on "
            f"from its last checkpoint, and leaves {name} at the end"
        )
    return f"there is no run in {workdir}, as it has no {name}"
