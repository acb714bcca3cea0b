"""The service: HTTP API, workflows, and the sweep that leaves no accepted study behind."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from dbos import DBOS, SetWorkflowID
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError

from middleware import telemetry
from middleware.api import deliveries as deliveries_api
from middleware.api import events, health, keys, subscriptions
from middleware.api.limits import BodyLimit
from middleware.api.refusals import refuse_invalid
from middleware.bootstrap import (
    READING_QUEUE,
    WORKFLOW_VERSION,
    Overrides,
    open_systems,
    prepare_data_dir,
    run_workflows,
)
from middleware.dispatching import look_after_deliveries
from middleware.intake.inbox import accept_study, workflow_id
from middleware.listening import listen_to_messages
from middleware.presence import be_present
from middleware.retention import prune_forever
from middleware.settings import Settings
from middleware.store.tables import StudyJob
from middleware.subscribing import listen_to_ehr
from middleware.systems import Systems
from middleware.taking_over import look_after_workers
from middleware.watching import watch_studies
from middleware.workflow import correct_result, read_study


async def start_reading(job: StudyJob) -> None:
    """Queue the job's workflow, a reading or a change to its result; queueing the same run again changes nothing."""
    if job.state == "accepted":
        change = job.facts.get("change")
        with SetWorkflowID(workflow_id(job)):
            if change:
                await DBOS.enqueue_workflow_async(
                    READING_QUEUE, correct_result, job.job_id, job.study_instance_uid, change
                )
            else:
                await DBOS.enqueue_workflow_async(READING_QUEUE, read_study, job.job_id, job.study_instance_uid)


async def sweep(systems: Systems) -> int:
    """Queue every job that was accepted but whose workflow was not, because the process died between the two; and
    read again what failed because a system was not there for too long, now that the site starts us anew."""
    failed = systems.store.jobs_in_state("failed")
    for job in [one for one in failed if not one.facts.get("by_command")]:
        key = workflow_id(job)
        accept_study(systems.store, job.study_instance_uid, source="restart", key=key, now=systems.now())
    jobs = [job for job in systems.store.jobs_in_state("accepted") if not job.facts.get("by_command")]
    for job in jobs:
        await start_reading(job)
    return len(jobs)


def create_app(settings: Settings) -> FastAPI:
    """The application; its systems open when it starts and close when it stops."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_systems(settings, Overrides()) as systems, run_workflows(systems):
            app.state.systems, app.state.start_reading = systems, start_reading
            telemetry.log("serving", count=await sweep(systems))
            async with (
                listen_to_messages(systems) as hearing,
                listen_to_ehr(systems, hearing) as app.state.ehr_notices,
                watch_studies(systems, start_reading),
                look_after_deliveries(systems),
                _upkeep(systems),
            ):
                yield

    app = FastAPI(
        title="Wetread",
        version="0.1.0",
        summary="Brings imaging AI into the clinic and its results back out.",
        lifespan=lifespan,
    )
    app.add_middleware(BodyLimit)
    app.add_exception_handler(RequestValidationError, refuse_invalid)
    app.include_router(events.router)
    app.include_router(subscriptions.router)
    app.include_router(health.router)
    app.include_router(keys.router)
    app.include_router(deliveries_api.router)
    if settings.api.token is not None:  # whoever may change deliveries is known by it; without one, nobody may
        app.include_router(deliveries_api.changing_router)
    return app


def serve(settings: Settings) -> None:
    """Run the service until it is told to stop (SIGINT, SIGTERM)."""
    telemetry.configure_logging()
    prepare_data_dir(settings)
    config = uvicorn.Config(
        create_app(settings), host=settings.api.host, port=settings.api.port, log_level="warning", access_log=False
    )
    with be_present(settings, WORKFLOW_VERSION):
        uvicorn.Server(config).run()


def work(settings: Settings) -> None:
    """Run one more worker on the same database until it is told to stop."""
    telemetry.configure_logging()
    prepare_data_dir(settings)
    with be_present(settings, WORKFLOW_VERSION):
        asyncio.run(_work(settings))


async def _work(settings: Settings) -> None:
    async with open_systems(settings) as systems, run_workflows(systems), _upkeep(systems):
        await sweep(systems)
        telemetry.log("working")
        async with look_after_deliveries(systems):
            await asyncio.Event().wait()


@asynccontextmanager
async def _upkeep(systems: Systems) -> AsyncIterator[None]:
    """What every process does beside its readings while the block runs."""
    tasks = [asyncio.create_task(loop) for loop in (look_after_workers(systems), prune_forever(systems))]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
