"""Whether the service lives, is ready, and what it counts."""

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

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
        systems.store.ping()
        probe = systems.settings.data_dir / ".ready"
        probe.write_bytes(b"1")
    except Exception:  # whatever the database driver or disk raises, the answer is: not ready
        response.status_code = 503
        return {"status": "not ready", "store": "does not answer or cannot write"}
    return {"status": "ready", "protocols": ", ".join(systems.protocols)}


@router.get("/metrics", response_class=Response)
def get_metrics() -> Response:
    """Prometheus metrics; no label holds patient data."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
