"""`python -m MODULE …` in real processes that are forked: saves them the import of torch, DeepSpeed and `moe`.

    from tests import forkserver
    done = forkserver.run([sys.executable, "-m", "moe", "train"], capture_output=True, text=True, env=…)
    process = forkserver.Popen([sys.executable, "-m", "torch.distributed.run", …, "-m", "moe", "train"], env=…)

`Popen` and `run` are subprocess's, but for the way to start: a server, one for each process of tests, has imported the
modules once and has one thread. It forks a child that takes over arguments, environment, folder, streams and session,
runs the module as Python's `-m` does and ends as Python does. The child has the process ID that `Popen` says, is a
child of the process that asked (signals, exit codes, PR_SET_PDEATHSIG and CPU times are the kernel's own), and shows
its arguments and environment in /proc. What the child starts by `subprocess` itself is forked too: torchrun's ranks
and a sweep's trials, each a child of its torchrun or sweep.

A command is started anew when it isn't `python -m MODULE`, when its environment differs in a variable that libraries
may read while they are imported, or with `pytest --real-processes`. Forked processes share what is drawn once in a
process's life (the seed of Python's hashes) and don't show a cold start's faults: tests of the start use `subprocess`.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import inspect
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any, NoReturn

from tests.ranks import LIBRARIES

ROOT = Path(__file__).resolve().parents[1]
MODULES = (
    *LIBRARIES, "torch.distributed.run", "optuna", "moe.cli.main", "moe.train.loop", "moe.engine.plain",
    "moe.analysis.run", "moe.sweep.run", "moe.engine.deepspeed.engine", "moe.engine.deepspeed.lean_imports",
)  # fmt: skip
# Each child imports these itself: the first sets variables, the second is run as a program.
FORGOTTEN = ("moe.engine.deepspeed", "torch.distributed.run")
# Variables that are read at run time. Another variable's value may have been read by an import already.
READ_LATE = (
    "FAULT", "RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "TORCH_NCCL_", "MOE_",
    "WANDB_", "NETRC", "PYTEST_", "TORCHINDUCTOR_CACHE_DIR", "PYTORCH_NVML_BASED_CUDA_CHECK",
    "COLUMNS", "LINES", "SAYS_", "NPROC",
)  # fmt: skip
STARTS_OTHERS = ("torch.distributed.run", "doctor", "sweep", "-m", "--multirun")  # among a command's arguments
UNBUFFERED = 3  # where the module's name is in `python -u -m MODULE`
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
LARGEST = 128 << 10  # bytes of a request
SHOWN = 32 << 10  # bytes that /proc can show of the arguments, and of the environment
ROOM = "MOE_TESTS_ROOM"  # a variable that makes room in /proc/PID/environ
ALWAYS_REAL = "MOE_TESTS_REAL"  # set by pytest --real-processes

EXECUTE = subprocess.Popen._execute_child  # type: ignore[attr-defined]
NAMED = {
    "args", "executable", "preexec_fn", "pass_fds", "cwd", "env", "shell", "p2cread", "p2cwrite", "c2pread", "c2pwrite",
    "errread", "errwrite", "gid", "gids", "uid", "umask", "start_new_session", "process_group",
}  # fmt: skip
SIGNATURE = inspect.signature(EXECUTE)
_server: _Server | None = None


class Popen(subprocess.Popen[Any]):
    """subprocess.Popen whose process is forked by the server if it can be."""

    def _execute_child(self, *given: Any, **named: Any) -> None:
        _execute(self, *given, **named)


def run(
    command: list[str],
    *,
    input: Any = None,  # subprocess's name
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    **more: Any,
) -> subprocess.CompletedProcess[Any]:
    """subprocess.run with this module's `Popen`."""
    if input is not None:
        more["stdin"] = subprocess.PIPE
    if capture_output:
        more |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(command, **more) as process:
        try:
            out, err = process.communicate(input, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(command, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


def _execute(process: subprocess.Popen[Any], *given: Any, **named: Any) -> None:
    """Takes the place of Popen._execute_child."""
    global _server
    asked = SIGNATURE.bind(process, *given, **named).arguments
    if not _can_be_forked(asked):
        EXECUTE(process, *given, **named)
        return
    if _server is None:
        _server = _Server.started()
    request = {
        "args": [os.fspath(one) for one in asked["args"]],
        "cwd": os.fspath(asked["cwd"] or os.getcwd()),
        "env": dict(os.environ if asked["env"] is None else asked["env"]),
        "session": asked["start_new_session"],
        "group": asked["process_group"],
    }
    ends = [asked["p2cread"], asked["c2pwrite"], asked["errwrite"]]
    process.pid = _server.fork(request, [end if end >= 0 else number for number, end in enumerate(ends)])
    process._child_created = True  # type: ignore[attr-defined]
    pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
    process._close_pipe_fds(*(asked[end] for end in pipes))  # type: ignore[attr-defined]


def _can_be_forked(asked: dict[str, Any]) -> bool:
    if sys.platform != "linux" or os.environ.get(ALWAYS_REAL) or not asked.keys() >= NAMED:
        return False
    if _server is not None and not _server.is_ours:
        return False
    args, env = asked["args"], asked["env"]
    if isinstance(args, str | bytes | os.PathLike) or asked["shell"] or asked["executable"] not in (None, args[0]):
        return False
    unusual = (asked["preexec_fn"], asked["pass_fds"], asked["gid"], asked["gids"], asked["uid"])
    if any(unusual) or asked["umask"] != -1 or _module_at(list(args)) is None:
        return False
    imported_with = os.environ if _server is None else _server.environment
    given = os.environ if env is None else env
    keys = {key for key in {*given, *imported_with} if not key.startswith(READ_LATE)}
    differ = sorted(key for key in keys if given.get(key) != imported_with.get(key))
    if differ:
        warnings.warn(f"a process is started anew, which takes seconds: other {', '.join(differ)}", stacklevel=5)
    return not differ


def _module_at(args: list[str]) -> int | None:
    """Where the module's name is, None if the command isn't `python -m MODULE …` or `python -u -m MODULE …`."""
    if args[:1] != [sys.executable]:
        return None
    at = UNBUFFERED if args[1:2] == ["-u"] else UNBUFFERED - 1
    return at if args[at - 1 : at] == ["-m"] and len(args) > at else None


class _Server:
    """This process's end of a server."""

    def __init__(
        self, channel: socket.socket, environment: dict[str, str], process: subprocess.Popen[Any] | None = None
    ) -> None:
        self.environment = environment  # with which the modules were imported
        self._channel, self._process = channel, process
        self._owner, self._lock = os.getpid(), threading.Lock()
        _prctl(PR_SET_CHILD_SUBREAPER, 1)  # children whose parent, the server's helper, has ended become this process's

    @classmethod
    def started(cls) -> _Server:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        importlib.import_module("moe.engine.deepspeed")  # sets variables: now, so that they don't differ later
        environment = {key: value for key, value in os.environ.items() if not key.startswith(READ_LATE)}
        command = [sys.executable, "-m", "tests.forkserver", str(theirs.fileno()), " " * SHOWN]
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], cwd=ROOT, env=environment | {ROOM: " " * SHOWN},
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log,
            )  # fmt: skip
            theirs.close()
            if ours.recv(LARGEST) != b"ready":
                process.wait()
                log.seek(0)
                raise RuntimeError(f"tests.forkserver did not start:\n{log.read().decode(errors='replace')}")
        return cls(ours, environment, process)

    @property
    def is_ours(self) -> bool:
        """False in a process that was forked from the one that started the server."""
        return self._owner == os.getpid()

    def fork(self, request: dict[str, Any], streams: list[int]) -> int:
        """The new process's ID."""
        text = json.dumps(request).encode()
        assert len(text) < LARGEST
        with self._lock:
            socket.send_fds(self._channel, [text], streams)
            answer = self._channel.recv(LARGEST)
        if not answer:
            raise RuntimeError("tests.forkserver has ended")
        return int(answer)


