"""Whether the service lives, is ready, and what it counts."""

from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from middleware.intake.room import NoRoom, check_room
from middleware.presence import store_fault
from middleware.store.failures import is_out_of_room

router = APIRouter(tags=["health"])


@router.get("/health")
def get_health() -> dict[str, str]:
    """The process answers."""
    return {"status": "up"}


@router.get("/ready", responses={503: {"description": "not ready"}})
def get_ready(request: Request, response: Response) -> dict[str, str]:
    """The store answers and can write, and protocols are loaded: events can be accepted."""
    systems = request.app.state.systems
    try:
        _check_stores(systems)
    except Exception as error:  # whatever the database driver or disk raises, the answer is: not ready
        response.status_code = 503
        return {"status": "not ready", "store": _explain(error)}
    return {"status": "ready", "protocols": ", ".join(systems.protocols)}


def _check_stores(systems: Any) -> None:
    """Raise unless there is room, and both disk and database take a little. Whether the database does is known from
    our last sign of life: a write of its own would wait behind long ones."""
    check_room(systems.settings.data_dir, systems.settings.storage.min_free_mib)
    (systems.settings.data_dir / ".ready").write_bytes(b"1")
    systems.store.ping()
    if fault := store_fault():
        raise fault


def _explain(error: Exception) -> str:
    """The reason in words of ours: a driver's message may hold values."""
    if isinstance(error, NoRoom):
        return error.reason
    return "is full or read-only" if is_out_of_room(error) else "does not answer or cannot write"


@router.get("/metrics", response_class=Response)
def get_metrics() -> Response:
    """Prometheus metrics; no label holds patient data."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
