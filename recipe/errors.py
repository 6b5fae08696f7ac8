"""The two errors that end a program with one sentence instead of a traceback."""


class UsageError(Exception):
    """The user asked for something impossible: the sentence names the field or file and the fix. Exit status 2."""


class RunError(Exception):
    """A run failed for a reason that one sentence explains. Exit status 1."""
