"""The HTTP API of the running service: what it accepts, refuses and survives."""

import json
import socket
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serving import Service

ROOT_UID = "1.2.826.0.1.3680043.8.498"
QUICK = {"retry": {"attempts": 1, "first_wait_s": 0.05}}
EXPECTED = {200, 202, 400, 404, 405, 413, 415, 422}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service without any system: readings fail at once, and events, jobs and health are all there."""
    running = Service(tmp_path_factory.mktemp("api"), QUICK)
    running.start()
    yield running
    assert running.answers(), "the service is down after the tests"
    assert running.stop() == 0
    assert "Traceback" not in running.log()


@pytest.fixture
def broken(tmp_path: Path) -> Iterator[Service]:
    """A service of this test alone, to be damaged."""
    running = Service(tmp_path / "service", QUICK)
    running.start()
    yield running
    running.stop()


def post(service: Service, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return service.http.post("/events/study", content=content, headers={"Content-Type": "application/json", **headers})


def event(number: int) -> dict[str, str]:
    return {"study_instance_uid": f"{ROOT_UID}.{number}"}


# Events


def test_the_same_event_twice_is_one_job(service: Service) -> None:
    first, second = post(service, event(1)), post(service, event(1))
    assert (first.status_code, second.status_code) == (202, 200)
    assert first.json()["job_id"] == second.json()["job_id"]
    assert len(service.jobs(f"{ROOT_UID}.1")) == 1


def test_the_same_key_twice_is_one_event(service: Service) -> None:
    first = post(service, event(2), **{"Idempotency-Key": "from the PACS: 7"})
    second = post(service, event(2), **{"Idempotency-Key": "from the PACS: 7"})
    other = post(service, event(2), **{"Idempotency-Key": "from the PACS: 8"})
    assert (first.status_code, second.status_code, other.status_code) == (202, 200, 202)
    assert len({r.json()["job_id"] for r in (first, second, other)}) == 1


def test_a_key_of_another_study_is_refused(service: Service) -> None:
    """Answering with the other study's job would lose this one without a word."""
    assert post(service, event(3), **{"Idempotency-Key": "k3"}).status_code == 202
    refused = post(service, event(4), **{"Idempotency-Key": "k3"})
    assert refused.status_code == 409
    assert "another study" in refused.json()["detail"]
    assert service.jobs(f"{ROOT_UID}.4") == []


def test_many_at_once_are_one_job(service: Service) -> None:
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: post(service, event(5)).status_code, range(32)))
    assert sorted(answers) == [200] * 31 + [202]
    assert len(service.jobs(f"{ROOT_UID}.5")) == 1


def test_many_studies_at_once_are_as_many_jobs(service: Service) -> None:
    numbers = range(100, 140)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda n: post(service, event(n)), numbers))
    assert {a.status_code for a in answers} == {202}
    assert len({a.json()["job_id"] for a in answers}) == len(numbers)


