"""Starts a server of the simulator hospital, waits until it answers, and stops it cleanly.

Every server runs under `guard.py`, so that none outlives the process that started it, whatever thread
started it and however that process ends. Output goes to one log file a server; an error quotes its end.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

GUARD = Path(__file__).with_name("guard.py")
LOOPBACK = "127.0.0.1"


class ServerNotReady(RuntimeError):
    """A server did not come up; the message says which, why, and ends with its last log lines."""


class ServerProcess:
    """One running server: `pid`, `log`, and the way to end it. A context manager that stops on exit."""

    def __init__(self, name: str, guard: "subprocess.Popen[bytes]", pid: int, log: Path) -> None:
        self.name = name
        self.pid = pid
        self.log = log
        self._guard = guard

    def alive(self) -> bool:
        """Whether the server still runs."""
        return self._guard.poll() is None

    def stop(self) -> None:
        """Terminate the server, kill it where it will not end, and return once it is gone. Repeatable."""
        assert self._guard.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._guard.stdin.close()
        self._guard.wait()
        if self._guard.stdout is not None:
            self._guard.stdout.close()

    def kill(self) -> None:
        """End the server as a crash would (SIGKILL), for tests of what its clients then do."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.stop()

    def wait_until(self, ready: Callable[[], bool], timeout_s: float, every_s: float = 0.1) -> None:
        """Return once `ready()`; else stop the server and raise `ServerNotReady` with the log's end."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            reason = self._why_give_up(deadline, timeout_s)
            if reason:
                self.stop()
                raise ServerNotReady(f"{self.name} {reason}. The end of {self.log}:\n{tail(self.log)}")
            time.sleep(every_s)

    def _why_give_up(self, deadline: float, timeout_s: float) -> str:
        if not self.alive():
            return f"ended while starting (exit code {self._guard.returncode})"
        if time.monotonic() > deadline:
            return f"was not ready after {timeout_s:g} s"
        return ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def start(
    name: str,
    command: Sequence[str],
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stop_timeout_s: float = 10.0,
) -> ServerProcess:
    """Start `command` with its output appended to `log`; it ends with this process at the latest."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as errors:
        guard = subprocess.Popen(
            [sys.executable, "-I", "-S", str(GUARD), str(log.resolve()), str(stop_timeout_s), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=None if env is None else dict(env),
            cwd=cwd,
            start_new_session=True,
        )
    assert guard.stdout is not None
    first_line = guard.stdout.readline()
    if not first_line:
        guard.wait()
        raise ServerNotReady(f"{name} could not be started. The end of {log}:\n{tail(log)}")
    return ServerProcess(name, guard, int(first_line), log)


def tail(log: Path, lines: int = 15) -> str:
    """The last `lines` lines of a log file, each cut at 300 characters."""
    if not log.exists():
        return "(no log)"
    return "\n".join(line[:300] for line in log.read_text(errors="replace").splitlines()[-lines:])


def free_port() -> int:
    """A loopback TCP port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def answers(url: str, timeout_s: float = 30.0) -> bool:
    """Whether a GET of `url` is answered with success."""
    # A proxy in the environment is never the way to a loopback port.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=timeout_s) as response:
            return bool(200 <= response.status < 300)
    except (urllib.error.URLError, OSError):
        return False
