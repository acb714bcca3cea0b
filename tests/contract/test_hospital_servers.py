"""The simulator's servers, each against what a client relies on: the real ones and their stand-ins."""

import asyncio
import contextlib
import io
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import hl7  # type: ignore[import-untyped]
import httpx
import pydicom
import pytest
from dicomweb_client.api import DICOMwebClient

from deploy.hospital.chart import ACCESSION_SYSTEM, MRN_SYSTEM, chart_bundle
from deploy.hospital.ehr import RunningEhr, start_ehr, start_fallback, start_hapi
from deploy.hospital.pacs import RunningOrthanc, start_orthanc
from deploy.hospital.phantom import PhantomSpec
from deploy.hospital.phantom_dicom import study_instance_uid, write_phantom
from deploy.hospital.process import ServerNotReady, start
from deploy.hospital.ris import Behaviour, RisServer
from deploy.hospital.ris_process import start_ris

REPOSITORY = Path(__file__).parents[2]
SPEC = PhantomSpec()


# --- PACS -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningOrthanc]:
    with start_orthanc(tmp_path_factory.mktemp("pacs")) as running:
        yield running


@pytest.fixture(scope="module")
def instances(tmp_path_factory: pytest.TempPathFactory) -> list[pydicom.Dataset]:
    folder = write_phantom(SPEC, tmp_path_factory.mktemp("phantom"))
    return [pydicom.dcmread(path) for path in sorted(folder.rglob("*.dcm"))]


def test_orthanc_gives_back_what_was_stored_and_keeps_it_once(
    orthanc: RunningOrthanc, instances: list[pydicom.Dataset]
) -> None:
    client = DICOMwebClient(orthanc.dicomweb_url)
    client.store_instances(instances)
    client.store_instances(instances[:3])

    studies = client.search_for_studies(search_filters={"AccessionNumber": SPEC.accession})
    assert [study["0020000D"]["Value"][0] for study in studies] == [study_instance_uid(SPEC)]
    found = client.search_for_instances(study_instance_uid(SPEC))
    assert len(found) == len(instances) == 70
    one = instances[40]
    back = client.retrieve_instance(one.StudyInstanceUID, one.SeriesInstanceUID, one.SOPInstanceUID)
    assert back.PixelData == one.PixelData


def test_orthanc_announces_the_stable_study(orthanc: RunningOrthanc, instances: list[pydicom.Dataset]) -> None:
    buffer = io.BytesIO()
    instances[0].save_as(buffer, enforce_file_format=True)
    httpx.post(f"{orthanc.http_url}/instances", content=buffer.getvalue()).raise_for_status()
    deadline = time.monotonic() + 20
    kinds: list[str] = []
    while "StableStudy" not in kinds and time.monotonic() < deadline:
        time.sleep(0.2)
        changes = httpx.get(f"{orthanc.http_url}/changes?limit=1000").json()["Changes"]
        kinds = [change["ChangeType"] for change in changes]
    assert "StableStudy" in kinds


# --- EHR --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hapi(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEhr]:
    with start_hapi(tmp_path_factory.mktemp("hapi")) as running:
        yield running


@pytest.fixture(scope="module")
def fallback(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEhr]:
    with start_fallback(tmp_path_factory.mktemp("fallback")) as running:
        yield running


@pytest.fixture(params=["hapi", "fallback"])
def ehr(request: pytest.FixtureRequest) -> RunningEhr:
    running: RunningEhr = request.getfixturevalue(request.param)
    return running


def test_without_java_the_fallback_starts_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.hospital.ehr.CACHE", tmp_path / "cache")
    monkeypatch.setattr("shutil.which", lambda program: None)
    with start_ehr(tmp_path) as running:
        assert running.kind == "fallback: in-memory FHIR"
        assert httpx.get(f"{running.url}/metadata").json()["fhirVersion"] == "4.0.1"
    assert "java and mvn not found" in (tmp_path / "ehr-fallback-reason.txt").read_text()


def _spec(name: str) -> PhantomSpec:
    return PhantomSpec(patient_id=f"MRN-{name}", accession=f"ACC-{name}")


def _search(ehr: RunningEhr, kind: str, **parameters: str) -> list[dict[str, Any]]:
    answer = httpx.get(f"{ehr.url}/{kind}", params=parameters, timeout=60)
    assert answer.status_code == 200, answer.text
    return [entry["resource"] for entry in answer.json().get("entry", [])]