BODIES: dict[str, Any] = {
    "empty": b"",
    "not-json": b"{",
    "not-utf8": b'{"study_instance_uid": "\xff"}',
    "null": None,
    "list": [],
    "text": "1.2.3",
    "no-uid": {},
    "number": {"study_instance_uid": 1.2},
    "null-uid": {"study_instance_uid": None},
    "list-uid": {"study_instance_uid": ["1.2"]},
    "empty-uid": {"study_instance_uid": ""},
    "letters": {"study_instance_uid": "one.two"},
    "long": {"study_instance_uid": "1." + "2" * 63},
    "leading-zero": {"study_instance_uid": "1.02.3"},
    "ends-in-dot": {"study_instance_uid": "1.2."},
    "newline": {"study_instance_uid": "1.2.3\n"},
    "path": {"study_instance_uid": "../../etc/passwd"},
    "other-digits": {"study_instance_uid": "1.\u0662.3"},
    "unknown-field": {"study_instance_uid": "1.2.3", "patient": "x"},
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("kind", BODIES)
def test_a_body_that_is_no_event(kind: str, service: Service) -> None:
    answer = post(service, BODIES[kind])
    assert answer.status_code in (400, 422), answer.text
    assert "Traceback" not in answer.text


def test_a_huge_body_is_refused(service: Service) -> None:
    answer = post(service, b'{"study_instance_uid": "' + b"1" * (8 << 20) + b'"}')
    assert answer.status_code in (413, 422)


def test_a_huge_body_in_pieces_is_refused(service: Service) -> None:
    pieces = (b"1" * 65536 for _ in range(128))
    answer = service.http.post("/events/study", content=pieces, headers={"Content-Type": "application/json"})
    assert answer.status_code in (413, 422)


def test_a_key_that_is_too_long_is_refused(service: Service) -> None:
    assert post(service, event(6), **{"Idempotency-Key": "k" * 201}).status_code == 422


def test_a_client_that_goes_away_in_the_middle(service: Service) -> None:
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", service.port)) as line:
            line.sendall(b"POST /events/study HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{")
    assert service.answers()


# What became of it


def test_a_job_that_there_is_not(service: Service) -> None:
    answer = service.http.get("/jobs/nothing")
    assert answer.status_code == 404
    assert answer.json()["detail"] == "no such job"
    assert service.http.get("/jobs/nothing/deliveries").json() == []
    assert service.http.get("/studies/9.9.9/jobs").json() == []


def test_a_reading_that_fails_says_why(service: Service) -> None:
    post(service, event(7))
    job = service.wait_until_settled(f"{ROOT_UID}.7")
    assert job["state"] == "failed"
    assert "set pacs in wetread.yaml" in job["reasons"][0]


# Health


def test_health_and_readiness(service: Service) -> None:
    assert service.http.get("/health").json() == {"status": "up"}
    assert service.http.get("/ready").json() == {"status": "ready", "protocols": "prostate_mri"}


def test_not_ready_and_no_event_where_the_data_dir_is_gone(broken: Service) -> None:
    broken.data_dir.rename(broken.folder / "gone")
    broken.data_dir.write_text("not a folder")
    assert broken.http.get("/ready").status_code == 503
    assert broken.http.get("/health").status_code == 200


def test_not_ready_and_no_event_where_the_database_is_broken(broken: Service) -> None:
    with sqlite3.connect(broken.data_dir / "wetread.sqlite") as database:
        database.execute("DROP TABLE study_job")
    assert broken.http.get("/ready").status_code == 503
    answer = post(broken, event(1))
    assert answer.status_code == 503
    assert "again later" in answer.json()["detail"]
    assert "study_job" not in answer.text
    assert "Traceback" not in broken.log()


def test_an_event_that_cannot_be_queued_is_not_confirmed(broken: Service) -> None:
    """It is kept, so that the next start reads it; the sender hears that it should ask again."""
    with sqlite3.connect(broken.data_dir / "workflow.sqlite") as database:
        database.execute("ALTER TABLE workflow_status RENAME TO hidden")
    assert post(broken, event(1)).status_code == 503
    with sqlite3.connect(broken.data_dir / "workflow.sqlite") as database:
        database.execute("ALTER TABLE hidden RENAME TO workflow_status")
    assert post(broken, event(1)).status_code == 200
    assert broken.wait_until_settled(f"{ROOT_UID}.1")["state"] == "failed"


def test_a_refusal_does_not_repeat_what_was_sent(service: Service) -> None:
    answer = post(service, {"study_instance_uid": "Bloggs^Joseph", "name": "Bloggs^Joseph"})
    assert answer.status_code == 422
    assert "Bloggs" not in answer.text
    assert {tuple(f["loc"]) for f in answer.json()["detail"]} == {("body", "study_instance_uid"), ("body", "name")}


def test_metrics_and_log_hold_no_patient_data(service: Service) -> None:
    post(service, event(424242), **{"Idempotency-Key": "Bloggs^Joseph"})
    service.wait_until_settled(f"{ROOT_UID}.424242")
    metrics = service.http.get("/metrics").text
    assert "wetread_events_total" in metrics
    assert 'wetread_jobs_total{state="failed"}' in metrics
    for text in (metrics, service.log()):
        assert "424242" not in text
        assert "Bloggs" not in text


def test_the_openapi_document_is_whole(service: Service) -> None:
    document = service.http.get("/openapi.json").json()
    assert document["openapi"].startswith("3.")
    operations = [o for path in document["paths"].values() for o in path.values()]
    assert len({o["operationId"] for o in operations}) == len(operations) >= 7
    for reference in _references(document):
        node: Any = document
        for part in reference.removeprefix("#/").split("/"):
            node = node[part]
    answers = document["paths"]["/events/study"]["post"]["responses"]
    assert {"200", "202", "409", "413", "422", "503"} <= set(answers)


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        yield from ([node["$ref"]] if "$ref" in node else [])
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for child in children:
        yield from _references(child)


# Anything at all

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
UIDS = st.text("0123456789.\n\x00a", max_size=70) | st.text(max_size=70)
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(body=st.binary(max_size=200) | JSON.map(lambda v: json.dumps(v).encode()))
def test_no_body_is_too_strange(body: bytes, service: Service) -> None:
    assert post(service, body).status_code in EXPECTED


@FUZZ
@given(uid=UIDS, key=st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=40))
def test_no_uid_or_key_is_too_strange(uid: str, key: str, service: Service) -> None:
    answer = service.http.post(
        "/events/study", json={"study_instance_uid": uid}, headers={b"Idempotency-Key": key.strip().encode("latin-1")}
    )
    assert answer.status_code in {*EXPECTED, 409}
    if answer.status_code == 202:
        assert service.http.get(f"/jobs/{answer.json()['job_id']}").status_code == 200


@FUZZ
@given(
    path=st.binary(max_size=40),
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD"]),
)
def test_no_path_is_too_strange(path: bytes, method: str, service: Service) -> None:
    for folder in ("jobs", "studies", "events", ""):
        answer = service.http.request(method, f"/{folder}/{quote_from_bytes(path, safe='')}")
        assert answer.status_code < 500
