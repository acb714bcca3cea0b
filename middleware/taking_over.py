"""The living take over from the dead: readings and deliveries that a process left unfinished go on elsewhere, and what
an older version left is read anew. There is no control plane; every process looks after all others.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime, timedelta

from dbos import DBOS, DBOSClient, WorkflowStatus
from sqlmodel import Session

from middleware import telemetry
from middleware.bootstrap import PROCESS, READING_QUEUE, WORKFLOW_VERSION
from middleware.intake.inbox import workflow_id
from middleware.store.queries import Store
from middleware.store.tables import StudyJob
from middleware.store.workers import ALIVE, GONE, Sign, Worker, WorkerStore, sign_of
from middleware.systems import Systems

UNFINISHED = ["ENQUEUED", "PENDING", "DELAYED"]
PAGE = 500
MOST_DEATHS = 5
"""So many workers may die while they read one study: it may be the study that kills them."""
LOST_AFTER = timedelta(minutes=1)


class Watch:
    """Tells which workers have been silent for too long, by our own clock. Silence counts only while we could hear:
    where the store was away from us, it was from them too."""

    def __init__(self, dead_after_s: float) -> None:
        self._dead_after_s = dead_after_s
        self._since: dict[Sign, float] = {}
        self._looked_at = 0.0

    def find_silent(self, workers: Iterable[Worker], at_s: float) -> list[Sign]:
        """Workers whose work is to be taken over: those that stopped, and those that have given no sign of life while
        we looked. `at_s` grows steadily (time.monotonic)."""
        if at_s - self._looked_at > self._dead_after_s / 2:
            self._since.clear()
        self._looked_at = at_s
        signs = [sign_of(worker) for worker in workers if worker.state != GONE]
        self._since = {sign: self._since.get(sign, at_s) for sign in signs}
        return [s for s, since in self._since.items() if s.state != ALIVE or at_s - since >= self._dead_after_s]


async def look_after_workers(systems: Systems) -> None:
    """Take over what the dead left, for ever."""
    settings = systems.settings
    watch = Watch(settings.workers.dead_after_s)
    own = settings.executor_name
    versions_at = 0.0
    while True:
        await asyncio.sleep(settings.workers.heartbeat_s)
        try:
            workers = await asyncio.to_thread(systems.workers.workers)
            others = [worker for worker in workers if worker.executor_id != own]
            for sign in watch.find_silent(others, time.monotonic()):
                await asyncio.to_thread(take_over, systems, sign)
            if time.monotonic() >= versions_at:
                living = {worker.version for worker in workers if worker.state == ALIVE} | {WORKFLOW_VERSION}
                await asyncio.to_thread(restart_stranded, systems.workers, living)
                await asyncio.to_thread(fail_lost, systems)
                versions_at = time.monotonic() + settings.workers.dead_after_s
        except Exception as error:  # the store is away; everybody stays as they are
            telemetry.log("workers not looked after", source="workers", kind=type(error).__name__)


def take_over(systems: Systems, dead: Sign) -> int:
    """Let the living go on with what a dead worker was doing; how many workflows that is. Nothing where it lives after
    all, or another process takes over just now. A worker that only seemed dead cannot finish a step any more: DBOS
    keeps its results out once a workflow has another owner."""
    with systems.workers.taking_over(dead) as session:
        if session is None:
            return 0
        left = DBOS.list_workflows(status="PENDING", executor_id=dead.executor_id, load_input=False, load_output=False)
        by_queue: dict[str | None, list[str]] = defaultdict(list)
        for workflow in left:
            if dead.state != ALIVE or not _gives_up(session, workflow, systems.now()):
                by_queue[workflow.queue_name].append(workflow.workflow_id)
        for queue, ids in by_queue.items():
            DBOS.resume_workflows(ids, queue_name=queue)
        telemetry.log("took over from a worker", source="workers", state=dead.state, count=len(left))
        return len(left)


def _gives_up(session: Session, workflow: WorkflowStatus, now: datetime) -> bool:
    """Whether a reading has killed so many workers that no other one is to try it; it ends failed then."""
    job = session.get(StudyJob, workflow.workflow_id.partition("/")[0], with_for_update=True)
    if workflow.name != "read_study" or job is None:
        return False
    run, deaths = job.facts.get("died_in", ("", 0))
    deaths = deaths + 1 if run == workflow.workflow_id else 1
    job.facts = {**job.facts, "died_in": [workflow.workflow_id, deaths]}
    if deaths < MOST_DEATHS:
        return False
    DBOS.cancel_workflow(workflow.workflow_id)
    reason = f"{deaths} workers died while they read this study; see whether they had memory enough, then a new event"
    job.state, job.reasons, job.updated_at = "failed", [reason], now
    return True


def find_lost(engine: "type[DBOS] | DBOSClient", store: Store, now: datetime) -> list[StudyJob]:
    """Jobs that are said to be read and whose workflow has ended all the same, or is not there."""
    jobs = [job for job in store.jobs_in_state("reading") if now - job.updated_at > LOST_AFTER]
    ids = [workflow_id(job) for job in jobs]
    found = engine.list_workflows(workflow_ids=ids, load_input=False, load_output=False) if ids else []
    going_on = {workflow.workflow_id for workflow in found if workflow.status in UNFINISHED}
    return [job for job in jobs if workflow_id(job) not in going_on]


def fail_lost(systems: Systems) -> None:
    """Conclude the jobs that no workflow will: they are tried again later, as all that failed."""
    now = systems.now()
    for job in find_lost(DBOS, systems.store, now):
        reasons = ("its workflow ended before its end was written down",)
        systems.store.conclude_job(job.job_id, now, "failed", reasons, look_at=now + LOST_AFTER)
        telemetry.log("reading lost", job_id=job.job_id, state="failed")


def find_stranded(engine: "type[DBOS] | DBOSClient", living: set[str]) -> list[WorkflowStatus]:
    """Workflows that were left unfinished in a version that no living worker has. What `wetread process` left waits
    for the next such command: its images may lie in a folder that only that one knows."""
    versions = [version["version_name"] for version in engine.list_application_versions()]
    dead = [version for version in versions if version not in living]
    if not dead:
        return []
    found = engine.list_workflows(
        app_version=dead, status=[*UNFINISHED, "CANCELLED"], limit=PAGE, load_input=False, load_output=False
    )
    return [w for w in found if not (w.executor_id or "").startswith(PROCESS)]


def restart_stranded(store: WorkerStore, living: set[str]) -> int:
    """Start anew, in our version, what was left in a version that no living worker has; how many workflows that is.
    Repeating steps is harmless: their effects have the same ids. Cancelled first, since only what does not run can be
    started anew; where we die in between, the next one finds it cancelled."""
    if not find_stranded(DBOS, living):
        return 0
    with store.restarting() as is_ours:
        stranded = find_stranded(DBOS, living) if is_ours else []
        DBOS.cancel_workflows([w.workflow_id for w in stranded if w.status != "CANCELLED"])
        for workflow in stranded:
            queue = READING_QUEUE if workflow.name == "read_study" else workflow.queue_name
            DBOS.rewind_workflow(
                workflow.workflow_id,
                application_version=WORKFLOW_VERSION,
                queue_name=queue,
                queue_partition_key=workflow.queue_partition_key,
            )
        if stranded:
            telemetry.log("restarted what an older version left", source="workers", count=len(stranded))
        return len(stranded)