def _transact(ehr: RunningEhr, bundle: dict[str, Any]) -> httpx.Response:
    return httpx.post(ehr.url, json=bundle, timeout=60)


def test_the_real_ehr_says_what_it_is(hapi: RunningEhr) -> None:
    capability = httpx.get(f"{hapi.url}/metadata", timeout=60).json()
    assert capability["fhirVersion"] == "4.0.1"
    assert capability["software"]["name"] == "HAPI FHIR Server"
    assert hapi.kind == f"HAPI FHIR {capability['software']['version']} JPA"


def test_a_transaction_twice_is_stored_once(ehr: RunningEhr) -> None:
    spec = _spec("twice")
    first, second = (_transact(ehr, chart_bundle(spec)) for _ in range(2))
    assert {entry["response"]["status"][:3] for entry in first.json()["entry"]} <= {"200", "201"}
    assert {entry["response"]["status"][:3] for entry in second.json()["entry"]} == {"200"}

    patients = _search(ehr, "Patient", identifier=f"{MRN_SYSTEM}|{spec.patient_id}")
    assert len(patients) == 1
    orders = _search(ehr, "ServiceRequest", identifier=f"{ACCESSION_SYSTEM}|{spec.accession}")
    assert [order["subject"]["reference"] for order in orders] == [f"Patient/{patients[0]['id']}"]
    assert len(_search(ehr, "Observation", patient=patients[0]["id"])) == 4


def test_the_latest_psa_is_found_by_code_and_date(ehr: RunningEhr) -> None:
    spec = _spec("psa")
    _transact(ehr, chart_bundle(spec, psa_ng_ml=(4.0, 9.4, 13.0))).raise_for_status()
    patient = _search(ehr, "Patient", identifier=f"{MRN_SYSTEM}|{spec.patient_id}")[0]["id"]
    query = {"subject": f"Patient/{patient}", "code": "http://loinc.org|2857-1", "_sort": "-date"}
    assert [o["valueQuantity"]["value"] for o in _search(ehr, "Observation", **query)] == [13.0, 9.4, 4.0]
    assert len(_search(ehr, "Observation", **query, _count="1")) == 1


def test_search_pages_by_next_links(ehr: RunningEhr) -> None:
    spec = _spec("pages")
    _transact(ehr, chart_bundle(spec, psa_ng_ml=(1.0, 2.0, 3.0, 4.0, 5.0))).raise_for_status()
    patient = _search(ehr, "Patient", identifier=f"{MRN_SYSTEM}|{spec.patient_id}")[0]["id"]
    url: str | None = f"{ehr.url}/Observation?patient={patient}&_count=3"
    seen: list[str] = []
    while url:
        page = httpx.get(url, timeout=60).json()
        seen += [entry["resource"]["id"] for entry in page["entry"]]
        url = next((link["url"] for link in page["link"] if link["relation"] == "next"), None)
    assert len(seen) == len(set(seen)) == 7


def test_a_conditional_update_creates_then_replaces(ehr: RunningEhr) -> None:
    def put(name: str) -> httpx.Response:
        resource = {
            "resourceType": "Device",
            "identifier": [{"system": "urn:oid:1.2.3.4.5.7", "value": "conditional"}],
            "deviceName": [{"name": name, "type": "model-name"}],
        }
        request = {"method": "PUT", "url": "Device?identifier=urn:oid:1.2.3.4.5.7|conditional"}
        entry = {"resource": resource, "request": request}
        return _transact(ehr, {"resourceType": "Bundle", "type": "transaction", "entry": [entry]})

    statuses = [put(n).json()["entry"][0]["response"]["status"][:3] for n in ("a", "b", "b")]
    assert statuses == ["201", "200", "200"]
    found = _search(ehr, "Device", identifier="urn:oid:1.2.3.4.5.7|conditional")
    assert [device["deviceName"][0]["name"] for device in found] == ["b"]
    assert found[0]["meta"]["versionId"] == "2"


def test_a_transaction_with_one_bad_entry_stores_nothing(ehr: RunningEhr) -> None:
    spec = _spec("broken")
    bundle = chart_bundle(spec)
    bundle["entry"][-1]["resource"]["subject"] = {"reference": "Patient/no-such-patient"}
    answer = _transact(ehr, bundle)
    assert 400 <= answer.status_code < 500
    assert answer.json()["resourceType"] == "OperationOutcome"
    assert _search(ehr, "Patient", identifier=f"{MRN_SYSTEM}|{spec.patient_id}") == []


