"""A hospital of two sites around a running service: persons, their visits, and everything that is sent about them.

Both sites number patients and orders for themselves, so one number may be two persons. Whatever is sent is sent as a
hospital does: on one MLLP connection a site, again until it is acknowledged, sometimes twice; images in any order.
"""

import json
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import httpx
from hl7.client import MLLPClient

from deploy.hospital.chart import ROOT, chart_bundle
from deploy.hospital.ehr import RunningEhr
from deploy.hospital.pacs import RunningOrthanc
from deploy.hospital.phantom import PhantomSpec
from deploy.hospital.phantom_dicom import derived_uid
from deploy.hospital.process import LOOPBACK, free_port
from deploy.hospital.ris_process import RunningRis
from middleware.store.arrivals import ArrivalStore
from middleware.store.hearing import HearingStore
from middleware.store.queries import Store, open_engine
from middleware.store.tables import StudyJob
from tests.arrivals import changed, read, store_in, until
from tests.commands import Ended, run_wetread
from tests.crash.small_study import SmallStudy
from tests.hl7_inbox import order_segments
from tests.proxy import Proxy
from tests.serving import Service

SITES = ("SITEA", "SITEB")
EHR_ROOTS = {"SITEA": f"{ROOT}.71", "SITEB": f"{ROOT}.72"}
"""Both sites keep their patients in one EHR, each under identifier systems of its own."""
ISSUERS = [[site, f"{root}.1"] for site, root in EHR_ROOTS.items()]
FAMILY = "Canaryson"
"""Of every patient; no log line may hold it."""
WITHIN_S = 300.0
"""Far more than anything takes on a machine that does nothing else."""
RESENT = 0.15
"""Share of messages that a sender sends a second time, for want of patience."""
T2W, ADC, HBV = 4, 7, 8


@dataclass(frozen=True)
class Person:
    """A patient of one site."""

    site: str
    number: str
    birth_date: date
    sex: str = "M"

    @property
    def name(self) -> str:
        return f"{FAMILY}^{self.site.title()}{self.birth_date:%j}"

    @property
    def pid(self) -> str:
        born = f"{self.birth_date:%Y%m%d}"
        return f"PID|1||{self.number}^^^{self.site}||{self.name}||{born}|{self.sex}"


@dataclass
class Expected:
    """How a study stands at the end of the day. `state` empty: nothing was read since there are no images. `reason`
    is a part of what explain says; `fetched` whether its images were ever asked for."""

    state: str = "released"
    runs: int = 1
    revisions: int = 1
    reason: str = ""
    fetched: bool = True


