"""Logs, metrics and progress. This module owns the list of fields that may be logged: none holds patient data."""

import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prometheus_client import Counter, Gauge, Histogram

LOG_FIELDS = frozenset(
    {"job_id", "protocol", "destination", "state", "step", "duration_s", "attempt", "source", "kind", "count"}
)
"""Fields a log line may carry. Study and patient identifiers, names and free text of messages are not among them."""

STEP_SECONDS = Histogram("wetread_step_seconds", "Duration of a step of read_study", ["step", "outcome"])
EVENTS = Counter("wetread_events_total", "Study events accepted", ["source", "outcome"])
JOBS = Counter("wetread_jobs_total", "Readings ended, by state", ["state"])
DELIVERIES = Counter("wetread_deliveries_total", "Delivery attempts ended, by state", ["destination", "state"])
DOWN = Gauge("wetread_destination_down", "1 while a destination does not answer", ["destination"])
IN_PROGRESS = Gauge("wetread_steps_in_progress", "Steps running now", ["step"])

_logger = logging.getLogger("wetread")


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        line = {"at": self.formatTime(record), "level": record.levelname, "event": record.getMessage(), **fields}
        return json.dumps(line, default=repr)


def configure_logging(level: str = "INFO") -> None:
    """JSON lines on standard error. Libraries speak only from ERROR on, and pydicom's warnings not at all: requests'
    URLs hold patient identifiers, and a warning quotes the value that it finds odd."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    _logger.handlers = [handler]
    _logger.setLevel(level)
    _logger.propagate = False
    for name in ("httpx", "httpcore", "dbos", "pydicom", "highdicom", "dicomweb_client", "urllib3", "sqlalchemy"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(pydicom|highdicom)\b")


def log(event: str, **fields: object) -> None:
    """One log line; ValueError for a field that is not in `LOG_FIELDS`."""
    foreign = set(fields) - LOG_FIELDS
    if foreign:
        raise ValueError(f"not a log field: {', '.join(sorted(foreign))}")
    _logger.info(event, extra={"fields": fields})


@dataclass(frozen=True)
class Progress:
    """What a person watching sees of a step: `state` is started, done or failed; `detail` may name the study's
    contents (it goes to the terminal, never to the log)."""

    step: str
    state: str
    detail: str = ""
    duration_s: float = 0.0


Listener = Callable[[Progress], None]
_listeners: list[Listener] = []


def listen(listener: Listener) -> None:
    """Tell `listener` of each step from now on."""
    _listeners.append(listener)


def tell(progress: Progress) -> None:
    """Pass progress on to every listener."""
    for listener in _listeners:
        listener(progress)


@dataclass
class StepWatch:
    """What a running step says of itself: `detail` for people, `duration_s` once it ended."""

    detail: str = ""
    duration_s: float = 0.0


@contextmanager
def watch_step(step: str, job_id: str) -> Iterator[StepWatch]:
    """Time a step, log it, count it and tell listeners."""
    watch = StepWatch()
    started = time.perf_counter()
    tell(Progress(step, "started"))
    outcome = "failed"
    with IN_PROGRESS.labels(step).track_inprogress():
        try:
            yield watch
            outcome = "done"
        finally:
            watch.duration_s = time.perf_counter() - started
            STEP_SECONDS.labels(step, outcome).observe(watch.duration_s)
            log("step", step=step, job_id=job_id, state=outcome, duration_s=round(watch.duration_s, 3))
            tell(Progress(step, outcome, watch.detail, watch.duration_s))


def quiet_logging() -> None:
    """No log lines: a person reads progress on the terminal instead."""
    configure_logging("CRITICAL")
    # It prints tracebacks of the tasks that Ctrl-C ends half-way.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)
