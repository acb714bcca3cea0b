"""The EHR's callbacks: FHIR Subscriptions, classic R4 rest-hook and the R5 Backport IG.

What they hold is not taken for true; it only makes us read from the EHR. The answer has no body: HAPI takes one for
FHIR.
"""

import json
from typing import Annotated, Any

from fastapi import APIRouter, Header, HTTPException, Path, Request, Response
from sqlalchemy.exc import SQLAlchemyError

from mappings.inputs.fhir_to_notification import UnreadableNotification
from middleware.intake.ehr_notices import EhrNotices, UnknownSubscription

router = APIRouter(tags=["events"])

REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"description": "the body is no notification"},
    401: {"description": "the header Authorization does not hold our token"},
    404: {"description": "no EHR is heard here, or the subscription is none of ours"},
    413: {"description": "the body is too large"},
    503: {"description": "the store is down"},
}
Authorization = Annotated[str, Header(max_length=8192)]


def _find_notices(request: Request, authorization: str) -> EhrNotices:
    notices: EhrNotices | None = getattr(request.app.state, "ehr_notices", None)
    if notices is None:
        raise HTTPException(404, "no EHR is heard here: ehr_events is not set")
    if not notices.is_signed(authorization):
        raise HTTPException(401, "the header Authorization must hold the token of our subscription as Bearer")
    return notices


@router.post("/fhir/notifications", status_code=204, responses=REFUSALS)
async def take_notification(request: Request, authorization: Authorization = "") -> Response:
    """Take a notification: a Bundle of the Backport IG where the subscriptions are of that kind; else whatever
    comes, mostly nothing, says that something changed."""
    notices = _find_notices(request, authorization)
    body = await request.body()
    return await _take(notices, _read_json(body) if body or notices.is_backport else None)


@router.put("/fhir/notifications/{resource_type}/{resource_id}", status_code=204, responses=REFUSALS)
async def take_resource(
    request: Request,
    resource_type: Annotated[str, Path(pattern=r"^[A-Z][A-Za-z]{1,63}$")],
    resource_id: Annotated[str, Path(pattern=r"^[A-Za-z0-9\-.]{1,64}$")],
    authorization: Authorization = "",
) -> Response:
    """Take a classic notification with payload: the resource is put below the endpoint. It is not looked at."""
    notices = _find_notices(request, authorization)
    if notices.is_backport:
        raise HTTPException(400, "our subscriptions are of the Backport IG: post a notification Bundle")
    return await _take(notices, None)


def _read_json(body: bytes) -> object:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "the body is not JSON") from error


async def _take(notices: EhrNotices, body: object) -> Response:
    try:
        if notices.is_backport:
            await notices.take_bundle(body)
        else:
            await notices.take_ping()
    except UnreadableNotification as error:
        raise HTTPException(400, str(error)) from error
    except UnknownSubscription as error:
        raise HTTPException(404, str(error)) from error
    except (OSError, SQLAlchemyError) as error:
        raise HTTPException(503, "the store cannot be asked now; send it again later") from error
    return Response(status_code=204)
