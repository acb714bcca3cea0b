"""The living take over from the dead: readings and deliveries that a process left unfinished go on elsewhere, and what
an older version left is read anew. There is no control plane; every process looks after all others.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence

from dbos import DBOS, DBOSClient, WorkflowStatus

from middleware import telemetry
from middleware.bootstrap import PROCESS, READING_QUEUE, WORKFLOW_VERSION
from middleware.store.workers import ALIVE, GONE, Sign, Worker, WorkerStore, sign_of
from middleware.systems import Systems

UNFINISHED = ["ENQUEUED", "PENDING", "DELAYED"]
PAGE = 500


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
                await asyncio.to_thread(take_over, systems.workers, sign)
            if time.monotonic() >= versions_at:
                living = {worker.version for worker in workers if worker.state == ALIVE} | {WORKFLOW_VERSION}
                await asyncio.to_thread(restart_stranded, systems.workers, living)
                versions_at = time.monotonic() + settings.workers.dead_after_s
        except Exception as error:  # the store is away; everybody stays as they are
            telemetry.log("workers not looked after", source="workers", kind=type(error).__name__)


def take_over(store: WorkerStore, dead: Sign) -> int:
    """Let the living go on with what a dead worker was doing; how many workflows that is. Nothing where it lives after
    all, or another process takes over just now. A worker that only seemed dead cannot finish a step any more: DBOS
    keeps its results out once a workflow has another owner."""
    with store.taking_over(dead) as is_ours:
        if not is_ours:
            return 0
        left = _list(status=["PENDING"], executor_id=dead.executor_id)
        by_queue: dict[str | None, list[str]] = defaultdict(list)
        for workflow in left:
            by_queue[workflow.queue_name].append(workflow.workflow_id)
        for queue, ids in by_queue.items():
            DBOS.resume_workflows(ids, queue_name=queue)
        telemetry.log("took over from a worker", source="workers", state=dead.state, count=len(left))
        return len(left)


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


def _list(status: Sequence[str], executor_id: str) -> list[WorkflowStatus]:
    return DBOS.list_workflows(status=list(status), executor_id=executor_id, load_input=False, load_output=False)
