"""Runs the `wetread` command as a process of its own, and judges what it left behind."""

import atexit
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.zygote import Zygote

ROOT = Path(__file__).parents[1]
CLI = (sys.executable, "-m", "middleware.cli")
RESULT_FILES = (
    "findings.json",
    "seg.dcm",
    "sr.dcm",
    "oru.hl7",
    "fhir-bundle.json",
    "report.txt",
    "report.html",
    "trace.json",
)


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code, both outputs, seconds, and its process id."""

    code: int
    out: str
    err: str
    seconds: float
    pid: int

    @property
    def said(self) -> str:
        """Everything it printed."""
        return self.out + self.err


def environment(temporary: Path, **more: str) -> dict[str, str]:
    """A plain environment: no WETREAD_* of the caller, temporary files in a folder of our own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WETREAD_") and k != "TMPDIR"}
    return {**kept, "TMPDIR": str(temporary), "COLUMNS": "200", "PYTHONPATH": str(ROOT), **more}


@cache
def zygote() -> Zygote:
    """The process that commands are forked from, one a pytest process."""
    started = Zygote()
    atexit.register(started.stop)
    return started


def run_wetread(folder: Path, *arguments: object, timeout_s: float = 120.0, **more: str) -> Ended:
    """Run `wetread ARGUMENTS` in `folder` (as a fork, see zygote.py) and wait. Fails where it prints a traceback or
    leaves anything behind: temporary files, processes or shared memory of its Triton."""
    temporary = folder / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    out, err = folder / "stdout", folder / "stderr"
    for each in (out, err):
        each.unlink(missing_ok=True)
    began = time.perf_counter()
    command = [str(a) for a in arguments]
    pid = zygote().start("middleware.cli:main", command, folder, environment(temporary, **more), out, err)
    code = zygote().wait(pid, timeout_s)
    ended = Ended(code, out.read_text(), err.read_text(), time.perf_counter() - began, pid)
    assert "Traceback" not in ended.said, ended.said
    assert_nothing_left(pid, temporary)
    return ended


def start_wetread(folder: Path, *arguments: object, **more: str) -> "subprocess.Popen[str]":
    """Start `wetread ARGUMENTS` in `folder`; its temporary files go to `folder/tmp`."""
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        [*CLI, *map(str, arguments)],
        cwd=folder,
        env=environment(folder / "tmp", **more),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_nothing_left(pid: int, temporary: Path) -> None:
    """No file in `temporary`, and no process or shared memory of a Triton that process `pid` started."""
    assert sorted(p.name for p in temporary.iterdir()) == []
    assert_no_triton(pid)


def assert_no_triton(pid: int, within_s: float = 10.0) -> None:
    """No tritonserver, stub or shared memory that process `pid` started, at the latest in `within_s` seconds."""
    deadline = time.monotonic() + within_s
    while (left := [*_segments(pid), *_processes(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


def _segments(pid: int) -> list[str]:
    return [p.name for p in Path("/dev/shm").glob(f"wetread_{pid}_*")]


def _processes(pid: int) -> list[str]:
    """Command lines of running processes that carry the server id of that process' Triton."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if f"wetread_{pid}_".encode() in line:
                found.append(f"{entry.name}: {line[:120]!r}")
    return found


def assert_no_result(out: Path, *, trace: bool) -> None:
    """The folder holds no result, whole or half; `trace`: the trace of a reading that stopped is there."""
    left = sorted(p.relative_to(out).as_posix() for p in out.rglob("*")) if out.exists() else []
    assert left == (["trace.json"] if trace else [])


def write_config(folder: Path, lines: Sequence[str] | str) -> Path:
    """Write `wetread.yaml` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "wetread.yaml"
    file.write_text(lines if isinstance(lines, str) else "\n".join(lines) + "\n", encoding="utf-8")
    return file


def finish(child: "subprocess.Popen[str]", timeout_s: float = 120.0) -> Ended:
    """Wait until a started command has ended by itself."""
    began = time.perf_counter()
    try:
        out, err = child.communicate(timeout=timeout_s)
    finally:
        if child.poll() is None:
            child.kill()
            child.communicate()
    return Ended(child.returncode, out, err, time.perf_counter() - began, child.pid)


def interrupt(child: "subprocess.Popen[str]", number: signal.Signals) -> Ended:
    """Send a signal to a started command and wait until it has ended."""
    child.send_signal(number)
    return finish(child, 60.0)
