"""What is no longer needed is removed, by the site's policy: images in the spool, artifacts, the text of messages, the
workflow engine's history, events. What a delivery, a person, a comparison or an explanation still needs stays.
"""

import asyncio
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from dbos import DBOSClient

from middleware import telemetry
from middleware.bootstrap import open_history, prepare_data_dir
from middleware.settings import Settings
from middleware.store.artifacts import FRESH, ArtifactStore
from middleware.store.queries import Store, open_engine
from middleware.store.retention import BATCH, UNFINISHED, RetentionStore
from middleware.store.tables import StudyJob
from middleware.systems import Systems

FIRST_AFTER_S = 60.0
ARTIFACTS_EVERY = timedelta(days=1)
"""Looking through a large artifact store takes long; it grows slowly."""
ENDED_WORKFLOWS = ["SUCCESS", "ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED"]


@dataclass(frozen=True)
class Pruned:
    """How much of one kind was removed (or would be): `count` of them, `size_bytes` where that is known."""

    what: str
    count: int
    size_bytes: int = 0


@dataclass(frozen=True)
class Pruning:
    """One pruning: the policy at this moment on these stores. A dry run removes nothing."""

    settings: Settings
    store: RetentionStore
    artifacts: ArtifactStore
    now: datetime
    dry_run: bool = False

    def prune_spool(self) -> Pruned:
        """Images of runs that ended long enough ago, of runs that another one replaced, and of jobs that nobody knows.
        This process' own spool: each prunes its own."""
        folders = list(self._old_spools(self._ago(hours=self.settings.retention.spool_hours)))
        size = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
        for folder in folders if not self.dry_run else ():
            shutil.rmtree(folder, ignore_errors=True)
        return Pruned("spool folders", len(folders), size)

    def _old_spools(self, before: datetime) -> Iterator[Path]:
        spool = self.settings.data_dir / "spool"
        folders = [f for f in spool.iterdir() if f.is_dir()] if spool.is_dir() else []
        for first in range(0, len(folders), BATCH):
            jobs = self.store.jobs({_job_of(folder) for folder in folders[first : first + BATCH]})
            for folder in folders[first : first + BATCH]:
                job = jobs.get(_job_of(folder))
                if _is_spool_over(job) and _changed_at(job, folder) < before:
                    yield folder

    def prune_artifacts(self) -> Pruned:
        """What nobody needs and was made long enough ago; nothing that a reading may have made that still goes on."""
        policy = self.settings.retention
        before = self._ago(days=policy.artifacts_days)
        released_before = None if policy.released_days is None else self._ago(days=policy.released_days)
        needed = self.store.needed(before, released_before)
        began = self.store.unfinished_since()
        if began is not None:
            before = min(before, began - 2 * FRESH)
        found = list(self.artifacts.find_unneeded(before, needed))
        for path, _ in found if not self.dry_run else ():
            self.artifacts.remove(path)
        return Pruned("artifacts", len(found), sum(size for _, size in found))

    def prune_rows(self) -> list[Pruned]:
        """Messages' text, events and step times."""
        policy, dry = self.settings.retention, self.dry_run
        events_before = self._ago(days=policy.events_days)
        return [
            Pruned("message texts", self.store.empty_messages(self._ago(days=policy.inbox_days), dry_run=dry)),
            Pruned("events", self.store.remove_events(events_before, dry_run=dry)),
            Pruned("step times", self.store.remove_step_runs(events_before, dry_run=dry)),
            Pruned("workers that are gone", self.store.remove_workers(self._ago(days=30), dry_run=dry)),
        ]

    def prune_history(self, history: DBOSClient) -> Pruned:
        """The workflow engine's records of what ended, but for runs of jobs that go on."""
        until = self._ago(days=self.settings.retention.workflow_days).isoformat()
        count, offset = 0, 0
        while True:
            found = history.list_workflows(
                status=ENDED_WORKFLOWS,
                completed_before=until,
                limit=BATCH,
                offset=offset,
                load_input=False,
                load_output=False,
            )
            ids = [workflow.workflow_id for workflow in found]
            jobs = self.store.jobs({uid.partition("/")[0] for uid in ids})
            going_on = {job_id for job_id, job in jobs.items() if job.state in UNFINISHED}
            old = [uid for uid in ids if uid.partition("/")[0] not in going_on]
            if old and not self.dry_run:
                history.delete_workflows(old)
            count += len(old)
            offset += len(ids) if self.dry_run else len(ids) - len(old)
            if len(ids) < BATCH:
                return Pruned("ended workflows", count)

    def _ago(self, **how_long: float) -> datetime:
        return self.now - timedelta(**how_long)


def _job_of(folder: Path) -> str:
    return folder.name.partition(".")[0]


def _is_spool_over(job: StudyJob | None) -> bool:
    """Whether no run of the job needs what it fetched. One that is held may be released any time."""
    return job is None or job.state not in (*UNFINISHED, "held")


def _changed_at(job: StudyJob | None, folder: Path) -> datetime:
    return job.updated_at if job else datetime.fromtimestamp(folder.stat().st_mtime).astimezone()


def prune_all(settings: Settings, *, dry_run: bool) -> list[Pruned]:
    """Prune everything once, whoever else may have done so lately."""
    prepare_data_dir(settings)
    engine = open_engine(settings.store_url)
    Store(engine)  # makes the tables where there are none yet
    now, artifacts = datetime.now().astimezone(), ArtifactStore(settings.artifacts_place)
    pruning = Pruning(settings, RetentionStore(engine), artifacts, now, dry_run)
    done = [pruning.prune_spool(), pruning.prune_artifacts(), *pruning.prune_rows()]
    with open_history(settings) as history:
        return done if history is None else [*done, pruning.prune_history(history)]


async def prune_forever(systems: Systems) -> None:
    """Prune now and then: the spool in every process, all else in whichever comes first."""
    pause_s = systems.settings.retention.every_hours * 3600
    await asyncio.sleep(min(FIRST_AFTER_S, pause_s))
    while True:
        try:
            await asyncio.to_thread(_prune_in_turn, systems)
        except Exception as error:  # the store is away; it is tried again
            telemetry.log("not pruned", source="retention", kind=type(error).__name__)
        await asyncio.sleep(pause_s)


def _prune_in_turn(systems: Systems) -> None:
    settings, now, store = systems.settings, systems.now(), systems.retention
    pruning = Pruning(settings, store, systems.artifacts, now)
    done = [pruning.prune_spool()]
    if store.claim_turn("prune", now, now - timedelta(hours=settings.retention.every_hours * 0.9)):
        done += pruning.prune_rows()
        with open_history(settings) as history:
            done += [pruning.prune_history(history)] if history else []
    if store.claim_turn("prune-artifacts", now, now - ARTIFACTS_EVERY):
        done.append(pruning.prune_artifacts())
    for each in done:
        if each.count:
            telemetry.log("pruned", source="retention", kind=each.what, count=each.count)
