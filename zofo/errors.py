"""The one error that means: the input is wrong, and this is how to mend it."""


class TrainingStoppedError(RuntimeError):
    """Training ended before its last step: at a loss that is not finite."""


class UserError(ValueError):
    """Bad input from the user: the value, the constraint and the remedy.

    The command line prints its message without a traceback and exits with code 2.
    """
