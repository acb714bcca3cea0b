"""This process among those that work on one database: it says that it lives, and no two have one name.

The heart beats in a thread of its own, so that a long computation is not taken for death.
"""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from uuid import uuid4

from middleware import telemetry
from middleware.errors import SettingsError
from middleware.settings import Settings
from middleware.store.queries import open_engine
from middleware.store.workers import Worker, WorkerStore, sign_of


@contextmanager
def be_present(settings: Settings, version: str) -> Iterator[None]:
    """Be the worker of this executor id while the block runs. Raises SettingsError where another process is that."""
    engine = open_engine(settings.store_url)
    mine = _describe_myself(settings.executor_name, version)
    store = WorkerStore(engine)
    ended = threading.Event()
    try:
        _enter(store, mine, settings)
        heart = threading.Thread(target=_beat_until, args=(ended, store, mine, settings), daemon=True)
        heart.start()
        try:
            yield
        finally:
            ended.set()
            heart.join(5.0)
            with contextlib.suppress(Exception):  # where the store is away, others find out by our silence
                store.leave(mine.executor_id, mine.incarnation, _now())
    finally:
        engine.dispose()


def _describe_myself(executor_id: str, version: str) -> Worker:
    host, now, pid = socket.gethostname(), _now(), os.getpid()
    return Worker(
        executor_id=executor_id,
        incarnation=uuid4().hex,
        host=host,
        place=_place(),
        pid=pid,
        born=_born(pid),
        version=version,
        started_at=now,
        last_seen_at=now,
    )


def _now() -> datetime:
    return datetime.now().astimezone()


def _enter(store: WorkerStore, mine: Worker, settings: Settings) -> None:
    """Take our place; another process that has it and is not known to be dead is watched for as long as a dead one
    may seem alive."""
    other = store.enter(mine)
    if other is None:
        return
    seen, until = sign_of(other), time.monotonic() + settings.workers.dead_after_s
    while not _is_gone(other) and time.monotonic() < until:
        time.sleep(min(settings.workers.heartbeat_s, 0.2))
        latest = next((w for w in store.workers() if w.executor_id == mine.executor_id), None)
        if latest is not None and sign_of(latest) != seen and latest.state == other.state:
            raise _in_use(latest)
    other = store.enter(mine, silent=seen)
    if other is not None:
        raise _in_use(other)


def _in_use(other: Worker) -> SettingsError:
    return SettingsError(
        f"executor_id {other.executor_id}: process {other.pid} on host {other.host} works under this name. "
        "Give each process one of its own, such as WETREAD_EXECUTOR_ID=wetread-2"
    )


_fault: Exception | None = None


def store_fault() -> Exception | None:
    """Why the store did not take our last sign of life, so that nobody needs to write to it just to ask; None: it did,
    or this process gives none."""
    return _fault


def _beat_until(ended: threading.Event, store: WorkerStore, mine: Worker, settings: Settings) -> None:
    global _fault
    while not ended.wait(settings.workers.heartbeat_s):
        try:
            if not store.beat(mine.executor_id, mine.incarnation, _now()):
                telemetry.log("another process has come in our place; stopping", source="workers")
                os.kill(os.getpid(), signal.SIGTERM)
                return
            (settings.data_dir / ".alive").touch()  # for probes of a worker, which has no API
            _fault = None
        except Exception as error:  # the store is away; others cannot look either
            if _fault is None:
                telemetry.log("the store does not hear that we live", source="workers", kind=type(error).__name__)
            _fault = error


# Which process it is


def _place() -> str:
    """The machine since it was started, and the room of process ids in it; empty where that cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _born(pid: int) -> str:
    """When a process started, in clock ticks since the machine did (proc(5), stat field 22); empty where there is no
    such process, or it has ended and waits for its parent to notice."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if after_name[0] in "ZX" else after_name[19]


def _is_gone(other: Worker) -> bool:
    """Whether another process is known to have ended: it was on this machine and is no more."""
    return bool(other.place) and other.place == _place() and _born(other.pid) != other.born
