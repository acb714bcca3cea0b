"""Deliveries through the real workflow and the real connectors: states, retries, independence, the same bytes again.

The PACS is Orthanc and the EHR the in-memory FHIR server, each behind a proxy that can make requests go wrong.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
from dbos import DBOS, SetWorkflowID
from fastapi import Response
from pydicom.uid import UID

from deploy.hospital.ehr import start_fallback
from deploy.hospital.pacs import RunningOrthanc
from deploy.hospital.process import free_port
from deploy.hospital.ris import Behaviour
from deploy.hospital.ris_process import RunningRis
from mappings.model.ids import derive_control_id, derive_uid
from middleware.bootstrap import open_systems, run_workflows
from middleware.dispatching import look_after_deliveries
from middleware.release.deliveries import Outcome, give_up, send_to_ris
from middleware.settings import Settings
from middleware.store.deliveries import SETTLED
from middleware.store.tables import Delivery, StudyEvent
from middleware.systems import Systems
from middleware.workflow import deliver
from tests.builders import STUDY_UID
from tests.dicom_sources import build_sources
from tests.proxy import Judge, Proxy, Seen, open_proxy

QUICK = {"first_wait_s": 0.1, "longest_wait_s": 0.3, "give_up_after_s": 60.0, "down_after": 100}
"""Short waits, and no destination counts as down: that is another file's business."""
NOW = datetime(2026, 3, 4, 10, 30, tzinfo=UTC)


@dataclass
class Ward:
    """What a test needs: settings of a service with all three destinations, and the two proxies."""

    settings: Settings
    pacs: Proxy
    ehr: Proxy
    ris: RunningRis


@pytest.fixture(scope="module")
def proxies(tmp_path_factory: pytest.TempPathFactory, orthanc: RunningOrthanc) -> Iterator[tuple[Proxy, Proxy]]:
    with (
        start_fallback(tmp_path_factory.mktemp("ehr")) as ehr,
        open_proxy(orthanc.http_url) as pacs_proxy,
        open_proxy(ehr.url.removesuffix("/fhir")) as ehr_proxy,
    ):
        yield pacs_proxy, ehr_proxy


@pytest.fixture
def ward(tmp_path: Path, proxies: tuple[Proxy, Proxy], ris: RunningRis) -> Iterator[Ward]:
    pacs, ehr = proxies
    yield Ward(settings_of(tmp_path, pacs.url, ehr.url, ris.port), pacs, ehr, ris)
    for proxy in proxies:
        proxy.judge = lambda method, path, body: None
        proxy.seen.clear()


def settings_of(folder: Path, pacs: str, ehr: str, ris_port: int, **ris: Any) -> Settings:
    return Settings.model_validate(
        {
            "data_dir": folder / "data",
            "executor_id": "test",
            "pacs": {"url": f"{pacs}/dicom-web"},
            "ehr": {"url": f"{ehr}/fhir"},
            "ris": {"host": "127.0.0.1", "port": ris_port, "ack_timeout_s": 0.6, **ris},
            "deliver": dict.fromkeys(("pacs", "ehr", "ris"), QUICK),
        }
    )


def contents(job_id: str) -> dict[tuple[str, str], bytes]:
    """One small artifact of each kind, by destination and name."""
    (source,) = build_sources()[:1]
    source.SOPInstanceUID = source.file_meta.MediaStorageSOPInstanceUID = UID(derive_uid(job_id, "instance"))
    source.file_meta.MediaStorageSOPClassUID = source.SOPClassUID
    buffer = BytesIO()
    source.save_as(buffer, enforce_file_format=True)
    identifier = {"system": "urn:test", "value": job_id}
    report = {
        "resourceType": "DiagnosticReport",
        "identifier": [identifier],
        "status": "preliminary",
        "code": {"text": "test"},
    }
    put = {"method": "PUT", "url": f"DiagnosticReport?identifier=urn:test|{job_id}"}
    entry = {"resource": report, "request": put}
    bundle = json.dumps({"resourceType": "Bundle", "type": "transaction", "entry": [entry]}).encode()
    control = derive_control_id(job_id, 1, "oru")
    header = f"MSH|^~\\&|WETREAD|A|RIS|B|20260304103000+0000||ORU^R01^ORU_R01|{control}|P|2.5.1\rPID|1||X\r"
    return {("pacs", "sr.dcm"): buffer.getvalue(), ("ehr", "bundle.json"): bundle, ("ris", "oru.hl7"): header.encode()}


