"""Commands in forks of one process that has imported anomalib: the command's own time, without the
seconds of imports.

``with warmed(folder)`` starts it, unless another process has for the same folder; the last to leave
ends it. In the folder are then executables: ``anomalib``, ``anomalib-sgfr``, and ``script`` that
takes a script as its first argument. Each runs what it is named for in a process of its own, with
the caller's arguments, environment, working directory and streams, and ends as that does.
"""

import fcntl
import gc
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
ANOMALIB = Path(sys.executable).with_name("anomalib")
SGFR = ROOT / "anomalib_sgfr" / "__main__.py"
# in an interpreter without site-packages, which starts in some hundredths of a second
_CALL = """#!{python} -IS
import json, os, signal, socket, sys
with socket.socket(socket.AF_UNIX) as line:
    line.connect({address!r})
    socket.send_fds(line, [b"+"], [0, 1, 2])
    line.sendall(json.dumps([[*{script!r}, *sys.argv[1:]], os.getcwd(), dict(os.environ)]).encode())
    line.shutdown(socket.SHUT_WR)
    status = int(line.recv(100) or 1)
if status < 0:
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


@contextmanager
def warmed(folder: Path) -> Iterator[Path]:
    """Share the process with all that use the folder."""
    folder.mkdir(exist_ok=True)
    started = folder / "pid"
    with (folder / "users").open("w") as users:
        with _locked(folder):
            fcntl.flock(users, fcntl.LOCK_SH)
            if not started.exists():
                started.write_text(str(_start(folder)), encoding="utf-8")
        try:
            yield folder
        finally:
            with _locked(folder), suppress(BlockingIOError):  # another one uses it
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.killpg(int(started.read_text(encoding="utf-8")), signal.SIGKILL)
                started.unlink()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _start(folder: Path) -> int:
    """Start the process in a group of its own and write the executables; its number."""
    line = folder / "line"
    line.unlink(missing_ok=True)  # of one that has ended
    address = str(line)
    for name, script in (
        ("anomalib", [str(ANOMALIB)]),
        ("anomalib-sgfr", [str(SGFR)]),
        ("script", []),
    ):
        call = folder / name
        call.write_text(
            _CALL.format(python=sys.executable, address=address, script=script), encoding="utf-8"
        )
        call.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        command = [sys.executable, __file__, str(listening.fileno())]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            command, env=environment, pass_fds=[listening.fileno()], start_new_session=True
        )
    return process.pid


def _next_command(listening: socket.socket) -> list[str]:
    """Wait for calls; return, in a process of its own for each, what to run there."""
    while True:
        line, _ = listening.accept()
        if not os.fork():
            break
        line.close()
        with suppress(ChildProcessError):  # none is left
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    _, streams, *_ = socket.recv_fds(line, 1, 3)
    with line.makefile("rb") as sent:
        arguments, folder, environment = json.loads(sent.read())
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        line.sendall(str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)
    listening.close()
    line.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    return arguments


if __name__ == "__main__":
    # OpenVINO's would be sent by a thread, and what a thread holds locked would stay so in a fork
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import anomalib.cli.cli  # noqa: F401

    del sys.modules["openvino_telemetry"]
    if threading.active_count() > 1 or multiprocessing.active_children():
        sys.exit(
            f"an import has started {threading.enumerate()}, {multiprocessing.active_children()}"
        )
    gc.freeze()  # which the forks would otherwise copy, to look through it
    sys.argv = _next_command(socket.socket(fileno=int(sys.argv[1])))
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
