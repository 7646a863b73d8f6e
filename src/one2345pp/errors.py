"""Errors that are for the person at the keyboard: input that cannot be used, with what to do about it."""


class InputError(ValueError):
    """Input or arguments that cannot be used. The message says what was wrong, what was expected, how to mend it."""
