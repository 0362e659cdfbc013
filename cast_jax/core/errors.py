"""Errors that a user can mend: they name the file, field or key, and say what to do."""


class UserError(ValueError):
    """Bad input from outside (configuration, command line, workdir). ``main`` prints it without a traceback."""


class DataError(UserError):
    """An image, annotation or dataset folder that cannot be used as it is."""


class MissingStepError(UserError):
    """A step needs the result of another one that has not run in this workdir."""


class DivergedError(RuntimeError):
    """A loss term became NaN or infinite; the last good checkpoint is kept."""
