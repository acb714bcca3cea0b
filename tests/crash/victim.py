"""The real service, killed (SIGKILL) at a named point: wraps what the steps call, changes nothing in the product.

`VICTIM_ARM` names a file; while it holds `NAME` or `NAME:N`, the process kills itself when it comes to that point
(for the N-th time since). A point is before or after an effect on another system or on the store, inside a step
after its effects and before its result is kept (`.exit`), or after that (`.kept`).
"""

import contextlib
import functools
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from connectors.dicomweb.client import DicomwebClient
from connectors.fhir.client import FhirClient
from connectors.mllp.client import MllpClient
from connectors.triton.client import TritonClient
from middleware import app as service
from middleware import cli, delivering, steps
from middleware.store.deliveries import DeliveryStore
from middleware.store.queries import Store

STEPS = {
    "fetch": "fetch_images",
    "route": "choose_protocol",
    "context": "gather_context",
    "identity": "check_identity",
    "rules": "apply_rules",
    "priors": "find_priors",
    "inference": "ask_model",
    "findings": "derive_findings",
    "render": "render",
    "validate": "validate",
    "release": "plan_release",
}
"""Steps that record their run, and their functions."""

_seen: dict[str, int] = {}


def _come_to(point: str) -> None:
    arm = Path(os.environ["VICTIM_ARM"])
    try:
        wanted, _, number = arm.read_text().partition(":")
    except FileNotFoundError:
        return
    if wanted == point:
        _seen[point] = _seen.get(point, 0) + 1
        if _seen[point] == int(number or 1):
            os.kill(os.getpid(), signal.SIGKILL)


def _wrap_async(owner: Any, method: str, point: str) -> None:
    inner = getattr(owner, method)

    @functools.wraps(inner)
    async def wrapped(*args: Any, **kwargs: Any) -> Any:
        _come_to(f"{point}.before")
        answer = await inner(*args, **kwargs)
        _come_to(f"{point}.after")
        return answer

    setattr(owner, method, wrapped)


def _wrap(owner: Any, method: str, name: Callable[..., str]) -> None:
    inner = getattr(owner, method)

    @functools.wraps(inner)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        point = name(*args, **kwargs)
        _come_to(f"{point}.before")
        answer = inner(*args, **kwargs)
        _come_to(f"{point}.after")
        return answer

    setattr(owner, method, wrapped)


def _wrap_kept(owner: Any, function: str, point: str) -> None:
    inner = getattr(owner, function)

    @functools.wraps(inner)
    async def wrapped(*args: Any, **kwargs: Any) -> Any:
        answer = await inner(*args, **kwargs)
        _come_to(f"{point}.kept")
        return answer

    setattr(owner, function, wrapped)


def _wrap_run() -> None:
    inner = steps._run

    @contextlib.asynccontextmanager
    async def wrapped(step: str, job_id: str) -> AsyncIterator[Any]:
        async with inner(step, job_id) as watch:
            yield watch
        _come_to(f"{step}.exit")

    steps._run = wrapped


def _wrap_progress() -> None:
    """Killed while a study arrives: some instances are in the spool, and not all."""
    inner = DicomwebClient.fetch_study

    async def wrapped(self: DicomwebClient, study_uid: str, into: Path, *, on_progress: Any = None) -> Any:
        def report(instances: int, size: int) -> None:
            on_progress(instances, size)
            _come_to("pacs-fetch.middle")

        return await inner(self, study_uid, into, on_progress=report)

    DicomwebClient.fetch_study = wrapped  # type: ignore[method-assign]


def _settled_point(store: DeliveryStore, delivery_id: str, now: Any, state: str, **_: Any) -> str:
    return f"{store.find(delivery_id).destination}-marked-{state}"


def _claimed_point(store: DeliveryStore, delivery_id: str, *_: Any, **__: Any) -> str:
    return f"{store.find(delivery_id).destination}-marked-in_flight"


def main() -> None:
    """Run the `wetread` command with every point wrapped."""
    _wrap_progress()
    _wrap_run()
    for step, function in STEPS.items():
        _wrap_kept(steps, function, step)
    for function in ("list_deliveries", "attempt_delivery"):
        _wrap_kept(delivering, function, function)
    _wrap_kept(steps, "conclude", "conclude")
    _wrap_async(DicomwebClient, "fetch_study", "pacs-fetch")
    _wrap_async(DicomwebClient, "store", "pacs-store")
    _wrap_async(FhirClient, "search", "ehr-search")
    _wrap_async(FhirClient, "transaction", "ehr-transaction")
    _wrap_async(MllpClient, "send", "ris-send")
    _wrap_async(TritonClient, "infer", "infer")
    _wrap_async(service, "start_reading", "queue")
    _wrap_async(delivering, "start", "start-delivering")
    _wrap(Store, "accept_event", lambda *_, **__: "accept")
    _wrap(Store, "save_artifacts", lambda *_, **__: "save-artifacts")
    _wrap(Store, "plan_deliveries", lambda *_, **__: "plan")
    _wrap(DeliveryStore, "claim", _claimed_point)
    _wrap(DeliveryStore, "settle", _settled_point)
    _wrap(DeliveryStore, "handed_over", lambda *_, **__: "handed-over")
    _wrap(Store, "update_job", lambda *_, **__: "job-updated")
    _wrap(Store, "conclude_job", lambda *_, **__: "job-concluded")
    cli.main()