def test_an_ambiguous_condition_is_refused(ehr: RunningEhr) -> None:
    for _ in range(2):
        resource = {"resourceType": "Device", "identifier": [{"system": "urn:x", "value": "double"}]}
        httpx.post(f"{ehr.url}/Device", json=resource, timeout=60).raise_for_status()
    entry = {
        "resource": {"resourceType": "Device", "identifier": [{"system": "urn:x", "value": "double"}]},
        "request": {"method": "POST", "url": "Device", "ifNoneExist": "identifier=urn:x|double"},
    }
    answer = _transact(ehr, {"resourceType": "Bundle", "type": "transaction", "entry": [entry]})
    assert answer.status_code == 412


def test_what_is_not_there_is_an_operation_outcome(ehr: RunningEhr) -> None:
    answer = httpx.get(f"{ehr.url}/Patient/no-such-patient", timeout=60)
    assert answer.status_code == 404
    assert answer.json()["resourceType"] == "OperationOutcome"


def _observation(**changes: Any) -> dict[str, Any]:
    code = {"coding": [{"system": "http://loinc.org", "code": "2857-1"}]}
    quantity = {"value": 13.0, "unit": "ng/mL", "system": "http://unitsofmeasure.org", "code": "ng/mL"}
    return {
        "resourceType": "Observation",
        "text": {"status": "generated", "div": '<div xmlns="http://www.w3.org/1999/xhtml">PSA</div>'},
        "status": "final",
        "code": code,
        "subject": {"display": "someone"},
        "performer": [{"display": "a laboratory"}],
        "effectiveDateTime": "2026-02-23T09:30:00+00:00",
        "valueQuantity": quantity,
        **changes,
    }


def _validate(ehr: RunningEhr, resource: dict[str, Any]) -> list[str]:
    """The errors that `$validate` reports."""
    answer = httpx.post(f"{ehr.url}/{resource['resourceType']}/$validate", json=resource, timeout=120)
    issues = answer.json()["issue"]
    return [i["diagnostics"] for i in issues if i["severity"] in ("error", "fatal")]


def test_validate_passes_a_good_resource(ehr: RunningEhr) -> None:
    assert _validate(ehr, _observation()) == []


def test_validate_passes_every_resource_of_the_chart(hapi: RunningEhr) -> None:
    for entry in chart_bundle(_spec("validate"))["entry"]:
        assert _validate(hapi, entry["resource"]) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"code": None},
        {"nonsense": 1},
        {"valueQuantity": {"value": "thirteen"}},
    ],
)
def test_validate_catches_a_wrong_structure(ehr: RunningEhr, changes: dict[str, Any]) -> None:
    wrong = {name: value for name, value in _observation(**changes).items() if value is not None}
    assert _validate(ehr, wrong)


@pytest.mark.parametrize(
    "changes",
    [
        {"status": "nearly-final"},
        {"valueQuantity": {"value": 1, "system": "http://unitsofmeasure.org", "code": "furlong/fortnight"}},
        {"component": [{"code": {"text": "x"}}], "dataAbsentReason": {"text": "but there is a value"}},
    ],
)
def test_hapi_validates_codes_units_and_rules_too(hapi: RunningEhr, changes: dict[str, Any]) -> None:
    assert _validate(hapi, _observation(**changes))


