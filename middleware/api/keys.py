"""The public keys that our sign-in at the EHR is checked with."""

from typing import Any

from fastapi import APIRouter, HTTPException, Request
from starlette.responses import JSONResponse

router = APIRouter(tags=["keys"])

MAX_AGE_S = 300
"""How long a server may go on without asking again; `wetread keys new` lets keys overlap for much longer."""


@router.get(
    "/.well-known/jwks.json",
    response_model=dict[str, Any],
    responses={404: {"description": "no sign-in by keys is set"}, 503: {"description": "the keys cannot be read"}},
)
def get_public_keys(request: Request) -> JSONResponse:
    """The JWK set (RFC 7517) to register at the authorization server: public parts only, while keys change the old
    and the new one."""
    published = request.app.state.systems.public_keys
    if published is None:
        raise HTTPException(404, "no sign-in by keys is set: ehr.oauth")
    try:
        return JSONResponse(published(), headers={"Cache-Control": f"public, max-age={MAX_AGE_S}"})
    except ValueError as error:
        raise HTTPException(503, "the key files cannot be read; `wetread check` says why") from error
