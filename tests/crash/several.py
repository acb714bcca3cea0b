"""Several workers on one PostgreSQL: started, killed and started again, with what must be true in the end."""

import os
import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from deploy.hospital.postgres import RunningPostgres, start_postgres
from tests.commands import environment, zygote


@contextmanager
def postgres() -> Iterator[RunningPostgres]:
    """A PostgreSQL server of its own, on loopback, in a folder that goes away and that its user can reach."""
    with tempfile.TemporaryDirectory(prefix="wetread-postgres-") as name:
        Path(name).chmod(0o755)
        with start_postgres(Path(name) / "postgres") as server:
            yield server


class WorkerProcess:
    """One `wetread worker` with a data_dir (so a spool) of its own, as on a machine of its own."""

    def __init__(self, name: str, config: Path, folder: Path) -> None:
        self.name = name
        self._config = config
        self._folder = folder / name
        self._folder.mkdir(parents=True)
        self.pid = 0

    def start(self, command: str = "middleware.cli:main", **more: str) -> None:
        """Start it; whoever cares sees in the store when it lives."""
        own = {
            "WETREAD_CONFIG": str(self._config),
            "WETREAD_EXECUTOR_ID": self.name,
            "WETREAD_DATA_DIR": str(self._folder / "data"),
        }
        (self._folder / "tmp").mkdir(exist_ok=True)
        env = environment(self._folder / "tmp", **{**own, **more})
        out = self._folder / "out"
        self.pid = zygote().start(command, ["worker"], self._folder, env, out, self._folder / "log")

    def kill(self) -> None:
        """End it as a power cut does."""
        os.kill(self.pid, signal.SIGKILL)
        zygote().wait(self.pid, 20)
        self.pid = 0

    def wait_for_death(self, timeout_s: float) -> int:
        """Its exit code once it has ended by itself."""
        code, self.pid = zygote().wait(self.pid, timeout_s), 0
        return code

    def end(self) -> int:
        """Tell it to stop; its exit code (0 where it was dead already)."""
        if not self.pid:
            return 0
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        code, self.pid = zygote().wait(self.pid, 60), 0
        return code

    def log(self) -> str:
        """Everything that it logged."""
        file = self._folder / "log"
        return file.read_text(errors="replace") if file.exists() else ""


def logs(workers: Sequence[WorkerProcess]) -> str:
    """The end of every worker's log, for a person."""
    return "\n".join(f"--- {worker.name}\n{worker.log()[-1500:]}" for worker in workers)