@asynccontextmanager
async def delivering(settings: Settings, job_id: str) -> AsyncIterator[Systems]:
    """The workflows, with a released job whose three deliveries are pending."""
    async with open_systems(settings) as systems, run_workflows(systems), look_after_deliveries(systems):
        event = StudyEvent(
            idempotency_key=job_id,
            source="test",
            kind="study-available",
            study_instance_uid=STUDY_UID,
            job_id=job_id,
            received_at=NOW,
        )
        systems.store.accept_event(event)
        planned = [
            Delivery(
                delivery_id=f"{job_id}-{destination}",
                job_id=job_id,
                revision=1,
                destination=destination,
                artifact_name=name,
                kind="x",
                digest=systems.artifacts.put(data).digest,
                position=0,
                order_key=job_id,
                created_at=NOW,
                updated_at=NOW,
            )
            for (destination, name), data in contents(job_id).items()
        ]
        systems.store.plan_deliveries(job_id, 1, planned, NOW)
        yield systems


def changed(settings: Settings, destination: str, **changes: Any) -> Settings:
    """The settings with other ones for one destination."""
    one = settings.deliver.to(destination).model_copy(update=changes)
    return settings.model_copy(update={"deliver": settings.deliver.model_copy(update={destination: one})})


async def start(job_id: str, destination: str, run: str = "1") -> Any:
    with SetWorkflowID(f"{job_id}/{run}/{destination}"):
        return await DBOS.start_workflow_async(deliver, job_id, destination)


async def deliver_everywhere(settings: Settings, job_id: str) -> dict[str, Delivery]:
    """Every delivery of the job, once all have settled."""
    async with delivering(settings, job_id) as systems:
        for each in ("pacs", "ehr", "ris"):
            await start(job_id, each)
        return await settled(systems, job_id)


async def settled(systems: Systems, job_id: str, *destinations: str) -> dict[str, Delivery]:
    """Every delivery of the job by destination, once those to these destinations (or all) are settled."""
    async with asyncio.timeout(60):
        while True:
            found = {d.destination: d for d in systems.store.deliveries(job_id=job_id)}
            if all(d.state in SETTLED for d in found.values() if d.destination in (destinations or found)):
                return found
            await asyncio.sleep(0.02)


def states(deliveries: dict[str, Delivery]) -> dict[str, str]:
    return {destination: d.state for destination, d in deliveries.items()}


def fail_first(times: int, status: int, **headers: str) -> Judge:
    """Answer the first `times` POSTs with `status`."""
    left = [times]

    def judge(method: str, path: str, body: bytes) -> Response | None:
        if method != "POST" or left[0] == 0:
            return None
        left[0] -= 1
        return Response("later", status, headers)

    return judge


def assert_same_bytes(seen: list[Seen], count: int) -> None:
    """All posts hold one content; the multipart boundary of a STOW is drawn anew and no content."""
    assert len(seen) == count
    bodies = {one.body.split(b"\r\n\r\n", 1)[-1].rsplit(b"\r\n--", 1)[0] for one in seen}
    assert len(bodies) == 1


async def test_delivered_everywhere_with_receipts(ward: Ward) -> None:
    done = await deliver_everywhere(ward.settings, "all")
    assert states(done) == {"pacs": "delivered", "ehr": "delivered", "ris": "delivered"}
    assert all(d.attempts == 1 and not d.reason for d in done.values())
    assert derive_uid("all", "instance") in done["pacs"].receipt
    assert "DiagnosticReport/" in done["ehr"].receipt
    assert done["ris"].receipt == f"AA for {derive_control_id('all', 1, 'oru')}"


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429])
async def test_a_failing_server_gets_the_same_bytes_again(status: int, ward: Ward) -> None:
    ward.pacs.judge, ward.ehr.judge = fail_first(2, status), fail_first(2, status)
    done = await deliver_everywhere(ward.settings, f"again-{status}")
    assert states(done) == {"pacs": "delivered", "ehr": "delivered", "ris": "delivered"}
    assert (done["pacs"].attempts, done["ehr"].attempts, done["ris"].attempts) == (3, 3, 1)
    assert_same_bytes(ward.pacs.posts(), 3)
    assert_same_bytes(ward.ehr.posts(), 3)


