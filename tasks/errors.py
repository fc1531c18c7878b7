"""The one exception for mistakes a user can mend."""


class InputError(ValueError):
    """Bad input. Its text is one line that says where, what was found, what was expected and what to do.

    The command line prints it without a stack trace and exits with status 2; it is never retried.
    """
