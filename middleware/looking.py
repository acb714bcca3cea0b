"""Which of the studies that wait are to be read now, and what becomes of images that come after a reading."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime, timedelta
from typing import Any

from pydantic import TypeAdapter

from connectors.errors import ConnectorError, Permanent
from mappings.model.study import Study
from middleware import telemetry
from middleware.intake.completeness import (
    Patience,
    Sight,
    Told,
    Verdict,
    changes_roles,
    count_images,
    digest_images,
    judge,
    refused_modalities,
    see_outline,
    see_study,
)
from middleware.intake.context import find_own_orders
from middleware.intake.deciding import Decided
from middleware.intake.headers import Headers
from middleware.intake.identity import is_anothers
from middleware.intake.inbox import FIRST_LATE_LOOK, LAST_LATE_LOOK, accept_study, run_started_at, workflow_id
from middleware.store.tables import StudyJob
from middleware.systems import Systems

StartReading = Callable[[StudyJob], Awaitable[None]]

TURN_S = 0.5
"""How often it is asked which study is due."""
AT_ONCE = 4
"""Studies that are looked at at one time."""
COMPLETE = frozenset({"completed", "preliminary", "final"})
"""Order statuses that say that all images were acquired."""


async def look_after_studies(systems: Systems, start_reading: StartReading) -> None:
    """Look at the studies that are due, a few at a time, for ever; a slow one holds up none of the others."""
    looking = Looking(systems, start_reading)
    async with asyncio.TaskGroup() as group:
        going_on: dict[str, asyncio.Task[None]] = {}
        while True:
            going_on = {job_id: task for job_id, task in going_on.items() if not task.done()}
            try:
                due = await asyncio.to_thread(systems.arrivals.due, systems.now())
            except Exception as error:  # the store is away; what is due stays due
                telemetry.log("studies that wait not looked at", kind=type(error).__name__)
                due = []
            for job in [one for one in due if one.job_id not in going_on][: AT_ONCE - len(going_on)]:
                going_on[job.job_id] = group.create_task(looking.look(job))
            await asyncio.sleep(TURN_S)


class Looking:
    """Looks at one study at a time and decides what becomes of it."""

    def __init__(self, systems: Systems, start_reading: StartReading) -> None:
        self._systems = systems
        self._start_reading = start_reading
        self._headers = Headers(systems.pacs) if systems.pacs is not None else None

    async def look(self, job: StudyJob) -> None:
        """Look at a job that is due: start it, wait on, conclude it, or note that what came changes nothing."""
        try:
            if job.state == "accepted":
                await self._start_reading(job)
                await self._settle(job, job.state, None)
            elif job.state == "failed":
                await self._try_again(job)
            elif job.state == "waiting":
                await self._decide(job)
            else:
                await self._weigh_change(job)
        except Exception as error:  # one study must not hold up the others; it is looked at again
            kind = type(error).__name__
            telemetry.log("study not looked at", job_id=job.job_id, state=job.state, kind=kind)
            await self._look_later(job, error)

    async def _look_later(self, job: StudyJob, error: Exception) -> None:
        text = str(error) if isinstance(error, ConnectorError) else f"unexpected {type(error).__name__}"
        reasons = (f"its images cannot be looked at now: {text}",) if job.state == "waiting" else tuple(job.reasons)
        with contextlib.suppress(Exception):  # where the store is away the job stays due
            pause = timedelta(seconds=self._systems.settings.completeness.look_every_s * 2)
            await self._settle(job, job.state, self._systems.now() + pause, reasons)

    async def _try_again(self, job: StudyJob) -> None:
        """Read again what failed since a system was not there."""
        store, uid, key = self._systems.store, job.study_instance_uid, workflow_id(job)
        job, _ = await asyncio.to_thread(accept_study, store, uid, source="retry", key=key, now=self._systems.now())
        await self._start_reading(job)

    async def _decide(self, job: StudyJob) -> None:
        systems = self._systems
        now = systems.now()
        study, sight = await self._see(job, now)
        verdict = self._judge(job, study, sight, now)
        if verdict.action == "unmatched":  # not by headers that are remembered from before a correction
            study, sight = await self._see(job, now, anew=True)
            verdict = self._judge(job, study, sight, now)
        await self._carry_out(job, verdict, sight, study)

    def _judge(self, job: StudyJob, study: Study | None, sight: Sight, now: datetime) -> Verdict:
        marks = _mark_stable(job, sight)
        told = self._told(job, study, is_stable=marks.get("stable") == sight.images)
        return judge(sight, told, marks, self._patience(), now)

    async def _see(self, job: StudyJob, now: datetime, *, anew: bool = False) -> tuple[Study | None, Sight]:
        """The study and what it lacks. Where the PACS gives no headers, or not those of a series, only the timer can
        tell when it is complete."""
        protocols = self._systems.protocols
        try:
            study = await self._study(
                job, anew=anew, is_wanted=lambda outline: not refused_modalities(outline, protocols)
            )
            return study, await asyncio.to_thread(see_study, study, protocols, now)
        except ConnectorError as error:
            study = await self._headers.outline(job.study_instance_uid) if self._headers else None
            return study, see_outline(study, str(error))

    async def _carry_out(self, job: StudyJob, verdict: Verdict, sight: Sight, study: Study | None) -> None:
        marks = {"look": dict(verdict.marks)}
        if verdict.action == "wait":
            await self._settle(job, "waiting", verdict.look_at, verdict.reasons, marks)
        elif verdict.action == "read":
            if await self._settle(job, "accepted", self._systems.now(), (), marks):
                await self.look(self._systems.store.job(job.job_id))
        else:
            kept = self._keep(study, sight.decided) if study and sight.decided else {}
            telemetry.JOBS.labels(verdict.action).inc()
            await self._settle(job, verdict.action, None, verdict.reasons, {**marks, **kept})

    async def _weigh_change(self, job: StudyJob) -> None:
        """What came after a study was read: what matters makes it wait for another run, the rest is noted."""
        if await self._is_changed(job):
            await self._settle(job, "waiting", self._systems.now(), ("images came after it was read",), {"look": {}})
        else:
            note = "nothing: no protocol uses what came"
            await self._settle(job, job.state, self._next_late_look(job), job.reasons, note=note)

    async def _is_changed(self, job: StudyJob) -> bool:
        if not job.facts.get("study"):
            return True
        before = self._load(TypeAdapter(Study), job.facts["study"])
        try:
            study = await self._study(job, anew=True)
        except Permanent:  # no headers: any image series that is new or has grown counts
            outline = await self._headers.outline(job.study_instance_uid) if self._headers else None
            return outline is not None and count_images(outline) != count_images(before)
        return study is not None and await asyncio.to_thread(self._matters, job, before, study)

    def _next_late_look(self, job: StudyJob) -> datetime | None:
        """Where nobody tells of late images, a study is looked at again by itself, for a day and more and more seldom;
        None where somebody does, or a day is over."""
        settings, now = self._systems.settings, self._systems.now()
        if settings.pacs_watch is not None or settings.orthanc_changes is not None:
            return None
        since = now - run_started_at(job)
        return now + max(since, FIRST_LATE_LOOK) if since < LAST_LATE_LOOK else None

    def _matters(self, job: StudyJob, before: Study, study: Study) -> bool:
        """Whether the study differs from the one that was read in whose it is or, where a result was released, in an
        image that plays a role (else in any image)."""
        if (before.patient, before.accession_number) != (study.patient, study.accession_number):
            return True
        protocol = self._systems.protocols.get(job.protocol)
        if job.state != "released" or protocol is None:
            return digest_images(before) != digest_images(study)
        return changes_roles(before, study, protocol.protocol)

    async def _study(self, job: StudyJob, **how: Any) -> Study | None:
        return await self._headers.study(job.study_instance_uid, **how) if self._headers else None

    def _told(self, job: StudyJob, study: Study | None, *, is_stable: bool) -> Told:
        accession = study.accession_number if study else ""
        orders = find_own_orders(self._systems.heard, job.study_instance_uid, accession)
        complete = bool(orders) and all(order.status in COMPLETE for order in orders)
        issuers = self._systems.settings.site.issuers
        mine = [one for one in orders if study is None or not is_anothers(one, study, self._systems.heard, issuers)]
        on_hold = any(order.is_on_hold for order in mine)
        return Told(complete or is_stable, on_hold)

    def _patience(self) -> Patience:
        settings = self._systems.settings.completeness
        return Patience(settings.quiet_s, settings.longest_wait_s, settings.look_every_s)

    def _keep(self, study: Study, decided: Decided) -> dict[str, str]:
        """Keep what a reading would have kept, so that a study that was not fetched is explained all the same."""
        put = self._systems.artifacts.put
        for loaded in self._systems.protocols.values():
            put(loaded.text.encode())
        return {
            "study": put(TypeAdapter(Study).dump_json(study)).digest,
            "rules": put(TypeAdapter(Decided).dump_json(decided)).digest,
        }

    def _load(self, adapter: TypeAdapter[Any], digest: str) -> Any:
        return adapter.validate_json(self._systems.artifacts.get(digest))

    async def _settle(
        self,
        job: StudyJob,
        state: str,
        look_at: datetime | None,
        reasons: Any = (),
        facts: Any = None,
        note: str = "",
    ) -> bool:
        arrivals, now = self._systems.arrivals, self._systems.now()
        return await asyncio.to_thread(
            lambda: arrivals.settle(job, now, state=state, look_at=look_at, reasons=reasons, facts=facts, note=note)
        )


def _mark_stable(job: StudyJob, sight: Sight) -> Mapping[str, Any]:
    """The marks of the last look, with the images that the PACS has said to be stable since: those that are there when
    its event is first seen. More images make them stale until it says so again."""
    marks = dict(job.facts.get("look", {}))
    said = job.facts.get("said_stable")
    if said and marks.get("stable_event") != said:
        marks |= {"stable_event": said, "stable": sight.images}
    return marks
