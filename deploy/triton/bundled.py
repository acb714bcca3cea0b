"""A real Triton Inference Server on loopback for the length of a `with` block, from a PyPI wheel.

The wheel `nvidia-pytriton` carries the `tritonserver` binary, its libraries and the python backend; this file
runs that binary itself on plain model repositories (the layout a production Triton takes) and never imports
the wheel's own package. It serves the demo, `wetread process` without a configured Triton, and the tests.
It is not a production server: python backend on CPU only, no authentication, bound to 127.0.0.1.

    with BundledTriton(Path("deploy/triton/models")) as triton:
        TritonConfig(url=triton.grpc_url)

Blocking inside `with`, non-blocking inside `async with`.
"""

import asyncio
import contextlib
import ctypes
import http.client
import importlib.util
import json
import os
import platform
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

LOOPBACK = "127.0.0.1"
READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
POLL_INTERVAL_S = 0.05
START_ATTEMPTS = 3
LOG_TAIL_LINES = 15

GUARD = Path(__file__).with_name("guard.py")


class BundledTritonError(RuntimeError):
    """The bundled server is not installed, did not become ready, or died; the message carries the log tail."""


def bundled_triton_available() -> tuple[bool, str]:
    """Says whether the bundled server can run here, and if not, what is missing and how to get it."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return (
            False,
            f"the bundled Triton runs on linux x86_64 only, this is {sys.platform} {platform.machine()}",
        )
    if _wheel_root() is None:
        return False, "not installed: pip install --no-deps nvidia-pytriton==0.7.0"
    if not _stub().is_file():
        return False, f"{_stub()} is missing: nvidia-pytriton has no stub for this Python version"
    library = f"libpython{_python_version()}.so.1.0"
    try:
        ctypes.CDLL(library, mode=os.RTLD_LOCAL | os.RTLD_LAZY)
    except OSError:
        return False, f"{library} is missing: apt-get install libpython{_python_version()}"
    return True, f"nvidia-pytriton in {_wheel_root()}"


class BundledTriton:
    """Runs `tritonserver` over the given model repositories; every model is loaded before entry returns.

    `arguments` are further tritonserver options. `grpc_url`, `http_url` and `metrics_url` are host:port on
    127.0.0.1, set on entry. The server ends with the block, and with this process however it dies
    (`guard.py`). Raises `BundledTritonError`.
    """

    def __init__(self, *models: Path, ready_timeout_s: float = READY_TIMEOUT_S, arguments: Sequence[str] = ()) -> None:
        self._models = [path.resolve() for path in models]
        self._arguments = list(arguments)
        self._ready_timeout_s = ready_timeout_s
        self._work: Path | None = None
        self._keeper: _Keeper | None = None
        self._server_id = ""
        self.grpc_url = self.http_url = self.metrics_url = ""

    def __enter__(self) -> Self:
        try:
            for pause_s in self._start():
                time.sleep(pause_s)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        try:
            for pause_s in self._start():
                await asyncio.sleep(pause_s)
        except BaseException:
            await asyncio.to_thread(self.stop)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.stop)

    @property
    def pid(self) -> int:
        """The server's process id while it runs."""
        if self._keeper is None:
            raise BundledTritonError("the bundled Triton is not running")
        return self._keeper.pid

    def log_tail(self) -> str:
        """The last lines that the server and its models printed (warnings and errors; info is off)."""
        if self._work is None or not (self._work / "log").exists():
            return ""
        return "\n".join((self._work / "log").read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])

    def stop(self) -> None:
        """Ends the server (SIGTERM, then SIGKILL), and removes its working folder and shared memory."""
        if self._keeper is not None:
            self._keeper.stop()
            self._keeper = None
        if self._work is not None:
            shutil.rmtree(self._work, ignore_errors=True)
            self._work = None

    def _start(self) -> Iterator[float]:
        """Starts the server and yields the pauses to wait between looks, until it is ready."""
        available, reason = bundled_triton_available()
        if not available:
            raise BundledTritonError(f"bundled Triton: {reason}")
        for path in self._models:
            if not path.is_dir():
                raise BundledTritonError(f"bundled Triton: model repository {path} is not a folder")
        for attempt in range(1, START_ATTEMPTS + 1):
            self._launch()
            try:
                yield from self._pauses_until_ready()
                return
            except BundledTritonError as error:
                # Another process may take a free port between our look and the server's bind.
                if attempt == START_ATTEMPTS or "already in use" not in str(error):
                    raise
                self.stop()

    def _launch(self) -> None:
        self._server_id = f"wetread_{os.getpid()}_{uuid.uuid4().hex[:8]}"
        self._work = Path(tempfile.mkdtemp(prefix="wetread-triton-"))
        grpc, http_, metrics = free_ports(3)
        self.grpc_url, self.http_url, self.metrics_url = (f"{LOOPBACK}:{port}" for port in (grpc, http_, metrics))
        command = _command(self._models, _backends(self._work), self._server_id, grpc, http_, metrics)
        self._keeper = _Keeper([*command, *self._arguments], self._server_id, self._work)

    def _pauses_until_ready(self) -> Iterator[float]:
        deadline = time.monotonic() + self._ready_timeout_s
        assert self._keeper is not None
        while not self._is_ready():
            if (code := self._keeper.poll()) is not None:
                raise BundledTritonError(f"bundled Triton ended with code {code} while starting:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise BundledTritonError(
                    f"bundled Triton is not ready after {self._ready_timeout_s:g} s:\n{self.log_tail()}"
                )
            yield POLL_INTERVAL_S

    def _is_ready(self) -> bool:
        """Whether the server on our port is ours (by its id) and has loaded every model."""
        try:
            if _get(self.http_url, "/v2/health/ready")[0] != 200:
                return False
            return bool(json.loads(_get(self.http_url, "/v2")[1])["name"] == self._server_id)
        except (OSError, http.client.HTTPException, ValueError, KeyError):
            return False