async def test_a_server_that_says_when_to_come_again_is_obeyed(ward: Ward) -> None:
    ward.ehr.judge = fail_first(1, 503, **{"Retry-After": "2"})
    began = perf_counter()
    done = await deliver_everywhere(ward.settings, "retry-after")
    assert done["ehr"].state == "delivered"
    assert perf_counter() - began > 2.0


async def test_a_server_that_keeps_failing_is_given_up(ward: Ward) -> None:
    ward.ehr.judge = fail_first(99, 503)
    done = await deliver_everywhere(changed(ward.settings, "ehr", give_up_after_s=1.5), "given-up")
    assert states(done) == {"pacs": "delivered", "ehr": "dead", "ris": "delivered"}
    assert done["ehr"].attempts == len(ward.ehr.posts()) > 1
    assert f"given up after {done['ehr'].attempts} attempts" in done["ehr"].reason
    assert "503" in done["ehr"].reason


@pytest.mark.parametrize("status", [400, 401, 403, 422])
async def test_a_server_that_refuses_is_asked_once(status: int, ward: Ward) -> None:
    ward.ehr.judge = fail_first(99, status)
    done = await deliver_everywhere(ward.settings, f"refused-{status}")
    assert states(done) == {"pacs": "delivered", "ehr": "dead", "ris": "delivered"}
    assert done["ehr"].attempts == 1
    assert str(status) in done["ehr"].reason


async def test_a_dead_ehr_does_not_delay_the_others(ward: Ward, tmp_path: Path) -> None:
    """While the EHR is still being tried, the PACS and the RIS have theirs."""
    nobody = f"http://127.0.0.1:{free_port()}"
    settings = settings_of(tmp_path, ward.pacs.url, nobody, ward.ris.port)
    async with delivering(changed(settings, "ehr", first_wait_s=90.0), "dead-ehr") as systems:
        for destination in ("ehr", "pacs", "ris"):
            await start("dead-ehr", destination)
        found = await settled(systems, "dead-ehr", "pacs", "ris")
        while found["ehr"].state != "retrying":
            await asyncio.sleep(0.02)
            found["ehr"] = systems.store.delivery("dead-ehr-ehr")
    assert states(found) == {"pacs": "delivered", "ehr": "retrying", "ris": "delivered"}
    assert "no connection" in found["ehr"].reason


@pytest.mark.parametrize(
    ("behaviour", "state"),
    [
        (Behaviour.ERROR, "dead"),
        (Behaviour.REJECT, "dead"),
        (Behaviour.SILENT, "ambiguous"),
        (Behaviour.CLOSE, "ambiguous"),
        (Behaviour.WRONG_ID, "ambiguous"),
        (Behaviour.GARBAGE, "ambiguous"),
        (Behaviour.SPLIT, "delivered"),
    ],
)
async def test_what_the_ris_answers_is_the_state(behaviour: Behaviour, state: str, ward: Ward) -> None:
    ward.ris.behave(behaviour)
    done = await deliver_everywhere(ward.settings, f"ris-{behaviour}")
    assert done["ris"].state == state
    assert len(ward.ris.received()) == 1


async def test_a_silent_ris_that_drops_duplicates_gets_the_same_message_until_it_answers(
    ward: Ward, tmp_path: Path
) -> None:
    settings = settings_of(tmp_path, ward.pacs.url, ward.ehr.url, ward.ris.port, duplicate_safe=True)
    ward.ris.behave(Behaviour.SILENT, times=2)
    done = await deliver_everywhere(settings, "silent-twice")
    assert (done["ris"].state, done["ris"].attempts) == ("delivered", 3)
    assert len({m.text for m in ward.ris.received()}) == 1
    assert len(ward.ris.accepted()) == 1


async def test_a_ris_that_drops_duplicates_and_never_answers_ends_ambiguous(ward: Ward, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, ward.pacs.url, ward.ehr.url, ward.ris.port, duplicate_safe=True)
    ward.ris.behave(Behaviour.SILENT)
    done = await deliver_everywhere(changed(settings, "ris", give_up_after_s=1.5), "silent-forever")
    assert (done["ris"].state, done["ris"].attempts) == ("ambiguous", len(ward.ris.received()))
    assert len(ward.ris.received()) > 1


