"""Errors a user can mend: what was wrong, where, and what to do, in one line."""


class UserError(ValueError):
    """Bad input. The command line prints the message alone, without a traceback."""