async def test_hapi_notifies_a_rest_hook(hapi: RunningEhr) -> None:
    notified = asyncio.Event()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()
        notified.set()

    server = await asyncio.start_server(listen, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    subscription = {
        "resourceType": "Subscription",
        "status": "requested",
        "reason": "test",
        "criteria": "Specimen?",
        "channel": {"type": "rest-hook", "endpoint": f"http://127.0.0.1:{port}/hook"},
    }
    async with httpx.AsyncClient(timeout=60) as client:
        created = (await client.post(f"{hapi.url}/Subscription", json=subscription)).json()
        address = f"{hapi.url}/Subscription/{created['id']}"
        async with asyncio.timeout(30):
            while (await client.get(address)).json()["status"] != "active":  # noqa: ASYNC110
                await asyncio.sleep(0.2)
        assert not notified.is_set()
        (await client.post(f"{hapi.url}/Specimen", json={"resourceType": "Specimen"})).raise_for_status()
        async with asyncio.timeout(30):
            await notified.wait()
    server.close()
    await server.wait_closed()


# --- RIS --------------------------------------------------------------------------------------------------


def _oru(control_id: str, value: str = "13.0") -> str:
    header = f"MSH|^~\\&|WETREAD||RIS|HOSPITAL|20260302||ORU^R01^ORU_R01|{control_id}|P|2.5.1"
    return "\r".join([header, "PID|1||P1", f"OBX|1|NM|2857-1^PSA^LN||{value}|ng/mL|||||F"]) + "\r"


def _frame(message: str) -> bytes:
    return b"\x0b" + message.encode() + b"\x1c\r"


@contextlib.asynccontextmanager
async def _connected(ris: RisServer) -> Any:
    reader, writer = await asyncio.open_connection("127.0.0.1", ris.port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def _send(ris: RisServer, message: str) -> tuple[str, str]:
    """(MSA-1, MSA-2) of the answer."""
    async with _connected(ris) as (reader, writer):
        writer.write(_frame(message))
        return _msa(await asyncio.wait_for(reader.readuntil(b"\x1c\r"), 10))


def _msa(frame: bytes) -> tuple[str, str]:
    segment = hl7.parse(frame.strip(b"\x0b\x1c\r").decode()).segment("MSA")
    return str(segment[1]), str(segment[2])


async def test_ris_accepts_once_and_remembers_over_a_restart(tmp_path: Path) -> None:
    store = tmp_path / "ris.jsonl"
    async with RisServer(store) as ris:
        assert await _send(ris, _oru("1")) == ("AA", "1")
        assert await _send(ris, _oru("1")) == ("AA", "1")
        assert await _send(ris, _oru("2")) == ("AA", "2")
    async with RisServer(store) as ris:
        assert await _send(ris, _oru("1")) == ("AA", "1")
        assert [message.control_id for message in ris.accepted()] == ["1", "2"]
        assert [message.duplicate for message in ris.received()] == [False, True, False, True]


async def test_ris_refuses_other_content_under_a_known_control_id(tmp_path: Path) -> None:
    async with RisServer(tmp_path / "ris.jsonl") as ris:
        await _send(ris, _oru("1", "13.0"))
        assert await _send(ris, _oru("1", "14.0")) == ("AE", "1")
        assert len(ris.accepted()) == 1


@pytest.mark.parametrize("behaviour", [Behaviour.ERROR, Behaviour.REJECT])
async def test_ris_refuses_and_accepts_the_retry(tmp_path: Path, behaviour: Behaviour) -> None:
    async with RisServer(tmp_path / "ris.jsonl") as ris:
        ris.behave(behaviour, times=1)
        assert await _send(ris, _oru("1")) == (str(behaviour), "1")
        assert ris.accepted() == []
        assert await _send(ris, _oru("1")) == ("AA", "1")
        assert [message.answered for message in ris.received()] == [str(behaviour), "AA"]


async def test_ris_falls_silent_but_has_accepted(tmp_path: Path) -> None:
    async with RisServer(tmp_path / "ris.jsonl") as ris:
        ris.behave(Behaviour.SILENT)
        async with _connected(ris) as (reader, writer):
            writer.write(_frame(_oru("1")))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.read(1), 0.3)
        assert [message.control_id for message in ris.accepted()] == ["1"]


async def test_ris_closes_before_the_acknowledgement(tmp_path: Path) -> None:
    async with RisServer(tmp_path / "ris.jsonl") as ris:
        ris.behave(Behaviour.CLOSE)
        async with _connected(ris) as (reader, writer):
            writer.write(_frame(_oru("1")))
            assert await asyncio.wait_for(reader.read(), 10) == b""
        assert len(ris.accepted()) == 1


async def test_ris_answers_wrongly_late_and_in_pieces(tmp_path: Path) -> None:
    async with RisServer(tmp_path / "ris.jsonl") as ris:
        ris.behave(Behaviour.WRONG_ID, times=1)
        assert await _send(ris, _oru("1")) == ("AA", "OTHER-1")
        ris.behave(Behaviour.SPLIT, times=1)
        assert await _send(ris, _oru("2")) == ("AA", "2")
        ris.behave(Behaviour.ACCEPT, times=1, delay_s=0.4)
        before = time.monotonic()
        assert await _send(ris, _oru("3")) == ("AA", "3")
        assert time.monotonic() - before >= 0.4
        ris.behave(Behaviour.GARBAGE, times=1)
        async with _connected(ris) as (reader, writer):
            writer.write(_frame(_oru("4")))
            answer = await asyncio.wait_for(reader.readuntil(b"\x1c\r"), 10)
            with pytest.raises(hl7.HL7Exception):
                _msa(answer)


async def test_ris_reads_split_and_joined_frames(tmp_path: Path) -> None:
    async with RisServer(tmp_path / "ris.jsonl") as ris, _connected(ris) as (reader, writer):
        for byte in _frame(_oru("1")):
            writer.write(bytes([byte]))
            await writer.drain()
        assert _msa(await reader.readuntil(b"\x1c\r")) == ("AA", "1")
        writer.write(_frame(_oru("2")) + b"noise" + _frame(_oru("3")))
        assert [_msa(await reader.readuntil(b"\x1c\r"))[1] for _ in range(2)] == ["2", "3"]


async def test_ris_keeps_nothing_of_a_frame_that_ends_early(tmp_path: Path) -> None:
    async with RisServer(tmp_path / "ris.jsonl") as ris:
        async with _connected(ris) as (_, writer):
            writer.write(_frame(_oru("1"))[:-2])
            await writer.drain()
        assert await _send(ris, _oru("2")) == ("AA", "2")
        assert [message.control_id for message in ris.received()] == ["2"]


async def test_ris_refuses_what_is_no_hl7(tmp_path: Path) -> None:
    async with RisServer(tmp_path / "ris.jsonl") as ris:
        assert (await _send(ris, "hello"))[0] == "AR"
        assert ris.accepted() == []


async def test_ris_as_a_process_is_steered_over_http(tmp_path: Path) -> None:
    with start_ris(tmp_path) as ris:
        ris.behave(Behaviour.REJECT, times=1)
        reader, writer = await asyncio.open_connection(ris.host, ris.port)
        for expected in ("AR", "AA"):
            writer.write(_frame(_oru("1")))
            assert _msa(await asyncio.wait_for(reader.readuntil(b"\x1c\r"), 10)) == (expected, "1")
        writer.close()
        assert [message.answered for message in ris.received()] == ["AR", "AA"]
        assert [message.text for message in ris.accepted()] == [_oru("1")]


# --- Starting and stopping --------------------------------------------------------------------------------


def test_a_server_that_ends_at_once_is_reported_with_its_log(tmp_path: Path) -> None:
    process = start("Dummy", ["sh", "-c", "echo port is taken; exit 3"], tmp_path / "dummy.log")
    with pytest.raises(ServerNotReady, match=r"(?s)Dummy ended while starting \(exit code 3\).*port is taken"):
        process.wait_until(lambda: False, timeout_s=10)


def test_a_server_that_never_answers_is_stopped_and_reported(tmp_path: Path) -> None:
    process = start("Dummy", ["sleep", "60"], tmp_path / "dummy.log")
    with pytest.raises(ServerNotReady, match=r"not ready after 0\.3 s"):
        process.wait_until(lambda: False, timeout_s=0.3)
    assert not _runs(process.pid)


def test_a_command_that_is_not_there_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ServerNotReady, match="no-such-server"):
        start("Dummy", ["no-such-server"], tmp_path / "dummy.log")


def test_a_server_that_ignores_the_wish_to_stop_is_killed(tmp_path: Path) -> None:
    script = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    log = tmp_path / "dummy.log"
    process = start("Dummy", [sys.executable, "-c", script], log, stop_timeout_s=0.3)
    process.wait_until(lambda: "up" in log.read_text(), timeout_s=10)
    process.stop()
    assert not _runs(process.pid)


def test_a_server_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, sys; from deploy.hospital.process import start;"
        f"print(start('Dummy', ['sleep', '60'], pathlib.Path({str(tmp_path / 'dummy.log')!r})).pid, flush=True);"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    pid = int(done.stdout)
    deadline = time.monotonic() + 10
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    """Whether the process is there and no mere zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_chart_follows_the_phantom() -> None:
    spec = PhantomSpec(patient_id="P9", accession="A9", study_date=date(2026, 3, 2))
    kinds = [entry["resource"]["resourceType"] for entry in chart_bundle(spec, with_order=False)["entry"]]
    assert "ServiceRequest" not in kinds
    assert kinds.count("Observation") == 4
