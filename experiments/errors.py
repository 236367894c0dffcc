"""What a user can mend, told in one sentence instead of a traceback."""

__all__ = ["UserError"]


class UserError(Exception):
    """Something in the configuration, the data or the workdir that stops the run."""