class _Keeper:
    """The server under `guard.py`, which ends it and tidies up after it however this process ends."""

    def __init__(self, command: list[str], server_id: str, work: Path) -> None:
        log = work / "log"
        guard = [sys.executable, "-I", "-S", str(GUARD), str(work), server_id, str(log), str(STOP_TIMEOUT_S)]
        try:
            self._guard = subprocess.Popen(
                [*guard, *command],
                env=_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            raise BundledTritonError(f"bundled Triton could not be started: {error}") from error
        assert self._guard.stdout is not None
        first_line = self._guard.stdout.readline()
        if not first_line:
            self.stop()
            raise BundledTritonError(f"bundled Triton could not be started: {command[0]} does not run")
        self.pid = int(first_line)

    def poll(self) -> int | None:
        """The server's exit code if it has ended."""
        assert self._guard.stdout is not None
        readable, _, _ = select.select([self._guard.stdout], [], [], 0)
        return int(self._guard.stdout.readline() or -1) if readable else None

    def stop(self) -> None:
        """End the server; once this returns, it is gone with its stubs, shared memory and work folder."""
        assert self._guard.stdin is not None
        assert self._guard.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._guard.stdin.close()
        self._guard.wait()
        self._guard.stdout.close()


def free_ports(count: int) -> list[int]:
    """Distinct TCP ports that were free on 127.0.0.1 a moment ago."""
    sockets = [socket.create_server((LOOPBACK, 0)) for _ in range(count)]
    try:
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _command(models: list[Path], backends: Path, server_id: str, grpc: int, http_: int, metrics: int) -> list[str]:
    options = {
        "id": server_id,
        "backend-directory": backends,
        "grpc-address": LOOPBACK,
        "http-address": LOOPBACK,
        "metrics-address": LOOPBACK,
        "grpc-port": grpc,
        "http-port": http_,
        "metrics-port": metrics,
        "allow-gpu-metrics": "false",
        "pinned-memory-pool-byte-size": 0,
        "log-info": "false",
        "exit-timeout-secs": 0,
        "backend-config": f"python,shm-region-prefix-name={server_id}_",
    }
    repositories = [f"--model-repository={path}" for path in models]
    flags = [f"--{name}={value}" for name, value in options.items()]
    # Our configurations are complete; without the switch each model is started twice to be asked for its own.
    return [str(_server_binary()), "--disable-auto-complete-config", *repositories, *flags]


def _backends(work: Path) -> Path:
    """Lays out work/backends/python as the server expects it: backend and stub side by side."""
    folder = work / "backends" / "python"
    folder.mkdir(parents=True)
    wheel = _server_binary().parents[1] / "backends" / "python"
    for part in (wheel / "libtriton_python.so", wheel / "triton_python_backend_utils.py", _stub()):
        (folder / part.name).symlink_to(part)
    return folder.parent


def _environment() -> dict[str, str]:
    """A small environment: no secret of ours reaches the models, and the stub finds the system's own Python.

    The stub embeds libpython and takes its standard library from the first `python3` on PATH; a virtual
    environment's or pyenv's would not match that library.
    """
    root = _wheel_root()
    return {
        "PATH": "/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "LD_LIBRARY_PATH": f"{root}/nvidia_pytriton.libs",
        "WETREAD_SITE_PACKAGES": _numpy_root(),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def _wheel_root() -> Path | None:
    spec = importlib.util.find_spec("pytriton")
    return Path(spec.origin).parents[1] if spec and spec.origin else None


def _numpy_root() -> str:
    spec = importlib.util.find_spec("numpy")
    return str(Path(spec.origin).parents[1]) if spec and spec.origin else ""


def _server_binary() -> Path:
    return (_wheel_root() or Path()) / "pytriton" / "tritonserver" / "bin" / "tritonserver"


def _stub() -> Path:
    stubs = _server_binary().parents[1] / "python_backend_stubs"
    return stubs / _python_version() / "triton_python_backend_stub"


def _python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _get(address: str, path: str) -> tuple[int, bytes]:
    host, port = address.split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=2)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()
