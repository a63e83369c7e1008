"""The two ways in which a script refuses: each becomes one line and an exit code (see `cli.run_main`)."""


class BadInput(Exception):
    """Arguments or files that cannot be used. Exit code 2; the message says what, where, and what was expected."""


class Dependent(BadInput):
    """SAEs that are no independent trainings: they share a start, or are two steps of one run."""


class CheckFailed(Exception):
    """The work was done and a required check did not hold. Exit code 1."""


CRASHED = 70
"""Exit code where HUSAI itself is at fault, after a traceback (`EX_SOFTWARE` of sysexits.h). 1 is a verdict."""