def _serve(channel: socket.socket, environment: dict[str, str], interrupt: Any) -> NoReturn:
    """Forks a child for each request until the other end is closed. `interrupt`: the children's handler of SIGINT."""
    while True:
        text, streams, _, _ = socket.recv_fds(channel, LARGEST, 3)
        if not text:
            os._exit(0)
        reader, writer = os.pipe()
        helper = os.fork()
        if helper == 0:
            helper = os.getpid()
            child = os.fork()
            if child:
                os.write(writer, str(child).encode())
                os._exit(0)
            for descriptor in (reader, writer):
                os.close(descriptor)
            channel.close()
            while os.getppid() == helper:
                time.sleep(0.0005)
            signal.signal(signal.SIGINT, interrupt)
            _become(json.loads(text), streams, environment)
        os.close(writer)
        for descriptor in streams:
            os.close(descriptor)
        os.waitpid(helper, 0)  # then the child's parent is the process that asked
        answer = os.read(reader, 64)
        os.close(reader)
        channel.send(answer)


def _become(request: dict[str, Any], streams: list[int], environment: dict[str, str]) -> NoReturn:
    """Runs the request in this new process and ends it."""
    args: list[str] = request["args"]
    if request["session"]:
        os.setsid()
    elif request["group"] >= 0:
        os.setpgid(0, request["group"])
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    for stream in streams:
        os.close(stream)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    _show_in_proc(args, request["env"])
    at = _module_at(args)
    assert at is not None
    if not os.environ.get("PYTHONUNBUFFERED"):  # with it the server's streams are unbuffered too
        assert isinstance(sys.stdout, io.TextIOWrapper)
        sys.stdout.reconfigure(line_buffering=os.isatty(1))
        if at == UNBUFFERED:
            raw = open(1, "wb", buffering=0, closefd=False)  # noqa: SIM115
            sys.stdout = io.TextIOWrapper(raw, sys.stdout.encoding, sys.stdout.errors, "\n", write_through=True)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    sys.orig_argv, sys.argv, sys.path[0] = [*args], ["-m", *args[at + 1 :]], os.getcwd()
    if any(one in STARTS_OTHERS for one in args[at : at + 3]):
        _fork_what_this_starts(environment)
    _end_with(_exit_code(args[at]))


