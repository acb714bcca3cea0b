"""Events over HTTP: a study is to be read; what became of it."""

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Header, HTTPException, Path, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.exc import SQLAlchemyError

from middleware.intake.inbox import accept_study
from middleware.intake.room import NoRoom, check_room
from middleware.store.artifacts import read_answer
from middleware.store.tables import StudyJob

router = APIRouter(tags=["events"])

JobId = Annotated[str, Path(pattern=r"^[ -~]{1,64}$")]
StudyUid = Annotated[str, Path(pattern=r"^[0-9.]{1,64}$")]
"""What may stand in a path: PostgreSQL cannot be asked for every string (U+0000)."""


class StudyEventIn(BaseModel):
    """A study that is ready to be read."""

    model_config = ConfigDict(extra="forbid")
    study_instance_uid: str = Field(min_length=1, max_length=64, pattern=r"^[0-9]+(\.[0-9]+)*$")


class JobOut(BaseModel):
    """Where the reading of a study stands."""

    job_id: str
    study_instance_uid: str
    state: str
    protocol: str
    revision: int
    reasons: list[str]
    created_at: datetime
    updated_at: datetime


def show_job(job: StudyJob) -> JobOut:
    """The job as the API shows it."""
    return JobOut.model_validate(job, from_attributes=True)


@router.post(
    "/events/study",
    status_code=202,
    responses={
        200: {"model": JobOut},
        409: {"description": "the key names an event of another study"},
        413: {"description": "the body is too large"},
        503: {"description": "the store is full or down"},
    },
)
async def take_study_event(
    event: StudyEventIn,
    request: Request,
    response: Response,
    idempotency_key: Annotated[str | None, Header(max_length=200)] = None,
) -> JobOut:
    """Accept that a study is to be read. Answered once it is durable: 202 for a new event, 200 for a repeated one.

    The header `Idempotency-Key` names the event; without it the study's UID does, so that saying the same thing
    twice reads the study once; it reads nothing where the study was read already, by a watcher or an order, and no
    image came since.
    """
    state: Any = request.app.state
    uid = event.study_instance_uid
    try:
        check_room(state.systems.settings.data_dir, state.systems.settings.storage.min_free_mib)
        job, is_new = accept_study(
            state.systems.store,
            uid,
            source="http",
            key=idempotency_key or uid,
            now=state.systems.now(),
            is_request=idempotency_key is not None,
        )
        if job.study_instance_uid != uid:
            raise HTTPException(409, "this Idempotency-Key already names an event of another study; use one of its own")
        await state.start_reading(job)
    except ValueError as error:
        raise HTTPException(422, str(error)) from error
    except NoRoom as error:
        raise HTTPException(503, f"{error.reason}; send the event again later") from error
    except (OSError, SQLAlchemyError) as error:
        raise HTTPException(503, "the store cannot take the event now; send it again later") from error
    response.status_code = 202 if is_new else 200
    return show_job(job)


@router.get("/jobs/{job_id}")
def get_job(job_id: JobId, request: Request) -> JobOut:
    """Where one reading stands."""
    try:
        return show_job(request.app.state.systems.store.job(job_id))
    except LookupError as error:
        raise HTTPException(404, "no such job") from error


@router.get("/studies/{study_uid}/jobs")
def get_jobs_of_study(study_uid: StudyUid, request: Request) -> list[JobOut]:
    """All readings of one study, oldest first."""
    return [show_job(job) for job in request.app.state.systems.store.jobs_of_study(study_uid)]


DeliveryId = Annotated[str, Path(pattern=r"^[ -~]{1,64}$")]


class AnswerOut(BaseModel):
    """What a destination answered to one attempt, in its own words: JSON where it is JSON, else text."""

    attempt: int
    received_at: datetime
    answer: Any


@router.get("/deliveries/{delivery_id}/answers")
def get_answers(delivery_id: DeliveryId, request: Request) -> list[AnswerOut]:
    """The destination's own words to the attempts of a delivery, oldest first. They may hold patient data."""
    systems = request.app.state.systems
    kept = [(row, read_answer(systems.artifacts, row.digest)) for row in systems.store.answers(delivery_id)]
    return [AnswerOut(attempt=row.attempt, received_at=row.received_at, answer=answer) for row, answer in kept]
