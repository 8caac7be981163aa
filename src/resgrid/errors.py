"""The exception for what a person can put right, and the hint that many of its messages end with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ResgridError(Exception):
    """A mistake or a fault outside the program: names the key or the file, and the fix.

    The command line prints its message alone, without a traceback, and exits with status 1.
    """


class OutOfMemory(ResgridError):
    """Memory was too small; it may be enough when nothing else uses it."""


class ConnectionLost(ResgridError):
    """Something on a network did not answer; it may later."""


def suggest(name: str, known: Iterable[str]) -> str:
    """`; did you mean …?` for the nearest of `known`, or a full stop."""
    near = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(near)}?" if near else "."
