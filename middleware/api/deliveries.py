"""Deliveries over HTTP: where each artifact is, and what a person decides about it.

Requests that change something need the bearer token `api.token`; without that setting they are not offered at all.
"""

import hmac
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Header, HTTPException, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from middleware.api.events import JobId, StudyUid
from middleware.release.health import reason_of
from middleware.release.redelivering import (
    NotDeliverable,
    Replay,
    Word,
    replay_result,
    retry_delivery,
    settle_delivered,
)
from middleware.store.tables import Delivery
from middleware.systems import Systems

router = APIRouter(tags=["deliveries"])

State = Literal["pending", "in_flight", "delivered", "retrying", "ambiguous", "dead"]
Destination = Literal["pacs", "ehr", "ris"]
DeliveryId = Annotated[str, Path(pattern=r"^[0-9A-Za-z-]{1,64}$")]


class DeliveryOut(BaseModel):
    """Where one artifact stands at one destination. `digest` is the sha256 under which the artifact store has its
    bytes."""

    delivery_id: str
    job_id: str
    revision: int
    destination: str
    artifact_name: str
    digest: str
    state: str
    attempts: int
    receipt: str
    reason: str
    replay: str
    due_at: datetime | None
    created_at: datetime
    updated_at: datetime


def show_delivery(delivery: Delivery, here: Systems) -> DeliveryOut:
    """The delivery as the API shows it."""
    return show_deliveries([delivery], here)[0]


def show_deliveries(deliveries: Sequence[Delivery], here: Systems) -> list[DeliveryOut]:
    """The deliveries as the API shows them; those that wait for a destination that is down say so."""
    healths = here.deliveries.healths()
    columns = [{**each.model_dump(), "reason": reason_of(each, healths)} for each in deliveries]
    return [DeliveryOut.model_validate(each) for each in columns]


@router.get("/jobs/{job_id}/deliveries")
def get_deliveries_of_job(job_id: JobId, request: Request) -> list[DeliveryOut]:
    """Where each artifact of a job is now."""
    here = _systems(request)
    return show_deliveries(here.store.deliveries(job_id=job_id), here)


@router.get("/deliveries")
def get_deliveries(
    request: Request,
    state: State | None = None,
    destination: Destination | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 200,
) -> list[DeliveryOut]:
    """Deliveries that match, in the order in which they were planned; the first `limit` of them."""
    here = _systems(request)
    found = here.deliveries.search(state=state or "", destination=destination or "", limit=limit)
    return show_deliveries(found, here)


# What changes something


def _check_token(request: Request, authorization: Annotated[str, Header()] = "") -> None:
    """401 unless the request bears `api.token`; compared in constant time."""
    token = _systems(request).settings.api.token
    wanted = f"Bearer {token.get_secret_value()}" if token else ""
    if not token or not hmac.compare_digest(authorization.encode(), wanted.encode()):
        raise HTTPException(401, "needs the bearer token of the setting api.token", {"WWW-Authenticate": "Bearer"})


changing_router = APIRouter(
    tags=["deliveries"],
    dependencies=[Depends(_check_token)],
    responses={
        401: {"description": "the bearer token is missing or wrong"},
        404: {"description": "there is no such thing"},
        409: {"description": "its state does not allow it"},
    },
)


class WordIn(BaseModel):
    """Who decides, and why (a sentence without patient data; kept for good)."""

    model_config = ConfigDict(extra="forbid")
    person: str = Field(min_length=1, max_length=200, pattern=r"\S")
    reason: str = Field(min_length=1, max_length=2000, pattern=r"\S")


class RetryIn(WordIn):
    """`delivered`: do not send an ambiguous delivery again, the person found it at the destination."""

    delivered: bool = False


class ReplayIn(WordIn):
    """To which destination (all where none is named); `again`: also what was delivered or may have been."""

    destination: Destination | None = None
    again: bool = False


@changing_router.post("/deliveries/{delivery_id}/retry")
def retry(delivery_id: DeliveryId, word: RetryIn, request: Request) -> DeliveryOut:
    """Try a delivery again as soon as may be, or take an ambiguous one as arrived."""
    here = _systems(request)
    decide = settle_delivered if word.delivered else retry_delivery
    try:
        decided = decide(here.deliveries, here.store.delivery(delivery_id), _word(word, here))
    except LookupError as error:
        raise HTTPException(404, "no such delivery") from error
    except NotDeliverable as error:
        raise HTTPException(409, str(error)) from error
    return show_delivery(decided, here)


@changing_router.post("/studies/{study_uid}/replay")
def replay(
    study_uid: StudyUid,
    wish: ReplayIn,
    request: Request,
    idempotency_key: Annotated[str | None, Header(max_length=200)] = None,
) -> list[DeliveryOut]:
    """Send the released result of a study again, with the same bytes and ids; the deliveries that go. With `again`, the
    header `Idempotency-Key` names the wish (without it the reason does): the same one again sends nothing."""
    here = _systems(request)
    jobs = here.store.jobs_of_study(study_uid)
    if not jobs or jobs[-1].protocol not in here.protocols:
        raise HTTPException(404, "no reading of this study by a protocol in use")
    outputs = here.protocols[jobs[-1].protocol].protocol.outputs
    what = Replay(wish.destination or "", wish.again, idempotency_key or wish.reason)
    try:
        going = replay_result(
            here.store, here.deliveries, jobs[-1], outputs, here.configured(), what, _word(wish, here)
        )
    except NotDeliverable as error:
        raise HTTPException(409, str(error)) from error
    return show_deliveries(going, here)


def _word(word: WordIn, here: Systems) -> Word:
    return Word(word.person, word.reason, here.now())


def _systems(request: Request) -> Systems:
    systems: Systems = request.app.state.systems
    return systems
