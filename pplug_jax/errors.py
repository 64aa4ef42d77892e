"""The errors that the command shows as one line, without a traceback."""

from pathlib import Path


class InputError(ValueError):
    """The user gave something that cannot work.

    The message names file, record or field, and says what to do.
    """


class DataError(InputError):
    """A data file, or a record of one, is not as its format says.

    Args:
        file: its path.
        problem: what is wrong, and what to do.
        where: the record in it, if the error is about one.
        line: where that record begins.
    """

    def __init__(self, file: str | Path, problem: str, where: str = "", line: int | None = None):
        self.file, self.problem, self.where, self.line = str(file), problem, where, line
        super().__init__(": ".join(part for part in (self.file, where, problem) if part))


class ConfigError(InputError):
    """A setting cannot work; the message names the field."""


class CheckpointError(InputError):
    """A checkpoint could not be written or read; the message says what to do."""
