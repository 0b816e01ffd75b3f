class InputError(ValueError):
    """Something the caller gave cannot be used; the message says what, where, what was expected and what to do.

    The command line prints the message alone; any other exception keeps its traceback, because it is a bug.
    """
