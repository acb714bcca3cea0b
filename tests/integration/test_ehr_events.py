"""The running service hears from a real EHR: what is created in HAPI ends in the inbox once, whatever happens to
callbacks, subscriptions and the service."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from sqlmodel import Session, col, select

from deploy.hospital.ehr import RunningEhr
from deploy.hospital.process import LOOPBACK, free_port
from middleware.store.heard import HeardMessage, OrderRecord, PatientRecord
from middleware.store.queries import open_engine
from tests.serving import Service

Json = dict[str, Any]

TOKEN = "the-token-of-the-callback-1"
MRN = "urn:oid:1.2.840.99999.1"
CANARIES = ("Canary", "Karla", "19610203")


class Hospital:
    """HAPI, and the service that hears from it."""

    def __init__(self, folder: Path, ehr: RunningEhr, **settings: Any) -> None:
        self.url = ehr.url
        self.http = httpx.Client(base_url=f"{ehr.url}/", timeout=60, trust_env=False)
        self.service = Service(folder, self._settings(ehr, settings, folder))
        self.engine = open_engine(f"sqlite:///{self.service.data_dir}/wetread.sqlite")

    @property
    def callback(self) -> str:
        return f"{self.service.api}/fhir/notifications"

    def _settings(self, ehr: RunningEhr, settings: Json, folder: Path) -> Json:
        pacs = folder.parent / f"{folder.name}-pacs"
        pacs.mkdir()
        return {
            "pacs": {"folder": str(pacs)},
            "triton": {"url": f"{LOOPBACK}:{free_port()}"},
            "retry": {"attempts": 1, "first_wait_s": 0.1, "longest_wait_s": 1.0},
            "hl7_listener": {"port": free_port()},
            "ehr": {"url": ehr.url, "patient_identifier_system": MRN},
        } | {"ehr_events": {"callback_url": "http://x/fhir/notifications", "poll_s": 600, "check_s": 600, **settings}}

    def start(self) -> None:
        address = {"WETREAD_EHR_EVENTS__CALLBACK_URL": self.callback, "WETREAD_EHR_EVENTS__TOKEN": TOKEN}
        self.service.start("tests.hearing_service:main", **address)

    def create(self, resource: Json) -> Json:
        answer = self.http.post(resource["resourceType"], json=resource)
        assert answer.status_code == 201, answer.text
        made: Json = answer.json()
        return made

    def subscriptions(self) -> list[Json]:
        found = self.http.get("Subscription", params={"url": self.callback}).json()
        return [entry["resource"] for entry in found.get("entry", ())]

    def are_active(self) -> bool:
        return sorted(one["status"] for one in self.subscriptions()) == ["active", "active"]

    def patient(self, **more: Any) -> Json:
        identifier = {"system": MRN, "value": f"M{uuid4().hex[:10]}"}
        name = {"family": "Canary", "given": ["Karla"]}
        return self.create(
            {"resourceType": "Patient", "identifier": [identifier], "name": [name], "birthDate": "1961-02-03", **more}
        )

    def order(self, accession: str, patient: Json, **more: Any) -> Json:
        identifier = {"type": {"coding": [{"code": "ACSN"}]}, "value": accession}
        return self.create(
            {
                "resourceType": "ServiceRequest",
                "identifier": [identifier],
                "status": "active",
                "intent": "order",
                "subject": {"reference": f"Patient/{patient['id']}"},
                **more,
            }
        )

    def heard(self, resource: Json) -> list[HeardMessage]:
        """What the inbox has of a resource, once nothing of it waits to be applied."""
        name = f"{resource['resourceType']}/{resource['id']}/"
        query = select(HeardMessage).where(col(HeardMessage.control_id).startswith(name))
        with Session(self.engine) as session:
            rows = list(session.exec(query.order_by(col(HeardMessage.position))))
        return rows if all(row.state != "received" for row in rows) else []

    def order_record(self, accession: str) -> OrderRecord:
        with Session(self.engine) as session:
            return session.exec(select(OrderRecord).where(OrderRecord.accession_number == accession)).one()

    def count(self) -> int:
        with Session(self.engine) as session:
            return len(session.exec(select(HeardMessage.position)).all())


def until(look: Any, within_s: float = 30.0) -> Any:
    """What `look` gives as soon as it is anything."""
    deadline = time.monotonic() + within_s
    while not (found := look()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
    return found


def accession() -> str:
    return f"A{uuid4().hex[:12]}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, ehr: RunningEhr) -> Iterator[Hospital]:
    """A service whose polls and checks are too rare to help: what it hears, it hears by callbacks."""
    made = Hospital(tmp_path_factory.mktemp("ehr-events") / "service", ehr)
    made.start()
    until(made.are_active)
    yield made
    assert made.service.stop() == 0, made.service.log()[-2000:]
    assert not any(canary in made.service.log() for canary in CANARIES)
    assert "Traceback" not in made.service.log()


def test_order_is_heard_and_applied(site: Hospital) -> None:
    number, patient = accession(), site.patient()
    order = site.order(number, patient)
    (row,) = until(lambda: site.heard(order))
    assert (row.state, row.format, row.notes) == ("applied", "fhir", [])
    record = site.order_record(number)
    assert (record.status, record.patient_id) == ("requested", patient["identifier"][0]["value"])


@pytest.mark.parametrize(
    ("status", "expected", "held"),
    [("revoked", "cancelled", False), ("completed", "completed", False), ("on-hold", "requested", True)],
)
def test_change_of_an_order_is_heard(site: Hospital, status: str, expected: str, held: bool) -> None:
    number = accession()
    order = site.order(number, site.patient())
    until(lambda: site.heard(order))
    assert site.http.put(f"ServiceRequest/{order['id']}", json={**order, "status": status}).status_code == 200
    rows = until(lambda: len(rows := site.heard(order)) == 2 and rows)
    assert [row.control_id.rpartition("/")[2] for row in rows] == ["1", "2"]
    record = site.order_record(number)
    assert (record.status, record.is_on_hold) == (expected, held)


def test_imaging_study_tells_the_uid_of_its_order(site: Hospital) -> None:
    number, patient = accession(), site.patient()
    order = site.order(number, patient)
    until(lambda: site.heard(order))
    uid = f"2.25.{uuid4().int}"
    study = site.create(
        {
            "resourceType": "ImagingStudy",
            "status": "available",
            "identifier": [{"system": "urn:dicom:uid", "value": f"urn:oid:{uid}"}],
            "subject": {"reference": f"Patient/{patient['id']}"},
            "basedOn": [{"reference": f"ServiceRequest/{order['id']}"}],
        }
    )
    (row,) = until(lambda: site.heard(study))
    assert row.state == "applied", row.notes
    record = site.order_record(number)
    assert (record.study_instance_uid, record.status) == (uid, "in-progress")


def test_merge_of_patients_is_heard_with_the_next_reading(site: Hospital) -> None:
    stays = site.patient()
    gone = site.patient(link=[{"other": {"reference": f"Patient/{stays['id']}"}, "type": "replaced-by"}])
    order = site.order(accession(), stays)
    until(lambda: site.heard(order))
    (row,) = site.heard(gone)
    assert row.state == "applied", row.notes
    assert site.heard(stays) == []
    with Session(site.engine) as session:
        query = select(PatientRecord).where(PatientRecord.patient_id == gone["identifier"][0]["value"])
        record = session.exec(query).one()
        survivor = session.get(PatientRecord, record.merged_into)
    assert survivor is not None
    assert survivor.patient_id == stays["identifier"][0]["value"]


def test_order_whose_patient_cannot_be_told_is_kept_and_refused(site: Hospital) -> None:
    number = accession()
    order = site.order(number, site.patient(identifier=[{"system": "urn:oid:1.2.3", "value": "other"}]))
    (row,) = until(lambda: site.heard(order))
    assert row.state == "refused"
    assert not any(word in " ".join(row.notes) for word in (number, "other", *CANARIES))


# Callbacks


def test_many_callbacks_double_nothing(site: Hospital) -> None:
    order = site.order(accession(), site.patient())
    until(lambda: site.heard(order))
    before = site.count()
    for _ in range(50):
        answer = httpx.post(site.callback, headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False)
        assert (answer.status_code, answer.content) == (204, b"")
    resource = {"resourceType": "ServiceRequest", "id": "forged", "status": "active"}
    address = f"{site.callback}/ServiceRequest/forged"
    answer = httpx.put(address, json=resource, headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False)
    assert answer.status_code == 204
    latest = site.order(accession(), site.patient())
    until(lambda: site.heard(latest))
    assert site.count() == before + 1
    (row,) = site.heard(order)
    assert row.repeats == 0


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", TOKEN])
def test_forged_callback_is_refused(site: Hospital, header: str) -> None:
    before = site.service.http.get("/metrics").text
    for answer in (
        httpx.post(site.callback, headers={"Authorization": header} if header else {}, trust_env=False),
        httpx.put(f"{site.callback}/Patient/1", headers={"Authorization": header}, content=b"{}", trust_env=False),
    ):
        assert answer.status_code == 401
        assert TOKEN not in answer.text
    assert _notified(site.service.http.get("/metrics").text) == _notified(before)


def _notified(metrics: str) -> list[str]:
    return [line for line in metrics.splitlines() if "notified" in line and "fhir" in line and "created" not in line]


def test_too_large_callback_is_refused(site: Hospital) -> None:
    signed = {"Authorization": f"Bearer {TOKEN}"}
    answer = httpx.post(site.callback, headers=signed, content=b" " * (2 << 20), trust_env=False)
    assert answer.status_code == 413


def test_malformed_classic_callback_is_refused_with_a_reason(site: Hospital) -> None:
    signed = {"Authorization": f"Bearer {TOKEN}"}
    for body in (b"{", b"\xff\xfe", b"[" * 100_000):
        answer = httpx.post(site.callback, headers=signed, content=body, trust_env=False)
        assert (answer.status_code, answer.json()) == (400, {"detail": "the body is not JSON"})


# The service stops; subscriptions go


def test_what_is_created_while_the_service_is_stopped_is_heard_once(site: Hospital) -> None:
    earlier = site.order(accession(), site.patient())
    until(lambda: site.heard(earlier))
    assert site.service.stop() == 0
    numbers = [accession() for _ in range(3)]
    orders = [site.order(number, site.patient()) for number in numbers]
    before = site.count()
    site.start()
    for number, order in zip(numbers, orders, strict=True):
        (row,) = until(lambda order=order: site.heard(order))
        assert (row.state, row.repeats) == ("applied", 0)
        assert site.order_record(number).status == "requested"
    assert site.count() == before + 3
    assert len(site.heard(earlier)) == 1
    until(site.are_active)
    assert len(site.subscriptions()) == 2


@pytest.fixture
def watchful(tmp_path: Path, ehr: RunningEhr) -> Iterator[Hospital]:
    """A service that looks at its subscriptions all the time."""
    made = Hospital(tmp_path / "service", ehr, check_s=0.3)
    made.start()
    until(made.are_active)
    yield made
    assert made.service.stop() == 0
    for one in made.subscriptions():
        made.http.delete(f"Subscription/{one['id']}")


def assert_hears(site: Hospital) -> None:
    order = site.order(accession(), site.patient())
    assert until(lambda: site.heard(order))[0].state == "applied"


def _states(site: Hospital) -> list[tuple[str, list[str]]]:
    return sorted((one["status"], one["channel"]["header"]) for one in site.subscriptions())


@pytest.mark.parametrize("status", ["off", "error"])
def test_subscription_that_stopped_is_woken(watchful: Hospital, status: str) -> None:
    for one in watchful.subscriptions():
        watchful.http.put(f"Subscription/{one['id']}", json={**one, "status": status}).raise_for_status()
    until(watchful.are_active)
    assert_hears(watchful)


def test_subscription_that_is_gone_is_made_again(watchful: Hospital) -> None:
    before = {one["id"] for one in watchful.subscriptions()}
    for own in before:
        watchful.http.delete(f"Subscription/{own}").raise_for_status()
    until(watchful.are_active)
    assert not before & {one["id"] for one in watchful.subscriptions()}
    assert_hears(watchful)


def test_subscription_of_another_token_is_written_anew_and_a_second_one_turned_off(watchful: Hospital) -> None:
    one, other = watchful.subscriptions()
    stale = {**one, "channel": {**one["channel"], "header": ["Authorization: Bearer of-another-time"]}}
    watchful.http.put(f"Subscription/{one['id']}", json=stale).raise_for_status()
    surplus = watchful.create({key: value for key, value in other.items() if key not in ("id", "meta")})
    right = [("active", [f"Authorization: Bearer {TOKEN}"])] * 2
    until(lambda: [states for states in [_states(watchful)] if states[:2] == right and states[2][0] == "off"])
    watchful.http.delete(f"Subscription/{surplus['id']}")
    assert_hears(watchful)


IMAGING = {"coding": [{"system": "http://snomed.info/sct", "code": "363679005"}]}


def test_filter_narrows_what_is_heard_and_subscribed_to(tmp_path: Path, ehr: RunningEhr) -> None:
    site = Hospital(
        tmp_path / "service", ehr, filters={"ServiceRequest": "category=http://snomed.info/sct|363679005"}, check_s=0.5
    )
    site.start()
    try:
        until(site.are_active)
        other = site.order(accession(), site.patient())
        imaging = site.order(accession(), site.patient(), category=[IMAGING])
        until(lambda: site.heard(imaging))
        assert site.heard(other) == []
        assert site.are_active(), "found again by its criteria, not made twice"
    finally:
        assert site.service.stop() == 0
        for one in site.subscriptions():
            site.http.delete(f"Subscription/{one['id']}")
