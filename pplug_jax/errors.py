"""The error that the command shows as one line, without a traceback."""


class InputError(ValueError):
    """What the user gave cannot work.

    The message names file, record or field, and says what to do.
    """
