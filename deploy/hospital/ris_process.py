"""Runs the simulator's RIS as a process of its own, and asks and steers it over its control port."""

import json
import sys
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from deploy.hospital.process import LOOPBACK, ServerProcess, answers, free_port, start
from deploy.hospital.ris import Behaviour, Received

REPOSITORY = Path(__file__).parents[2]


class RunningRis:
    """An MLLP RIS at `host`:`port`. A context manager that stops on exit; its store file stays."""

    def __init__(self, port: int, control_url: str, store: Path, process: ServerProcess) -> None:
        self.host = LOOPBACK
        self.port = port
        self.control_url = control_url
        self.store = store
        self.process = process

    def received(self) -> list[Received]:
        """Every message that arrived, repeats and refused ones included."""
        return [Received(**item) for item in self._call("GET", "received")]

    def accepted(self) -> list[Received]:
        """The distinct messages that were accepted."""
        return [Received(**item) for item in self._call("GET", "accepted")]

    def behave(self, behaviour: Behaviour, *, times: int | None = None, delay_s: float = 0.0) -> None:
        """See `RisServer.behave`."""
        self._call("PUT", "behaviour", {"behaviour": behaviour, "times": times, "delay_s": delay_s})

    def stop(self) -> None:
        """End the RIS."""
        self.process.stop()

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.control_url}/{path}", data, {"Content-Type": "application/json"}, method=method
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=10) as response:
            return json.load(response)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def start_ris(workdir: Path, *, port: int | None = None) -> RunningRis:
    """Start the RIS with its store in `workdir/ris.jsonl`; what that file holds already is remembered."""
    mllp, control = port or free_port(), free_port()
    store = (workdir / "ris.jsonl").resolve()
    command = [sys.executable, "-m", "deploy.hospital.ris", "--port", str(mllp), "--store", str(store)]
    process = start("RIS", [*command, "--control-port", str(control)], workdir / "ris.log", cwd=REPOSITORY)
    url = f"http://{LOOPBACK}:{control}"
    process.wait_until(lambda: answers(f"{url}/received"), timeout_s=30)
    return RunningRis(mllp, url, store, process)
