"""A service that watches a real Orthanc, and studies that arrive there bit by bit."""

import asyncio
import time
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pydicom
from sqlmodel import Session

from connectors.dicomweb.client import DicomwebClient
from connectors.dicomweb.config import DicomwebConfig
from deploy.hospital.pacs import RunningOrthanc
from middleware.store.arrivals import ArrivalStore
from middleware.store.queries import Store, open_engine
from middleware.store.tables import SeenStudy, StudyEvent, StudyJob
from tests.serving import Service

QUIET_S, LONGEST_WAIT_S = 1.0, 4.0
BUSY = ("waiting", "accepted", "reading")


def until(look: Callable[[], Any], within_s: float = 40.0, what: str = "it") -> Any:
    """What `look` gives as soon as it is anything."""
    deadline = time.monotonic() + within_s
    while not (found := look()):
        assert time.monotonic() < deadline, f"{what} did not happen in time"
        time.sleep(0.05)
    return found


class Watching:
    """The service with its store; `send` brings instances to its PACS."""

    def __init__(self, folder: Path, orthanc: RunningOrthanc, **settings: Any) -> None:
        self.orthanc = orthanc
        quick = {"quiet_s": QUIET_S, "longest_wait_s": LONGEST_WAIT_S, "look_every_s": 0.2}
        given = {
            "pacs": {"url": orthanc.dicomweb_url},
            "pacs_watch": {"interval_s": 0.3, "look_back_every_s": 2.0, "look_back_days": 20000},
            "completeness": quick,
            "retry": {"attempts": 5, "first_wait_s": 0.1, "longest_wait_s": 0.5},
            "deliver": {to: {"first_wait_s": 0.1, "longest_wait_s": 0.5} for to in ("pacs", "ehr", "ris")},
        }
        self.service = Service(folder, {**given, **settings})

    def start(self, source: str = "pacs", **environment: str) -> None:
        """Start it, and wait until it has looked once at where it hears from (`source`, if any)."""
        self.service.start(**environment)
        self.engine = open_engine(f"sqlite:///{self.service.data_dir}/wetread.sqlite")
        self.store, self.arrivals = Store(self.engine), ArrivalStore(self.engine)
        until(lambda: not source or self.arrivals.watermark(source), what="the first look")

    def stop(self) -> None:
        """Stop it; its log holds no traceback."""
        assert self.service.stop() == 0, self.service.log()[-3000:]
        assert "Traceback" not in self.service.log()

    def send(self, study_uid: str, instances: Sequence[bytes]) -> None:
        """Store instances in the PACS."""
        store_in(self.orthanc.dicomweb_url, study_uid, instances)

    def job(self, study_uid: str) -> StudyJob | None:
        """The study's only job."""
        jobs = self.store.jobs_of_study(study_uid)
        assert len(jobs) <= 1
        return jobs[0] if jobs else None

    def events(self, study_uid: str) -> list[StudyEvent]:
        """What was heard of it, oldest first."""
        job = self.job(study_uid)
        return self.store.events_of_job(job.job_id) if job else []

    def instances_seen(self, study_uid: str) -> int:
        """How many instances the watch knows the PACS to have of a study."""
        with Session(self.engine) as session:
            row = session.get(SeenStudy, study_uid)
            return row.instances if row else 0

    def steps(self, study_uid: str) -> list[str]:
        """The steps that ran, in order."""
        job = self.job(study_uid)
        return [run.step for run in self.store.step_runs(job.job_id)] if job else []

    def settled(self, study_uid: str, *states: str, runs: int = 0, within_s: float = 40.0) -> StudyJob:
        """The job once it is in one of `states` (default: any in which nothing goes on), after so many runs."""

        def look() -> StudyJob | None:
            job = self.job(study_uid)
            if job is None or (job.state not in states if states else job.state in BUSY):
                return None
            return job if job.facts.get("run", 1) >= runs else None

        try:
            found: StudyJob = until(look, within_s)
        except AssertionError as error:
            job = self.job(study_uid)
            known = (job.state, job.reasons, job.facts) if job else None
            raise AssertionError(f"{known}\n{self.service.log()[-2000:]}") from error
        return found


def store_in(dicomweb_url: str, study_uid: str, instances: Sequence[bytes]) -> None:
    """STOW instances."""

    async def store() -> None:
        pacs = DicomwebClient(DicomwebConfig(url=dicomweb_url))
        outcomes = await pacs.store(list(instances), study_uid)
        await pacs.aclose()
        assert all(outcome.stored for outcome in outcomes)

    asyncio.run(store())


def count_in(orthanc: RunningOrthanc, study_uid: str) -> int:
    """How many instances of a study the PACS has."""
    answer = httpx.get(f"{orthanc.dicomweb_url}/studies/{study_uid}/instances", trust_env=False, timeout=30)
    return len(answer.json()) if answer.status_code == 200 else 0


def of_series(instances: Sequence[bytes], number: int) -> list[bytes]:
    """Those of the series with this number."""
    return [one for one in instances if int(read(one).SeriesNumber) == number]


def read(instance: bytes) -> pydicom.Dataset:
    """The instance's data set."""
    return pydicom.dcmread(BytesIO(instance))


def changed(instance: bytes, **values: Any) -> bytes:
    """The instance with other values."""
    dataset = read(instance)
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    if "SOPInstanceUID" in values:
        dataset.file_meta.MediaStorageSOPInstanceUID = values["SOPInstanceUID"]
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()
