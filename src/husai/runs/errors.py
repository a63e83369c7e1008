"""Errors that end a script with one line and an exit code (see `cli.run_main`)."""


class BadInput(Exception):
    """Unusable arguments or files. Exit code 2. The message names the place, the problem, and the expected value."""


class Dependent(BadInput):
    """SAEs that are no independent trainings: they share an initialisation, or are two checkpoints of one run."""


class CheckFailed(Exception):
    """A required check failed after the work was done. Exit code 1."""


CRASHED = 70
"""Exit code for a fault of HUSAI itself, after a traceback (`EX_SOFTWARE` of sysexits.h). 1 is a verdict."""
