"""What a client hears of a request that is not what the interface says."""

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.responses import JSONResponse


async def refuse_invalid(request: Request, error: Exception) -> JSONResponse:
    """422 with the place and the reason of each fault. What was sent is not sent back: it may be no JSON (Infinity)
    and it may hold what no log of the client should."""
    assert isinstance(error, RequestValidationError)
    faults = [{"loc": list(e["loc"]), "msg": e["msg"], "type": e["type"]} for e in error.errors()]
    return JSONResponse({"detail": faults}, 422)
