"""Errors a user can mend: what was wrong, where, and what to do, in one line."""

import sys


class UserError(ValueError):
    """Bad input. The command line prints the message alone, without a traceback."""


def fail(message: str, code: int = 1) -> int:
    """Tell an error in one line, and return the exit code: 1 failed, 2 wrongly called."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code