def _exit_code(module: str) -> int:
    """Runs the module; the exit code that Python would end with, −2 for an interrupt."""
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        print(ended.code, file=sys.stderr)
        return 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _end_with(code: int) -> NoReturn:
    """What the interpreter does at its end, except destroying all modules, which takes longer than the rest."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = 120
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 0xFF)


def _fork_what_this_starts(environment: dict[str, str]) -> None:
    """From now on this process's `subprocess` forks, by a server of its own that is its child."""
    global _server
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    owner = os.getpid()
    if os.fork() == 0:
        ours.close()
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        if os.getppid() != owner:
            os._exit(0)
        devnull = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(devnull, number)
        _show_in_proc(["forkserver"], {})
        _serve(theirs, environment, interrupt)
    theirs.close()
    _server = _Server(ours, environment)
    subprocess.Popen._execute_child = _execute  # type: ignore[attr-defined]


def _show_in_proc(args: list[str], environment: dict[str, str]) -> None:
    """Writes what /proc/PID/cmdline and environ show, over what this process's ancestor was started with. Nothing else
    reads those bytes: `os.environ.clear()` has given the environment other memory."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    arguments_at, arguments_end, environment_at, environment_end = (int(field) for field in fields[45:49])
    for start, end, texts in (
        (arguments_at, arguments_end, args),
        (environment_at, environment_end, [f"{key}={value}" for key, value in environment.items()]),
    ):
        content = b"".join(os.fsencode(text) + b"\0" for text in texts)[: end - start - 1]
        ctypes.memmove(start, content.ljust(end - start, b"\0"), end - start)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


def _main(descriptor: int) -> None:
    channel = socket.socket(fileno=descriptor)
    channel.set_inheritable(False)
    owner = os.getppid()
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != owner:
        return
    environment = {key: value for key, value in os.environ.items() if key != ROOM}
    for module in MODULES:
        importlib.import_module(module)
    sys.modules["moe.engine.deepspeed.lean_imports"].import_muon_uncompiled()
    for module in [name for name in sys.modules if name.startswith(FORGOTTEN)]:
        del sys.modules[module]
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"imports started {len(threads) - 1} threads: a fork could hang"
    gc.collect()
    gc.freeze()
    channel.send(b"ready")
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is for the others
    _serve(channel, environment, interrupt)


if __name__ == "__main__":
    # The functions of the module that others import, not of a second copy of it.
    from tests import forkserver

    forkserver._main(int(sys.argv[1]))