@dataclass
class Visit:
    """One study of one person: what the modality, the RIS and the ADT say about it."""

    day: "Day"
    person: Person
    accession: str
    study_uid: str
    instances: list[bytes]
    story: str
    expected: Expected = field(default_factory=Expected)

    @property
    def placer(self) -> str:
        """The order's number at the site that ordered it."""
        return f"P-{self.person.site}-{self.accession}"

    # What is sent

    def order(self, control: str, status: str = "", *, person: Person | None = None, control_id: str = "") -> bytes:
        """An ORM^O01 about the order; the message."""
        numbers = (self.placer, self.placer.replace("P-", "F-"), self.accession, self.study_uid)
        segments = order_segments(control, numbers, status=status)
        return self.day.tell(person or self.person, "ORM^O01", *segments, control_id=control_id)

    def adt(self, trigger: str, person: Person | None = None, *segments: str) -> bytes:
        """An ADT message about the patient; the message."""
        return self.day.tell(person or self.person, f"ADT^{trigger}", "EVN|" + trigger, *segments)

    def merge_into(self, survivor: Person) -> None:
        """The patient of this visit is another one from now on."""
        self.adt("A40", survivor, f"MRG|{self.person.number}^^^{self.person.site}")

    def images(self, instances: Sequence[bytes] | None = None) -> None:
        """Instances arrive, in bursts and any order. A middle slice comes with the last burst: until then nobody can
        take the study for complete, however slow this machine is."""
        pieces = list(self.instances if instances is None else instances)
        middle = pieces.pop(len(pieces) // 2)
        self.day.rng.shuffle(pieces)
        pieces.append(middle)
        size = self.day.rng.randint(6, 12)
        bursts = [pieces[first : first + size] for first in range(0, len(pieces), size)]
        for burst in bursts:
            self.day.pause()
            store_in(self.day.orthanc.dicomweb_url, self.study_uid, burst)

    def like(self, series: int, number: int, **values: Any) -> list[bytes]:
        """A further series, made from one there is."""
        originals = [one for one in self.instances if int(read(one).SeriesNumber) == series]
        uid = derived_uid(f"{self.study_uid}/more/{number}")
        return [
            changed(one, SeriesInstanceUID=uid, SeriesNumber=number, SOPInstanceUID=derived_uid(f"{uid}/{n}"), **values)
            for n, one in enumerate(originals)
        ]

    def announce(self) -> None:
        """Somebody says over HTTP that the study is there, until that is heard."""
        until(lambda: self.day.service.announce(self.study_uid), WITHIN_S, "the announcement")

    def decide(self, action: str) -> None:
        """A person releases or rejects the study at a terminal."""
        ended = self.day.command(action, self.study_uid, "--reason", "looked at", "--person", "dr-day")
        assert ended.code == 0, ended.said

    # What became of it

    @property
    def job(self) -> StudyJob | None:
        jobs = self.day.store.jobs_of_study(self.study_uid)
        assert len(jobs) <= 1
        return jobs[0] if jobs else None

    def is_in(self, *states: str) -> bool:
        job = self.job
        return job is not None and job.state in states

    def until(self, *states: str) -> None:
        """Wait until the job is in one of these states."""
        try:
            until(lambda: self.is_in(*states), WITHIN_S)
        except AssertionError as error:
            job = self.job
            raise AssertionError(f"not {states} but {(job.state, job.reasons) if job else 'no job'}") from error

    def until_delivered(self) -> None:
        """Wait until a result is released and nothing of it is under way."""
        self.until("released")
        job = self.job
        assert job is not None
        until(lambda: {d.state for d in self.day.store.deliveries(job_id=job.job_id)} == {"delivered"}, WITHIN_S)

    def expect(self, state: str, reason: str = "", **more: Any) -> None:
        """Say how it must stand at the end of the day."""
        self.expected = Expected(state, reason=reason, **more)


class Day:
    """The hospital: it makes visits, sends, and remembers both. Stories run in threads beside each other."""

    def __init__(
        self,
        folder: Path,
        orthanc: RunningOrthanc,
        ehr: RunningEhr,
        proxy: Proxy,
        ris: RunningRis,
        study: SmallStudy,
        seed: int,
        settings: dict[str, Any],
    ) -> None:
        self.orthanc, self.ehr, self.ris, self.study = orthanc, ehr, ris, study
        self.visits: list[Visit] = []
        self.broken_off: list[str] = []
        """Stories that did not come to their end, and why."""
        self._seed, self._own = seed, threading.local()
        self._hl7_port, self._desk = free_port(), folder / "desk"
        self._senders = {site: Sender(self._hl7_port) for site in SITES}
        self.one_command = threading.Lock()
        self._waiting_room: dict[str, set[str]] = {"wanted": set(), "there": set()}
        proxy.hold = self._must_wait
        self.service = Service(folder / "service", {**settings, "hl7_listener": {"port": self._hl7_port}})

    def start(self) -> None:
        """Start the service, and wait until it has looked at the PACS."""
        self.service.start()
        engine = open_engine(f"sqlite:///{self.service.data_dir}/wetread.sqlite")
        self.store, self.heard = Store(engine), HearingStore(engine)
        self.arrivals = ArrivalStore(engine)
        self._desk.mkdir(exist_ok=True)
        shutil.copy(self.service.folder / "wetread.yaml", self._desk)

    # Persons and visits

    def begin_story(self, number: int, name: str) -> None:
        """What this thread tells from now on is a story of its own: its chances and numbers hang on nothing else."""
        self._own.name = name
        self._own.rng = random.Random(f"{self._seed}/{number}")
        self._own.numbers = iter(range(100 * number, 100 * number + 100))

    @property
    def rng(self) -> random.Random:
        rng: random.Random = self._own.rng
        return rng

    def _next_number(self) -> int:
        return next(self._own.numbers)

    def person(self, site: str = "", number: str = "", **more: Any) -> Person:
        """Somebody new; at `site` and of `number` where given."""
        n = self._next_number()
        born = date(1940 + n % 30, 1 + n % 12, 1 + n % 28)
        site = site or self.rng.choice(SITES)
        return Person(site, number or f"MRN{470_000 + n}", born, **more)

    def visit(
        self,
        person: Person | None = None,
        accession: str = "",
        *,
        chart: Person | None = None,
        is_ordered: bool = True,
        **images: Any,
    ) -> Visit:
        """A study to come, its patient's chart (as of `chart`, where the EHR has something else) in the EHR. `images`
        are further values of its instances."""
        person = person or self.person()
        n = self._next_number()
        copy = self.study.copy(f"day-{n}")
        accession = accession or f"ACC{n:05d}"
        values = {
            "PatientID": person.number,
            "IssuerOfPatientID": person.site,
            "PatientName": person.name,
            "PatientBirthDate": f"{person.birth_date:%Y%m%d}",
            "PatientSex": person.sex,
            "AccessionNumber": accession,
            **images,
        }
        instances = [changed(one, **values) for one in copy.instances]
        visit = Visit(self, person, accession, copy.study_uid, instances, self._own.name)
        self._admit(chart or person, accession, is_ordered)
        self.visits.append(visit)
        return visit

    def _admit(self, person: Person, accession: str, is_ordered: bool) -> None:
        spec = replace(
            PhantomSpec(),
            patient_id=person.number,
            patient_name=person.name,
            birth_date=person.birth_date,
            sex=person.sex,
            accession=accession,
        )
        chart = json.dumps(chart_bundle(spec, with_order=is_ordered)).replace(f"{ROOT}.", f"{EHR_ROOTS[person.site]}.")
        chart = chart.replace(f"-{accession}", f"-{person.site}-{accession}")  # order numbers, as messages tell them
        answer = httpx.post(self.ehr.url, content=chart, headers=FHIR_JSON, trust_env=False, timeout=60)
        answer.raise_for_status()

    def due(self) -> list[StudyJob]:
        """Jobs whose images are to be looked at."""
        return self.arrivals.due(datetime.now(UTC))

    # Sending

    def pause(self) -> None:
        """A moment in which others go on."""
        time.sleep(self.rng.uniform(0.0, 0.3))

    def tell(self, person: Person, kind: str, *segments: str, control_id: str = "") -> bytes:
        """One message of the person's site, acknowledged; sometimes sent a second time. The message."""
        self.pause()
        control_id = control_id or f"{person.site}-{self._next_number()}"
        head = f"MSH|^~\\&|RIS|{person.site}|WETREAD|AI|20260304103000+0000||{kind}|{control_id}|P|2.5.1"
        event = [one for one in segments if one.startswith("EVN")]
        rest = [one for one in segments if one not in event]
        raw = "\r".join((head, *event, person.pid, *rest, "")).encode()
        for _ in range(2 if self.rng.random() < RESENT else 1):
            self.send(person.site, raw)
        return raw

    def send(self, site: str, raw: bytes) -> None:
        """Send a message on the site's connection until it is acknowledged."""
        self._senders[site].send(raw)

    def command(self, *arguments: str) -> Ended:
        """Run `wetread` beside the service, on its settings."""
        with self.one_command:
            return run_wetread(self._desk, *arguments)

    # In the middle of a reading

    @contextmanager
    def in_the_middle(self, visit: Visit) -> Iterator[Callable[[], None]]:
        """While the block runs, no reading of the patient's study gets from the identity gate to the model: the EHR is
        slow to answer. What it gives waits until the reading is there."""
        patient = self._patient_reference(visit.person)
        self._waiting_room["wanted"].add(patient)
        try:
            yield lambda: until(lambda: patient in self._waiting_room["there"], WITHIN_S, "the reading")
        finally:
            self._waiting_room["wanted"].discard(patient)

    def _must_wait(self, target: str) -> bool:
        """Whether a request to the EHR has to wait: the search for priors is the first one behind the gate."""
        is_search = "/ImagingStudy?patient=" in target
        waiting = {patient for patient in self._waiting_room["wanted"] if is_search and f"{patient}&" in target}
        self._waiting_room["there"] |= waiting
        return bool(waiting)

    def _patient_reference(self, person: Person) -> str:
        token = f"{EHR_ROOTS[person.site]}.1|{person.number}"
        found = httpx.get(f"{self.ehr.url}/Patient", params={"identifier": token}, trust_env=False, timeout=30)
        (entry,) = found.json()["entry"]
        return f"Patient%2F{entry['resource']['id']}"

    def is_merged(self, person: Person) -> bool:
        """Whether the merge was applied."""
        return self.heard.was_merged_away(person.number, person.site)


FHIR_JSON = {"Content-Type": "application/fhir+json"}


class Sender:
    """One site's interface engine: one connection, in order, each message until it is acknowledged."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._turn = threading.Lock()
        self._client: MLLPClient | None = None

    def send(self, raw: bytes) -> None:
        """Send one message, on a new connection where the old one is gone."""
        with self._turn:
            until(lambda: self._try(raw), WITHIN_S, "an acknowledgement")

    def _try(self, raw: bytes) -> bool:
        try:
            if self._client is None:
                self._client = MLLPClient(LOOPBACK, self._port)
                self._client.socket.settimeout(30)
            answer: bytes = self._client.send_message(raw)
        except OSError:
            answer = b""
        if b"\rMSA|AA|" not in answer:
            self._client = None
        return b"\rMSA|AA|" in answer
