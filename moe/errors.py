"""The exceptions that end the program: a message for the user, a signal, a fault on another rank."""

from __future__ import annotations

import errno

DEVICE_FAULTS = {errno.EIO, errno.ENODEV, errno.ESTALE, errno.EREMOTEIO}
# How gloo and NCCL say that the process at the other end is gone.
LOST_RANK = ("Connection reset by peer", "Connection closed by peer", "Broken pipe", "remote process exited")


class UserError(ValueError):
    """The user must change something in the command, the configuration, the data or the machine (exit code 2).

    Its text is one line: key or file, value, rule, fix. Below one may lie an OSError that tells of a broken device
    (`is_device_fault`): the exit code is 1 then, as for OSError itself. Any other exception is a fault of the program
    or the machine (exit code 1); a fault of the program keeps its traceback.
    """


class ConfigError(UserError):
    """A configuration that can't be used."""


class StartError(UserError):
    """A rank could not join the others. `prints`: this process prints the message, whatever its rank.

    A failure that all ranks have in common is printed by the first rank of each machine; a rank that never joined must
    print its own.
    """

    def __init__(self, text: str, *, prints: bool = False) -> None:
        super().__init__(text)
        self.prints = prints


class OtherRankFailed(RuntimeError):
    """Another rank met a fault of the program and prints its traceback; this rank stops too (exit code 1)."""


class Stopped(Exception):
    """Training saved and stopped because of a signal. `code` is the exit code, 128 + the signal's number."""

    def __init__(self, text: str, signal_number: int) -> None:
        super().__init__(text)
        self.code = 128 + signal_number


def is_device_fault(error: BaseException | None) -> bool:
    """Whether a disk or network file system failed below this error: that is the machine's fault, not the user's."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DEVICE_FAULTS:
            return True
        error = error.__cause__
    return False


def lost_rank(error: Exception) -> str | None:
    """One line about a collective that failed because another rank ended; None for any other error."""
    text = str(error)
    if not any(part in text for part in LOST_RANK):
        return None
    said = next(line.strip() for line in text.splitlines() if line.strip())
    return f"another rank ended, and this one can't go on without it; that rank's own output says why ({said})"


def line_about(error: Exception) -> str:
    """An error's text; of too many open files, with the fix."""
    many = isinstance(error, OSError) and error.errno == errno.EMFILE
    return f"{error}: `ulimit -n 4096` in the shell that starts it allows more" if many else str(error)


def shown(text: str, longest: int = 60) -> str:
    """A value for a message: control characters and lone surrogates escaped, a long value cut to its ends."""
    if len(text) > longest:
        text = f"{text[: longest // 2]} … {text[-longest // 2 :]} ({len(text)} characters)"
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)
