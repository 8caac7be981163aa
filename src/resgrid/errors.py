"""The one exception for what a person can put right."""


class ResgridError(Exception):
    """A mistake or a fault outside the program: names the key or the file, and the fix.

    The command line prints its message alone, without a traceback, and exits with status 1.
    """
