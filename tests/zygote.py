"""Runs `wetread` commands as forks of one process that has imported everything, since the import takes seconds.

A fork is a process like any other: its own exit code, environment, folder, output and signals; it can be killed.

    python -m tests.zygote      reads a JSON order a line: {"command", "arguments", "cwd", "env", "out", "err"}
                                says {"pid"} at once, and {"ended", "code"} once; a signal's code is negative
"""

import contextlib
import gc
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LOOK_EVERY_S = 0.02


class Zygote:
    """The process to fork from. Not for several threads."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote"],
            cwd=ROOT,
            env={**os.environ, "COLUMNS": "200"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._codes: dict[int, int] = {}
        self._lines = b""

    def start(self, command: str, arguments: list[str], cwd: Path, env: Mapping[str, str], out: Path, err: Path) -> int:
        """Run the function `command` (`module:name`) with `arguments` as its command line; its process id."""
        assert self._process.stdin is not None
        order = {"command": command, "arguments": arguments, "cwd": str(cwd), "env": dict(env)}
        self._process.stdin.write(json.dumps({**order, "out": str(out), "err": str(err)}) + "\n")
        self._process.stdin.flush()
        while "pid" not in (told := self._next(60.0)):
            self._codes[told["ended"]] = told["code"]
        return int(told["pid"])

    def wait(self, pid: int, timeout_s: float) -> int:
        """The exit code of a fork, -9 after SIGKILL. If it takes longer it is killed, and TimeoutError raised."""
        deadline = time.monotonic() + timeout_s
        try:
            while pid not in self._codes:
                told = self._next(deadline - time.monotonic())
                self._codes[told["ended"]] = told["code"]
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            raise
        return self._codes.pop(pid)

    def stop(self) -> None:
        """Kill what still runs and end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _next(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._lines:
            rest_s = max(0.0, deadline - time.monotonic())
            if not select.select([self._process.stdout], [], [], rest_s)[0]:
                raise TimeoutError("the command did not end in time")
            chunk = os.read(self._process.stdout.fileno(), 65536)
            assert chunk, "the zygote ended"
            self._lines += chunk
        line, _, self._lines = self._lines.partition(b"\n")
        told: dict[str, Any] = json.loads(line)
        return told


def _serve() -> None:
    for module in ("middleware.cli", "tests.crash.victim", "hl7apy.v2_5_1"):
        import_module(module)
    import_module("mappings.outputs.dicom_header").load_dicom_tables()
    gc.collect()
    gc.freeze()  # or the collector of every fork would copy the pages of all that was imported
    running: set[int] = set()
    orders = b""
    while True:
        if select.select([0], [], [], LOOK_EVERY_S)[0]:
            chunk = os.read(0, 1 << 20)
            if not chunk:
                break
            *lines, orders = (orders + chunk).split(b"\n")
            for line in lines:
                running.add(_fork(json.loads(line)))
        running -= _reap(running)
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _say(told: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


def _reap(running: set[int]) -> set[int]:
    ended = set()
    for pid in running:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            ended.add(pid)
            _say({"ended": pid, "code": os.waitstatus_to_exitcode(status)})
    return ended


def _fork(order: dict[str, Any]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = _become(order)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _say({"pid": pid})
    return pid


def _become(order: dict[str, Any]) -> int:
    """Be the command: its output files, folder, environment and arguments; its exit code."""
    for path, number in (("/dev/null", 0), (order["out"], 1), (order["err"], 2)):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.setpgid(0, 0)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    tempfile.tempdir = None
    random.seed()
    module, _, name = order["command"].partition(":")
    sys.argv = ["wetread", *order["arguments"]]
    try:
        getattr(import_module(module), name)()
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    return 0


if __name__ == "__main__":
    _serve()
