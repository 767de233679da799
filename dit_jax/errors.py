"""The one error that is the user's to mend."""


class InputError(ValueError):
    """A wrong argument, file or setting, told in one line: what was found, what was expected, what to do.

    Commands print the line and exit with status 2; library code may catch it as a `ValueError`.
    """
