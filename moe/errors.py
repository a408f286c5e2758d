"""How the program ends when it can't go on: a message for the user, a signal, or a fault whose traceback is shown."""

from __future__ import annotations


class UserError(ValueError):
    """Something to change in the command, the configuration, the data or the machine.

    Its text is one line for the user: key or file, value, rule, fix. Any other exception is a fault of the program and
    keeps its traceback.
    """


class StartError(UserError):
    """A rank could not join the others. `speaks`: this rank's process prints it, whatever its rank.

    A failure that all ranks share is told by one of them; here there may be nobody else to tell it.
    """

    def __init__(self, text: str, *, speaks: bool = False) -> None:
        super().__init__(text)
        self.speaks = speaks


class OtherRankFailed(RuntimeError):
    """A fault of the program on another rank, which shows the traceback; this one can't go on either."""


class Stopped(Exception):
    """Training did what a signal asked: it saved and stopped. `code` is the exit code that shells give that signal."""

    def __init__(self, text: str, signal_number: int) -> None:
        super().__init__(text)
        self.code = 128 + signal_number
