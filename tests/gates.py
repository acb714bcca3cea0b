"""A hospital around the running service in which a test can speak while a study is being read: its model waits behind
a gate, its EHR sits behind a proxy, and it hears HL7."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pydicom
from hl7.client import MLLPClient
from sqlmodel import Session, select

from deploy.hospital.ehr import RunningEhr, start_fallback
from deploy.hospital.pacs import RunningOrthanc
from deploy.hospital.process import LOOPBACK, free_port
from deploy.hospital.ris_process import RunningRis, start_ris
from deploy.triton.bundled import BundledTriton
from middleware.store.heard import HeardMessage
from middleware.store.queries import open_engine
from middleware.store.tables import StudyJob
from tests.arrivals import Watching, changed, count_in, store_in, until
from tests.commands import Ended, run_wetread
from tests.crash.small_study import Copy, build_small_truth
from tests.fixtures.triton_truth import gate_of
from tests.proxy import Proxy, open_proxy


@dataclass
class Hospital:
    """The service as `site`, with the systems around it. Nothing reads by itself: studies are announced."""

    site: Watching
    orthanc: RunningOrthanc
    ehr: RunningEhr
    proxy: Proxy
    ris: RunningRis
    gate: Path
    hl7_port: int

    def run(self, *arguments: object, **more: str) -> Ended:
        """A command beside the service, on its settings."""
        folder = self.site.service.folder
        return run_wetread(folder / "beside", *arguments, WETREAD_CONFIG=str(folder / "wetread.yaml"), **more)

    def admit(self, fresh: Copy, *, chart: dict[str, Any] | None = None) -> Copy:
        """Give a copy to the PACS, and its chart to the EHR."""
        store_in(self.orthanc.dicomweb_url, fresh.study_uid, fresh.instances)
        self.tell_ehr(chart or fresh.chart)
        return fresh

    def tell_ehr(self, bundle: dict[str, Any]) -> None:
        """Store a transaction."""
        httpx.post(self.ehr.url, json=bundle, trust_env=False, timeout=60).raise_for_status()

    def find_in_ehr(self, kind: str, **query: str) -> list[dict[str, Any]]:
        """Resources of the EHR."""
        answer = httpx.get(f"{self.ehr.url}/{kind}", params=query, trust_env=False, timeout=60)
        return [entry["resource"] for entry in answer.json().get("entry", [])]

    def put_in_ehr(self, resource: dict[str, Any]) -> None:
        """Update a resource."""
        url = f"{self.ehr.url}/{resource['resourceType']}/{resource['id']}"
        httpx.put(url, json=resource, trust_env=False, timeout=60).raise_for_status()

    def hear(self, raw: bytes) -> HeardMessage:
        """Send an HL7 message and wait until it was applied or refused."""
        with MLLPClient(LOOPBACK, self.hl7_port) as client:
            client.send_message(raw)
        engine = open_engine(f"sqlite:///{self.site.service.data_dir}/wetread.sqlite")

        def applied() -> HeardMessage | None:
            with Session(engine) as session:
                query = select(HeardMessage).where(HeardMessage.raw == raw, HeardMessage.state != "received")
                return session.exec(query).first()

        found: HeardMessage = until(applied, what="applying a message")
        engine.dispose()
        return found

    def read(self, fresh: Copy, *states: str, runs: int = 0) -> StudyJob:
        """The job of an announced study once its reading has ended."""
        answer = self.site.service.announce(fresh.study_uid)
        assert answer is not None
        assert answer.status_code == 202, answer.text
        return self.site.settled(fresh.study_uid, *states, runs=runs, within_s=90)

    @contextmanager
    def while_reading(self, fresh: Copy) -> Iterator[None]:
        """The block runs after the study was fetched and its identity checked, before its model answers."""
        self.gate.touch()
        try:
            self.site.service.announce(fresh.study_uid)
            until(lambda: "priors" in self.site.steps(fresh.study_uid), 60, "the first part of the reading")
            yield
        finally:
            self.gate.unlink()

    def delivery_states(self, job_id: str, *destinations: str) -> set[str]:
        """The states of a job's deliveries to these destinations now."""
        return {d.state for d in self.site.store.deliveries(job_id=job_id) if d.destination in destinations}

    def settle_deliveries(self, job_id: str) -> dict[str, set[str]]:
        """The states of a job's deliveries by destination, once none is under way."""

        def settled() -> dict[str, set[str]] | None:
            states: dict[str, set[str]] = {}
            for each in self.site.store.deliveries(job_id=job_id):
                states.setdefault(each.destination, set()).add(each.state)
            done = {"delivered", "dead", "ambiguous"}
            return states if states and all(some <= done for some in states.values()) else None

        found: dict[str, set[str]] = until(settled, 90, "delivering")
        return found

    def assert_nothing_left(self, fresh: Copy) -> None:
        """No system got anything about the study, and nothing is planned."""
        job = self.site.job(fresh.study_uid)
        assert job is not None
        time.sleep(0.5)
        assert self.site.store.deliveries(job_id=job.job_id) == []
        assert count_in(self.orthanc, fresh.study_uid) == len(fresh.instances)
        assert not [m for m in self.ris.received() if fresh.study_uid in str(m) or fresh.spec.accession in str(m)]
        reports = str(self.find_in_ehr("DiagnosticReport"))
        assert job.job_id not in reports
        assert fresh.study_uid not in reports

    def correct_images(self, fresh: Copy, **values: Any) -> None:
        """The PACS corrects all images of a study: the same instances with other values."""
        with httpx.Client(base_url=self.orthanc.http_url, trust_env=False, timeout=30) as http:
            query = {"Level": "Study", "Query": {"StudyInstanceUID": fresh.study_uid}}
            for found in http.post("/tools/find", json=query).json():
                http.delete(f"/studies/{found}").raise_for_status()
        store_in(self.orthanc.dicomweb_url, fresh.study_uid, [changed(one, **values) for one in fresh.instances])

    def artifact(self, job: StudyJob, name: str, revision: int = 1) -> bytes:
        """The bytes of an artifact as they were released."""
        (record,) = [a for a in self.site.store.artifacts(job.job_id, revision) if a.name == name]
        (file,) = (self.site.service.data_dir / "artifacts").rglob(f"*{record.digest}*")
        return file.read_bytes()

    def report_text(self, job: StudyJob, revision: int = 1) -> str:
        """The text draft on one line."""
        return " ".join(self.artifact(job, "report.txt", revision).decode().split())

    def sr_text(self, job: StudyJob, revision: int = 1) -> str:
        """Every text that the SR holds."""
        report = pydicom.dcmread(BytesIO(self.artifact(job, "sr.dcm", revision)))
        return " ".join(str(item.value) for item in report.iterall() if item.keyword == "TextValue")


@contextmanager
def open_hospital(
    folder: Path, orthanc: RunningOrthanc, models: Path | None = None, **settings: Any
) -> Iterator[Hospital]:
    """Start everything around an Orthanc; `models` is a truth repository (default: of the small study)."""
    models = models or build_small_truth(folder / "models")
    hl7_port = free_port()
    with (
        BundledTriton(models) as triton,
        start_fallback(folder / "ehr") as ehr,
        open_proxy(ehr.url.removesuffix("/fhir")) as proxy,
        start_ris(folder / "ris") as ris,
    ):
        given = {
            "ehr": {"url": f"{proxy.url}/fhir"},
            "ris": {"host": LOOPBACK, "port": ris.port},
            "triton": {"url": triton.grpc_url},
            "hl7_listener": {"port": hl7_port},
            # Our own results are news to it; orders find studies as they do with a site's own settings.
            "pacs_watch": {"interval_s": 0.5, "look_back_every_s": 5.0, "look_back_days": 20000},
        }
        site = Watching(folder / "site", orthanc, **{**given, **settings})
        site.start()
        yield Hospital(site, orthanc, ehr, proxy, ris, gate_of(models), hl7_port)
        site.stop()
