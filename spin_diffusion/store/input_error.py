"""The error for what a user can cause: one line, exit code 2."""


class InputError(ValueError):
    """Something the user gave cannot be used. The message says what, where, and what would be right, in one line."""
