"""Which exceptions are messages for the user, and which are faults whose traceback must be seen."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def for_user(error: BaseException) -> bool:
    """True for a ValueError that a `raise` in this package made: its text is one line for the user.

    A ValueError from inside a library is a fault of ours and keeps its traceback.
    """
    if not isinstance(error, ValueError):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and Path(trace.tb_frame.f_code.co_filename).resolve().is_relative_to(_PACKAGE)


class StartError(ValueError):
    """A rank could not join the others. `speaks`: this rank's process prints it, whatever its rank.

    A failure that all ranks share is told by one of them; here there may be nobody else to tell it.
    """

    def __init__(self, text: str, *, speaks: bool = False) -> None:
        super().__init__(text)
        self.speaks = speaks


class Stopped(Exception):
    """Training did what a signal asked: it saved and stopped. `code` is the exit code that shells give that signal."""

    def __init__(self, text: str, signal_number: int) -> None:
        super().__init__(text)
        self.code = 128 + signal_number
