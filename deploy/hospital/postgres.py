"""A real PostgreSQL on loopback, for trying several workers: Debian's programs, a database of its own in a folder."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from deploy.hospital.process import LOOPBACK, ServerNotReady, ServerProcess, free_port, start, tail

PROGRAMS = Path("/usr/lib/postgresql")
USER = "wetread"
START_TIMEOUT_S = 60.0


class RunningPostgres:
    """The server: `url` of its database; it can be restarted as often as one likes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._bin = find_programs()
        self.port = free_port()
        self.url = f"postgresql://{USER}@{LOOPBACK}:{self.port}/wetread"
        self._process: ServerProcess | None = None

    def start(self) -> None:
        """Start it on its data; returns once it answers. Raises ServerNotReady."""
        log = self._folder / "postgres.log"
        options = ["-c", f"listen_addresses={LOOPBACK}", "-c", "fsync=off", "-c", "max_connections=200"]
        command = [*_as_owner(), self._bin / "postgres", "-D", self._data, "-p", self.port, "-k", "/tmp", *options]
        self._process = start("PostgreSQL", [str(word) for word in command], log)
        self._process.wait_until(self._answers, START_TIMEOUT_S)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End it: SIGINT sends everybody away (fast), SIGQUIT is a crash (immediate)."""
        if self._process is not None:
            os.kill(self._process.pid, how)
            self._process.stop()
            self._process = None

    def restart(self, how: signal.Signals = signal.SIGINT) -> None:
        """End it and start it again."""
        self.stop(how)
        self.start()

    def prepare(self) -> None:
        """Make the cluster and the database; the server runs afterwards."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:  # PostgreSQL does not run as root
            shutil.chown(self._folder, "postgres")
        self._run("initdb", "-D", self._data, "-U", USER, "--auth=trust", "-E", "UTF8", "--no-sync")
        self.start()
        self._run("createdb", "-h", LOOPBACK, "-p", self.port, "-U", USER, "wetread")

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def _answers(self) -> bool:
        asked = [self._bin / "pg_isready", "-q", "-h", LOOPBACK, "-p", str(self.port)]
        return subprocess.run([str(word) for word in asked]).returncode == 0

    def _run(self, program: str, *arguments: object) -> None:
        command = [*_as_owner(), str(self._bin / program), *map(str, arguments)]
        done = subprocess.run(command, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            end = tail(self._folder / "postgres.log")
            raise ServerNotReady(f"{program} failed: {done.stderr.strip()}\n{end}")


def find_programs() -> Path:
    """The folder of the newest PostgreSQL that Debian has installed. Raises ServerNotReady where there is none."""
    found = sorted(PROGRAMS.glob("*/bin/postgres"), key=lambda program: int(program.parts[-3]))
    if not found:
        raise ServerNotReady("PostgreSQL is not installed: apt-get install postgresql")
    return found[-1].parent


def _as_owner() -> Sequence[str]:
    """The user that owns the data; by exec, so that the server's process id is its own."""
    return ("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups") if os.geteuid() == 0 else ()


@contextmanager
def start_postgres(folder: Path) -> Iterator[RunningPostgres]:
    """A PostgreSQL with an empty database while the block runs; `folder` (which its own user must be able to reach)
    holds its data."""
    server = RunningPostgres(folder)
    try:
        server.prepare()
        yield server
    finally:
        server.stop()
