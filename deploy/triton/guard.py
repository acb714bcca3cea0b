"""Runs one tritonserver as a child and ends it, with everything it left, when the process that asked for it is gone.

    python guard.py WORK_FOLDER SERVER_ID LOG STOP_TIMEOUT_S COMMAND ...

The asker holds the write end of this process's standard input and sends nothing. End of file there, by a wish
to stop or because the asker died (kill -9 included), ends the server. Triton's python stubs are processes of
their own and stay when the server is terminated at work, so the server leads a process group, and the group is
killed. Last, the shared memory of SERVER_ID and the work folder go. Prints the server's process id, and its code
when it has ended. Standard library only: it runs with `python -I -S`.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

PR_SET_PDEATHSIG = 1
SHARED_MEMORY = Path("/dev/shm")


def main(work: Path, server_id: str, log: Path, stop_timeout_s: float, command: list[str]) -> None:
    """Run `command` with its output in `log` until it ends or standard input closes."""
    with log.open("wb") as output:
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=work,
            preexec_fn=_prepare_server,
        )
    print(server.pid, flush=True)
    stopper = threading.Thread(target=_end_with_asker, args=(server, stop_timeout_s), daemon=True)
    stopper.start()
    code = server.wait()
    _kill_group(server.pid)
    with contextlib.suppress(BrokenPipeError):
        print(code, flush=True)
    # The log of a server that ended by itself stays until the asker has quoted it.
    stopper.join()
    for segment in SHARED_MEMORY.glob(f"{server_id}*"):
        segment.unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)


def _prepare_server() -> None:
    """Lead a process group of its own, and die with this guard should the guard itself be killed."""
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_with_asker(server: "subprocess.Popen[bytes]", stop_timeout_s: float) -> None:
    # Not `sys.stdin`: the interpreter could not shut down while a thread waits in its buffer.
    while os.read(0, 4096):
        pass
    server.terminate()
    try:
        server.wait(stop_timeout_s)
    except subprocess.TimeoutExpired:
        _kill_group(server.pid)


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), float(sys.argv[4]), sys.argv[5:])