async def test_states_on_the_way(ward: Ward) -> None:
    """pending, then in_flight while the EHR thinks, then delivered."""
    seen: list[str] = []
    async with delivering(ward.settings, "way") as systems:

        def note(method: str, path: str, body: bytes) -> Response | None:
            if method == "POST":
                seen.append(systems.store.delivery("way-ehr").state)
            return None

        seen.append(systems.store.delivery("way-ehr").state)
        ward.ehr.judge = note
        await (await start("way", "ehr")).get_result(polling_interval_sec=0.05)
        seen.append(systems.store.delivery("way-ehr").state)
    assert seen == ["pending", "in_flight", "delivered"]


async def test_what_has_settled_is_not_sent_again(ward: Ward) -> None:
    ward.ris.behave(Behaviour.SILENT)
    ward.ehr.judge = fail_first(1, 422)
    async with delivering(ward.settings, "settled") as systems:
        for run in ("1", "2"):
            for destination in ("pacs", "ehr", "ris"):
                await (await start("settled", destination, run)).get_result(polling_interval_sec=0.05)
        found = {d.destination: d.state for d in systems.store.deliveries(job_id="settled")}
    assert found == {"pacs": "delivered", "ehr": "dead", "ris": "ambiguous"}
    assert len(ward.ehr.posts()) == len(ward.pacs.posts()) == len(ward.ris.received()) == 1


async def test_a_damaged_artifact_is_never_sent(ward: Ward) -> None:
    async with delivering(ward.settings, "damaged") as systems:
        digest = systems.store.delivery("damaged-ehr").digest
        (file,) = (systems.settings.data_dir / "artifacts").rglob(digest)
        file.write_bytes(b'{"resourceType": "Bundle", "type": "transaction", "entry": [{}]}')
        handle = await start("damaged", "ehr")
        await handle.get_result(polling_interval_sec=0.05)
        found = systems.store.delivery("damaged-ehr")
    assert found.state == "dead"
    assert "damaged" in found.reason
    assert ward.ehr.posts() == []


async def test_a_destination_that_is_no_longer_configured(ward: Ward) -> None:
    without = ward.settings.model_copy(update={"ehr": None})
    async with delivering(without, "unconfigured") as systems:
        await (await start("unconfigured", "ehr")).get_result(polling_interval_sec=0.05)
        found = systems.store.delivery("unconfigured-ehr")
    assert found.state == "dead"
    assert "no longer configured" in found.reason


# The rules alone


def test_giving_up_keeps_what_is_uncertain_uncertain() -> None:
    assert give_up(Outcome("retrying", reason="x"), 3) == Outcome("dead", reason="given up after 3 attempts: x")
    assert give_up(Outcome("retrying", reason="x", uncertain=True), 3).state == "ambiguous"


async def test_a_message_that_may_have_been_sent_is_not_sent_to_a_careful_ris() -> None:
    class NoRis:
        async def send(self, message: bytes, control_id: str) -> Any:
            raise AssertionError("it was sent")

        async def probe(self) -> str:
            return ""

    outcome = await send_to_ris(NoRis(), b"", "WR1", duplicate_safe=False, resent=True)
    assert outcome.state == "ambiguous"
    assert "look in the RIS" in outcome.reason


async def test_a_fault_of_our_own_is_a_state_too(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody thought of must not leave a delivery in flight for ever."""
    async with delivering(ward.settings, "fault") as systems:

        async def fail(*_: Any) -> Any:
            raise KeyError("nobody thought of this")

        monkeypatch.setattr(systems.ris, "send", fail)
        monkeypatch.setattr(systems.ehr, "transaction", fail)
        for destination in ("ehr", "ris"):
            await (await start("fault", destination)).get_result(polling_interval_sec=0.05)
        found = {d.destination: d for d in systems.store.deliveries(job_id="fault")}
    assert (found["ehr"].state, found["ris"].state) == ("dead", "ambiguous")
    assert "unexpected KeyError" in found["ris"].reason
