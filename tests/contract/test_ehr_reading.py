"""Reading what changed in an EHR: every version once, whatever its clock, order and pages do, and whatever it refers
to. Over HTTP, with an EHR that was written from the standard."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio
from sqlmodel import Session, select

from connectors.errors import Permanent, Retryable
from connectors.fhir.client import FhirClient
from connectors.fhir.config import FhirConfig
from mappings.inputs.fhir_to_event import NumberSystems
from middleware.intake import ehr_reading
from middleware.intake.ehr_reading import EhrReader, ReadingPolicy, Stream
from middleware.store.ehr_events import EhrEventStore
from middleware.store.heard import HeardMessage
from middleware.store.hearing import Arrived, Kept
from tests.backport_server import BackportServer
from tests.hl7_inbox import POLICY, Inbox, write_order

Json = dict[str, Any]

NOW = datetime(2026, 3, 4, 10, 0, tzinfo=UTC)
STREAMS = (Stream("Patient"), Stream("ServiceRequest"), Stream("ImagingStudy"))


class Reading:
    """An EHR, an inbox, and what reads from the one into the other; `now` is our clock."""

    def __init__(self, ehr: BackportServer, fhir: FhirClient) -> None:
        self.ehr = ehr
        self.fhir = fhir
        self.now = NOW
        self.inbox = Inbox()
        self.restart()

    def restart(self, *, overlap_s: float = 300.0, name: str = "ehr") -> None:
        """Begin again with what is remembered."""
        store = EhrEventStore(self.inbox.engine)
        policy = ReadingPolicy(name, self.ehr.url, STREAMS, timedelta(seconds=overlap_s), timedelta(hours=24))
        self.reader = EhrReader(self.fhir, store, self.inbox.store, self.keep, policy, lambda: self.now)

    async def keep(self, arrived: Sequence[Arrived]) -> list[Kept]:
        return self.inbox.store.keep(arrived)

    async def catch_up(self) -> int:
        """Read, apply; how many versions were new."""
        count = await self.reader.catch_up()
        self.inbox.apply()
        return count

    def order(self, own: str, *, at: datetime | None = None, **more: Any) -> Json:
        identifier = {"type": {"coding": [{"code": "ACSN"}]}, "value": f"A-{own}"}
        subject = {"identifier": {"value": "M1"}}
        base = {"resourceType": "ServiceRequest", "id": own, "status": "active", "intent": "order"}
        return self.ehr.put({**base, "identifier": [identifier], "subject": subject, **more}, at=at or NOW)

    def rows(self) -> list[HeardMessage]:
        with Session(self.inbox.engine) as session:
            return list(session.exec(select(HeardMessage)))

    def names(self) -> list[str]:
        return [row.control_id for row in self.rows()]


@pytest_asyncio.fixture
async def reading() -> AsyncIterator[Reading]:
    ehr = BackportServer({})
    fhir = FhirClient(FhirConfig(url=ehr.url))
    yield Reading(ehr, fhir)
    await fhir.aclose()
    ehr.stop()


def searches(ehr: BackportServer, kind: str) -> list[str]:
    return [line for line in ehr.requests if line.startswith(f"GET /fhir/{kind}?")]


async def test_each_version_is_read_once(reading: Reading) -> None:
    reading.order("1")
    assert await reading.catch_up() == 1
    assert await reading.catch_up() == 0
    reading.order("1", status="revoked", at=NOW + timedelta(seconds=1))
    reading.order("2", at=NOW + timedelta(seconds=1))
    reading.restart()
    assert await reading.catch_up() == 2
    assert sorted(reading.names()) == [f"ServiceRequest/{v}" for v in ("1/_history/1", "1/_history/2", "2/_history/1")]
    assert {row.state for row in reading.rows()} == {"applied"}
    assert {row.repeats for row in reading.rows()} == {0}
    assert {order.accession_number: order.status for order in reading.inbox.orders} == {
        "A-1": "cancelled",
        "A-2": "requested",
    }


async def test_version_that_comes_again_later_changes_nothing(reading: Reading) -> None:
    first = reading.order("1")
    await reading.catch_up()
    reading.order("1", status="revoked", at=NOW + timedelta(seconds=1))
    await reading.catch_up()
    reading.ehr.resources["ServiceRequest/1"] = first
    assert await reading.catch_up() == 0
    assert reading.inbox.order.status == "cancelled"


async def test_server_that_was_restored_counts_the_same_versions_for_other_contents(reading: Reading) -> None:
    reading.order("1")
    await reading.catch_up()
    del reading.ehr.resources["ServiceRequest/1"]
    reading.order("1", priority="stat", at=NOW + timedelta(hours=1))
    assert await reading.catch_up() == 1
    assert reading.names() == ["ServiceRequest/1/_history/1"] * 2
    assert reading.rows()[1].notes == ["this control id was used before with other content"]
    assert reading.inbox.order.priority == "S"


# Clocks


async def test_first_reading_begins_a_day_before_the_latest_change(reading: Reading) -> None:
    for own, hours in (("old", 25), ("recent", 23), ("latest", 0)):
        reading.order(own, at=NOW - timedelta(days=100, hours=hours))
    await reading.catch_up()
    assert [name.split("/")[1] for name in reading.names()] == ["recent", "latest"]


async def test_ehr_that_was_empty_is_read_from_its_beginning(reading: Reading) -> None:
    assert await reading.catch_up() == 0
    for own in range(3):
        reading.order(str(own), at=NOW - timedelta(days=own * 10))
    assert await reading.catch_up() == 3


async def test_change_that_becomes_visible_late_is_read(reading: Reading) -> None:
    reading.order("1")
    await reading.catch_up()
    reading.order("2", at=NOW - timedelta(seconds=200))
    assert await reading.catch_up() == 1


@pytest.mark.parametrize("skew", [timedelta(hours=-3), timedelta(hours=3), timedelta(days=400)])
async def test_clock_that_differs_from_ours_loses_nothing(reading: Reading, skew: timedelta) -> None:
    for own in range(4):
        reading.now = NOW + timedelta(minutes=10 * own)
        reading.order(str(own), at=reading.now + skew)
        assert await reading.catch_up() == 1
    assert len(reading.names()) == 4


async def test_clock_that_ran_ahead_and_was_set_back_loses_nothing(reading: Reading) -> None:
    reading.order("1", at=NOW + timedelta(days=400))
    await reading.catch_up()
    reading.order("2", at=NOW + timedelta(minutes=1))
    assert await reading.catch_up() == 1


async def test_watermark_is_the_ehrs_time_and_survives_a_restart(reading: Reading) -> None:
    reading.order("1", at=NOW - timedelta(hours=2))
    await reading.catch_up()
    reading.restart(overlap_s=60)
    reading.ehr.requests.clear()
    await reading.catch_up()
    (line,) = searches(reading.ehr, "ServiceRequest")
    assert "_lastUpdated=ge2026-03-04T07%3A59%3A00.000Z" in line


async def test_failed_reading_moves_nothing(reading: Reading) -> None:
    reading.order("1")
    await reading.catch_up()
    reading.order("2", at=NOW + timedelta(hours=1))
    reading.ehr.down = True
    with pytest.raises(Retryable):
        await reading.catch_up()
    reading.ehr.down = False
    assert await reading.catch_up() == 1


# Many


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ehr_reading, "BATCH", 10)


@pytest.mark.usefixtures("small_batches")
async def test_many_changes_are_read_in_batches(reading: Reading) -> None:
    reading.ehr.page_size = 4
    reading.order("0", at=NOW - timedelta(hours=1))
    await reading.catch_up()
    for own in range(1, 56):
        reading.order(str(own), at=NOW + timedelta(seconds=own))
    assert await reading.catch_up() == 55
    assert [name.split("/")[1] for name in reading.names()] == [str(own) for own in range(56)]


@pytest.mark.usefixtures("small_batches")
async def test_more_changes_of_one_moment_than_a_batch_are_all_read(reading: Reading) -> None:
    for own in range(35):
        reading.order(str(own))
    reading.order("last", at=NOW + timedelta(seconds=1))
    assert await reading.catch_up() == 36


@pytest.mark.usefixtures("small_batches")
async def test_server_that_does_not_sort_is_read_whole(reading: Reading) -> None:
    reading.ehr.sorts = False
    for own in range(35):
        reading.order(str(own), at=NOW - timedelta(seconds=own))
    reading.ehr.resources["ServiceRequest/x"] = reading.ehr.resources.pop("ServiceRequest/0")
    assert await reading.catch_up() == 35


@pytest.mark.usefixtures("small_batches")
async def test_what_was_read_before_a_page_that_goes_astray_stays_read(reading: Reading) -> None:
    for own in range(12):
        reading.order(str(own), at=NOW + timedelta(seconds=own))
    reading.ehr.page_size = 5
    reading.ehr.next_link = "http://192.0.2.1/fhir/ServiceRequest"
    with pytest.raises(Permanent):
        await reading.catch_up()
    assert reading.names() == []
    reading.ehr.next_link = ""
    assert await reading.catch_up() == 12


# What a resource refers to


def new_patient(own: str, value: str, **more: Any) -> Json:
    return {"resourceType": "Patient", "id": own, "identifier": [{"value": value, "system": "urn:mrn"}], **more}


async def test_patients_are_read_with_the_orders_that_name_them(reading: Reading) -> None:
    for own in range(90):
        reading.ehr.put(new_patient(f"p{own}", f"M{own}"), at=NOW)
        reading.order(str(own), subject={"reference": f"Patient/p{own}"}, at=NOW)
    reading.ehr.requests.clear()
    assert await reading.catch_up() == 90
    assert {order.patient_id for order in reading.inbox.orders} == {f"M{own}" for own in range(90)}
    assert len([line for line in searches(reading.ehr, "Patient") if "_id" in line]) == 3


@pytest.mark.parametrize(
    ("reference", "is_followed"),
    [
        ("Patient/p1", True),
        ("Patient/p1/_history/7", True),
        ("OWN/Patient/p1", True),
        ("https://elsewhere.example/fhir/Patient/p1", False),
        ("OWN-not/Patient/p1", False),
        ("Patient/p1,p2", False),
        ("Patient/../p1", False),
        ("Group/p1", False),
        ("#p1", False),
        ("urn:uuid:p1", False),
        ("", False),
    ],
)
async def test_only_the_ehrs_own_patients_are_followed(reading: Reading, reference: str, is_followed: bool) -> None:
    reading.ehr.put(new_patient("p1", "M1"), at=NOW)
    reading.order("1", subject={"reference": reference.replace("OWN", reading.ehr.url)})
    await reading.catch_up()
    (row,) = reading.rows()
    assert row.state == ("applied" if is_followed else "refused"), row.notes
    assert [order.patient_id for order in reading.inbox.orders] == (["M1"] if is_followed else [])


async def test_patient_that_changes_does_not_make_the_order_new(reading: Reading) -> None:
    reading.ehr.put(new_patient("p1", "M1"), at=NOW)
    reading.order("1", subject={"reference": "Patient/p1"})
    await reading.catch_up()
    reading.ehr.put(new_patient("p1", "M1", gender="female"), at=NOW + timedelta(seconds=1))
    assert await reading.catch_up() == 0


async def test_of_patients_only_merges_are_read(reading: Reading) -> None:
    reading.ehr.put(new_patient("p1", "M1"), at=NOW)
    link = {"other": {"reference": "Patient/p1"}, "type": "replaced-by"}
    reading.ehr.put(new_patient("p2", "M2", link=[link]), at=NOW)
    assert await reading.catch_up() == 1
    merged = reading.inbox.patients["M2"]
    assert merged.merged_into == reading.inbox.patients["M1"].patient_key


async def test_study_and_order_of_a_merged_patient_are_one(reading: Reading) -> None:
    """The order is known for the patient that was merged away; the study comes for the one that stays."""
    reading.ehr.put(new_patient("p1", "M1"), at=NOW)
    reading.ehr.put(new_patient("p2", "M2"), at=NOW)
    reading.order("1", subject={"reference": "Patient/p2"})
    await reading.catch_up()
    link = {"other": {"reference": "Patient/p1"}, "type": "replaced-by"}
    reading.ehr.put(new_patient("p2", "M2", link=[link]), at=NOW)
    uid = {"system": "urn:dicom:uid", "value": "urn:oid:1.2.3"}
    study = {"resourceType": "ImagingStudy", "status": "available", "identifier": [uid]}
    based_on = {"subject": {"reference": "Patient/p1"}, "basedOn": [{"reference": "ServiceRequest/1"}]}
    reading.ehr.put({**study, **based_on}, at=NOW)
    await reading.catch_up()
    assert {row.state for row in reading.rows()} == {"applied"}, [row.notes for row in reading.rows()]
    assert (reading.inbox.order.accession_number, reading.inbox.order.study_instance_uid) == ("A-1", "1.2.3")


# Beside HL7


def hear_hl7(reading: Reading, control: str, status: str = "") -> None:
    heard = reading.inbox.hear(write_order(f"m-{control}", control, ("P1", "", "A-1", ""), status=status))
    assert heard.state == "applied", heard.notes


async def test_order_of_both_is_one_and_never_goes_back(reading: Reading) -> None:
    reading.inbox = Inbox(replace(POLICY, number_systems=NumberSystems(patient="urn:mrn")))
    reading.restart()
    hear_hl7(reading, "NW")
    reading.ehr.put(new_patient("p1", "4711"), at=NOW)
    reading.order("1", subject={"reference": "Patient/p1"}, priority="stat")
    await reading.catch_up()
    assert (reading.inbox.order.placer_order_number, reading.inbox.order.priority) == ("P1", "S")
    hear_hl7(reading, "SC", status="CM")
    reading.order("1", subject={"reference": "Patient/p1"}, at=NOW + timedelta(seconds=1))
    await reading.catch_up()
    assert reading.inbox.order.status == "completed"


async def test_order_that_hl7_knows_for_another_patient_is_refused(reading: Reading) -> None:
    hear_hl7(reading, "NW")
    reading.order("1", subject={"identifier": {"value": "4712"}})
    await reading.catch_up()
    assert [row.state for row in reading.rows()] == ["applied", "refused"]
    assert reading.inbox.order.patient_id == "4711"


# By name


async def test_resources_are_read_by_their_names(reading: Reading) -> None:
    reading.order("1", at=NOW - timedelta(days=900))
    reading.ehr.put({"resourceType": "Observation", "id": "1"}, at=NOW)
    await reading.reader.read_named(["ServiceRequest/1", "ServiceRequest/none", "Observation/1", "x", "a/b/c"])
    assert reading.names() == ["ServiceRequest/1/_history/1"]


# What is odd


@pytest.mark.parametrize("text", ["\ud800", "\x00", "x" * 100_000, "\u2028"])
async def test_text_that_no_database_takes_stops_nothing(reading: Reading, text: str) -> None:
    reading.order("1", reasonCode=[{"text": text}], at=NOW - timedelta(seconds=2))
    reading.order("2", id=None, at=NOW - timedelta(seconds=1))
    reading.order("3")
    assert await reading.catch_up() == 3
    assert "received" not in {row.state for row in reading.rows()}
    assert "A-3" in {order.accession_number for order in reading.inbox.orders}


async def test_resource_that_states_no_version_or_time_is_read_once(reading: Reading) -> None:
    made = reading.order("1")
    reading.ehr.resources["ServiceRequest/1"] = {**made, "meta": {}}
    reading.ehr._matching = lambda kind, wanted: (  # type: ignore[method-assign]
        [reading.ehr.resources["ServiceRequest/1"]] if kind == "ServiceRequest" else []
    )
    assert [await reading.catch_up(), await reading.catch_up()] == [1, 0]
    assert reading.names() == ["ServiceRequest/1"]
