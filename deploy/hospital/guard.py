"""Runs one server as a child and ends it when the process that asked for it is gone.

    python guard.py LOG STOP_TIMEOUT_S COMMAND ...

The asker holds the write end of this process's standard input and sends nothing. End of file there, by
a wish to stop or because the asker died (kill -9 included), terminates the child, and kills it when it
has not ended STOP_TIMEOUT_S later. Prints the child's process id as its first and only line; exits with
the child's code. Standard library only: it runs with `python -I -S` to be up in a few milliseconds.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading

PR_SET_PDEATHSIG = 1


def main(log: str, stop_timeout_s: float, command: list[str]) -> int:
    """Run `command` with its output in `log` until it ends or standard input closes."""
    with open(log, "ab") as output:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, preexec_fn=_prepare_child
        )
    print(child.pid, flush=True)
    threading.Thread(target=_end_with_asker, args=(child, stop_timeout_s), daemon=True).start()
    code = child.wait()
    _signal_group(child.pid, signal.SIGKILL)
    return code


def _prepare_child() -> None:
    """Lead a process group of its own, and die with this guard should the guard itself be killed."""
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_with_asker(child: subprocess.Popen[bytes], stop_timeout_s: float) -> None:
    # Not `sys.stdin`: the interpreter could not shut down while a thread waits in its buffer.
    while os.read(0, 4096):
        pass
    _signal_group(child.pid, signal.SIGTERM)
    try:
        child.wait(stop_timeout_s)
    except subprocess.TimeoutExpired:
        _signal_group(child.pid, signal.SIGKILL)


def _signal_group(leader: int, number: int) -> None:
    """To the whole group: a server's own children (Triton's python stubs) must not outlive it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2]), sys.argv[3:]) & 0xFF)
