"""The two ways in which a run ends without a result."""


class InputError(ValueError):
    """Bad input. Its text is one line that says where, what was found, what was expected and what to do.

    The command line prints it without a stack trace and exits with status 2; it is never retried.
    """


class StepError(RuntimeError):
    """A step failed for a reason that is not the user's input; the text names the step and where it ran."""
