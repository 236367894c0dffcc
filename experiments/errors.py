"""What a user can mend, told in one sentence instead of a traceback."""

__all__ = ["Stopped", "UserError"]


class UserError(Exception):
    """Something in the configuration, the data or the workdir that stops the run."""


class Stopped(Exception):  # noqa: N818  it is no mistake
    """A run was asked to stop before its end, and has saved where it is."""
