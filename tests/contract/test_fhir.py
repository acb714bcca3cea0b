"""The FHIR connector against a raw HTTP peer that pages, loops, lies and breaks. HAPI judges it elsewhere."""

import asyncio
import json
import socket
import ssl
import subprocess
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from connectors.errors import Ambiguous, Permanent, Retryable
from connectors.fhir.client import FhirClient
from connectors.fhir.config import FhirConfig
from connectors.fhir.outcome import retry_after_s
from tests.fhir_peer import Answer, Json, client, closing, peer, said

SELF_SIGNED = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]


def page(*resources: Json, following: str | None = None, mode: str | None = "match") -> Json:
    search = {"search": {"mode": mode}} if mode else {}
    links = [{"relation": "self", "url": "x"}] + ([{"relation": "next", "url": following}] if following else [])
    return {
        "resourceType": "Bundle",
        "type": "searchset",
        "link": links,
        "entry": [{"resource": one, **search} for one in resources],
    }


def observation(number: int) -> Json:
    return {"resourceType": "Observation", "id": str(number)}


def outcome(text: str = "bad value", expression: str = "Observation.status", code: str = "invalid") -> Json:
    issue = {"severity": "error", "code": code, "diagnostics": text, "expression": [expression]}
    return {"resourceType": "OperationOutcome", "issue": [issue]}


def three_pages(path: str) -> Answer:
    number = int(path.partition("page=")[2] or "1")
    following = f"?page={number + 1}" if number < 3 else None
    return said(page(observation(2 * number), observation(2 * number + 1), following=following))


async def test_search_follows_pages_and_sends_what_was_asked() -> None:
    with peer(three_pages) as server:
        async with closing(client(server, token="secret-1")) as fhir:
            found = await fhir.search("Observation", {"code": ["http://loinc.org|2857-1"], "_sort": "-date"})
    assert [one["id"] for one in found] == ["2", "3", "4", "5", "6", "7"]
    method, path, headers, _ = server.requests[0]
    assert (method, path) == ("GET", "/fhir/Observation?code=http%3A%2F%2Floinc.org%7C2857-1&_sort=-date")
    assert headers["Authorization"] == "Bearer secret-1"
    assert headers["Accept"] == "application/fhir+json"


async def test_limit_ends_the_search_early() -> None:
    with peer(three_pages) as server:
        async with closing(client(server)) as fhir:
            assert len(await fhir.search("Observation", {}, limit=3)) == 3
    assert len(server.requests) == 2


async def test_only_matches_of_the_asked_type_are_given() -> None:
    mixed = page(observation(1), {"resourceType": "Patient", "id": "p"}, outcome())
    mixed["entry"] += page(observation(2), mode="include")["entry"] + page(observation(3), mode=None)["entry"]
    mixed["entry"] += [None, {"fullUrl": "x"}, {"resource": "text"}]
    with peer(said(mixed)) as server:
        async with closing(client(server)) as fhir:
            assert [one["id"] for one in await fhir.search("Observation", {})] == ["1", "3"]
            assert await fhir.search("Device", {}) == []


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (said(page(observation(1), following="http://other.invalid/fhir/Observation")), "another origin"),
        (said(page(observation(1), following="https://127.0.0.1/fhir/Observation")), "another origin"),
        (said(page(observation(1), following="file:///etc/passwd")), "another origin"),
        (said(page(observation(1), following="//127.0.0.1:1/x")), "another origin"),
        (said(page(observation(1), following="http://127.0.0.1:port/")), "is no URL"),
        (said(page(observation(1), following="/fhir/Observation")), "loop"),
        (said(page(*map(observation, range(12)))), r"max_resources \(10\)"),
        (said({"resourceType": "Patient"}), "something else than a Bundle"),
        (said([]), "something else than a Bundle"),
        ((200, {"Content-Type": "text/html"}, b"<html>Sign in</html>"), r"not JSON \(text/html\)"),
        ((200, {}, b"[" * 7000), "not JSON"),
        ((200, {}, b" " * 9000), r"max_answer_bytes \(8000\)"),
        (said(outcome("Unknown search parameter"), 400), "error invalid at Observation.status"),
        (said(None, 401), "Check token"),
        (said(None, 404), "url is not the FHIR base"),
        ((302, {"Location": "http://other.invalid/"}, b""), "redirects"),
    ],
)
async def test_search_refuses_what_it_cannot_trust(answer: Answer, told: str) -> None:
    with peer(answer) as server:
        async with closing(client(server, max_answer_bytes=8000, max_resources=10)) as fhir:
            with pytest.raises(Permanent, match=told):
                await fhir.search("Observation", {})
    assert len(server.requests) == 1


async def test_same_port_of_another_host_is_another_origin() -> None:
    with peer(lambda path: said(page(observation(1), following=f"http://localhost:{server.server_port}/x"))) as server:
        async with closing(client(server)) as fhir:
            with pytest.raises(Permanent, match="another origin"):
                await fhir.search("Observation", {})
    assert len(server.requests) == 1


async def test_endless_pages_end_at_the_limit() -> None:
    def endless(path: str) -> Answer:
        return said(page(following=f"?page={int(path.partition('page=')[2] or '1') + 1}"))

    with peer(endless) as server:
        async with closing(client(server, max_pages=4)) as fhir:
            with pytest.raises(Permanent, match=r"max_pages \(4\)"):
                await fhir.search("Observation", {})
    assert len(server.requests) == 4


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504])
async def test_passing_trouble_is_retryable_with_the_servers_wish(status: int) -> None:
    answer = outcome("try later", code="transient")
    with peer(said(answer, status, **{"Retry-After": "12"})) as server:
        async with closing(client(server)) as fhir:
            for call in (fhir.search, fhir.transaction):
                with pytest.raises(Retryable, match="error transient") as trouble:
                    await call(*(("Observation", {}) if call == fhir.search else (transaction(),)))
                assert trouble.value.retry_after_s == 12
                assert json.loads(trouble.value.answer) == answer


@pytest.mark.parametrize(
    ("header", "wait_s"),
    [
        ("7", 7),
        ("99999999999999999999999", 86400),
        ("-5", None),
        ("soon", None),
        ("", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 86400),
        ("Fri, 31 Dec 9999 23:59:59 -2300", 86400),
        ("Fri, 31 Dec 99999 23:59:59 +9999", None),
    ],
)
def test_retry_after_is_a_number_or_a_date_and_a_day_at_most(header: str, wait_s: float | None) -> None:
    assert retry_after_s({"retry-after": header}) == wait_s


def test_retry_after_as_a_date_is_the_time_until_then() -> None:
    then = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    wait_s = retry_after_s({"retry-after": then})
    assert wait_s is not None
    assert 3000 < wait_s <= 3600


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (409, None, Retryable),
        (409, "conflict", Retryable),
        (409, "duplicate", Retryable),
        (409, "processing", Retryable),
        (409, "business-rule", Permanent),
        (409, "multiple-matches", Permanent),
        (412, None, Permanent),
        (412, "multiple-matches", Permanent),
        (412, "conflict", Permanent),
        (412, "lock-error", Retryable),
        (501, "not-supported", Permanent),
        (404, "not-found", Permanent),
        (413, "too-long", Permanent),
    ],
)
async def test_conflicts_are_told_apart_by_what_the_server_says(
    status: int, code: str | None, error: type[Exception]
) -> None:
    with peer(said(outcome(code=code) if code else None, status)) as server:
        async with closing(client(server)) as fhir:
            with pytest.raises(error, match=f"HTTP {status}") as trouble:
                await fhir.transaction(transaction())
    assert code is None or f"error {code}" in str(trouble.value)


@pytest.mark.parametrize("status", [400, 409, 422, 503])
async def test_the_servers_words_are_kept_and_not_told(status: int) -> None:
    """What a server writes may name a patient: the whole answer is kept, the message has codes and elements only."""
    details = {"text": "Doe^Jane", "coding": [{"code": "MSG_BAD_SYNTAX", "display": "Doe"}, {"code": "Jane Doe"}]}
    issue = {"severity": "Doe Jane", "code": "invalid", "diagnostics": "Jane Doe 19700101", "details": details}
    said_so = {"resourceType": "OperationOutcome", "issue": [{**issue, "location": ["Patient.name[0]", "x = 'Doe'"]}]}
    refused = response("201 Created", f"{status} Doe", outcome=said_so)
    for answer in (said(said_so, status), said(refused)):
        with peer(answer) as server:
            async with closing(client(server)) as fhir:
                with pytest.raises((Permanent, Retryable)) as trouble:
                    await fhir.transaction(transaction())
        assert "invalid (MSG_BAD_SYNTAX, ?) at Patient.name[0], ?" in str(trouble.value)
        assert "Doe" not in f"{trouble.value} {trouble.value!r}"
        assert b"Jane Doe 19700101" in trouble.value.answer


async def test_of_a_huge_answer_the_beginning_is_kept() -> None:
    with peer((400, {}, b"x" * (3 << 20))) as server:
        async with closing(client(server)) as fhir:
            with pytest.raises(Permanent) as trouble:
                await fhir.transaction(transaction())
    assert trouble.value.answer == b"x" * (1 << 20)


async def test_large_error_page_is_still_that_error() -> None:
    with peer((503, {}, b"x" * 9000)) as server:
        async with closing(client(server, max_answer_bytes=100)) as fhir:
            with pytest.raises(Retryable, match="HTTP 503"):
                await fhir.read("Patient/1")


def entry(method: str = "PUT", **request: str) -> Json:
    return {"resource": observation(1), "request": {"method": method, "url": "Observation?identifier=a|b", **request}}


def transaction(*entries: Json) -> Json:
    return {"resourceType": "Bundle", "type": "transaction", "entry": list(entries) or [entry(), entry()]}


def response(*statuses: str, **more: object) -> Json:
    entries = [{"response": {"status": status, **more}} for status in statuses]
    return {"resourceType": "Bundle", "type": "transaction-response", "entry": entries}


async def test_transaction_is_posted_to_the_base_and_its_response_returned() -> None:
    answer = response("201 Created", "200 OK")
    with peer(said(answer)) as server:
        async with closing(client(server)) as fhir:
            assert await fhir.transaction(transaction()) == answer
    method, path, headers, body = server.requests[0]
    assert (method, path, headers["Content-Type"]) == ("POST", "/fhir", "application/fhir+json")
    assert json.loads(body) == transaction()


@pytest.mark.parametrize(
    ("answer", "error", "told"),
    [
        (said(outcome("bad code"), 400), Permanent, "error invalid at Observation.status"),
        (said(outcome("no such profile"), 422), Permanent, "error invalid"),
        (said(None, 412), Permanent, "more than one resource"),
        (said(None, 403), Permanent, "Check token"),
        (
            said(response("201 Created", "422 Unprocessable", outcome=outcome("why"))),
            Permanent,
            "entry 2: 422 error invalid",
        ),
        (said(response("201 Created", "500")), Permanent, "refused 1 of 2 entries"),
        (said(response("201 Created")), Ambiguous, "accounts for 1 of 2"),
        (said(response("201 Created", "")), Ambiguous, "accounts for 1 of 2"),
        (said({"resourceType": "Bundle"}), Ambiguous, "accounts for 0 of 2"),
        (said(outcome("fine")), Ambiguous, "sent no Bundle"),
        ((200, {"Content-Type": "text/html"}, b"<html>"), Ambiguous, "not JSON"),
        ((200, {}, b" " * 9000), Ambiguous, "max_answer_bytes"),
        (None, Retryable, "no answer"),
    ],
)
async def test_transaction_faults(answer: Answer, error: type[Exception], told: str) -> None:
    with peer(answer) as server:
        async with closing(client(server, max_answer_bytes=8000)) as fhir:
            with pytest.raises(error, match=told):
                await fhir.transaction(transaction())


@pytest.mark.parametrize(
    ("bundle", "error"),
    [
        (transaction(entry("PUT"), entry("DELETE"), entry("POST", ifNoneExist="identifier=a|b")), Retryable),
        (transaction(entry("PUT"), entry("POST")), Ambiguous),
        (transaction({"resource": observation(1)}), Ambiguous),
    ],
)
async def test_silence_after_sending_is_retryable_only_if_repeating_is_harmless(
    bundle: Json, error: type[Exception]
) -> None:
    def silent(path: str) -> Answer:
        time.sleep(0.6)
        return None

    for script in (silent, None, said(None, 504)):
        with peer(script) as server:
            async with closing(client(server, read_timeout_s=0.3)) as fhir:
                with pytest.raises(error):
                    await fhir.transaction(bundle)


@pytest.mark.parametrize("bundle", [{}, {"type": "batch", "entry": [entry()]}, {"type": "transaction", "entry": []}])
async def test_what_is_no_transaction_is_not_sent(bundle: Json) -> None:
    with peer(said({})) as server:
        async with closing(client(server)) as fhir:
            with pytest.raises(Permanent, match="not a transaction Bundle"):
                await fhir.transaction(bundle)
    assert server.requests == []


async def test_read_takes_references_to_this_server_only() -> None:
    with peer(said({"resourceType": "Patient", "id": "1"})) as server:
        async with closing(client(server)) as fhir:
            base = f"http://127.0.0.1:{server.server_port}/fhir"
            for reference in ("Patient/1", f"{base}/Patient/1", "Patient/1/_history/2"):
                assert (await fhir.read(reference))["id"] == "1"
            for reference in ("http://other.invalid/fhir/Patient/1", "Patient/../x", "urn:uuid:1", "Patient", "#p"):
                with pytest.raises(Permanent, match="not Type/id"):
                    await fhir.read(reference)
            with pytest.raises(Permanent, match="another type"):
                await fhir.read("Observation/1")
            with pytest.raises(Permanent, match="not a FHIR resource type"):
                await fhir.search("../Patient", {})
    assert len(server.requests) == 4


async def test_probe_wants_r4() -> None:
    statement = {"resourceType": "CapabilityStatement", "fhirVersion": "4.0.1", "software": {"name": "Some EHR"}}
    with peer(said(statement)) as server:
        async with closing(client(server, name="clinic")) as fhir:
            assert await fhir.probe() == "clinic: Some EHR, FHIR 4.0.1"
    with peer(said({**statement, "fhirVersion": "5.0.0"})) as server:
        async with closing(client(server)) as fhir:
            with pytest.raises(Permanent, match=r"speaks FHIR 5\.0\.0"):
                await fhir.probe()
    with peer(said(outcome())) as server:
        async with closing(client(server)) as fhir:
            with pytest.raises(Permanent, match="sent none"):
                await fhir.probe()


async def test_refused_connection_is_retryable_for_everything() -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        fhir = FhirClient(FhirConfig(url=f"http://127.0.0.1:{unheard.getsockname()[1]}"))
        for call in (fhir.probe(), fhir.read("Patient/1"), fhir.transaction(transaction(entry("POST")))):
            with pytest.raises(Retryable, match="no connection"):
                await call
        await fhir.aclose()


async def test_slow_trickle_ends_at_the_time_limit() -> None:
    with peer((200, {"Content-Length": "100"}, b"{")) as server:
        async with closing(client(server, read_timeout_s=5, request_timeout_s=0.3)) as fhir:
            started = time.monotonic()
            with pytest.raises(Retryable, match="time limit"):
                await fhir.read("Patient/1")
            assert time.monotonic() - started < 3


async def test_tls_is_checked(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = [*SELF_SIGNED, "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)
    with peer(said({"resourceType": "Patient", "id": "1"})) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        url = f"https://127.0.0.1:{server.server_port}/fhir"
        async with closing(FhirClient(FhirConfig(url=url, ca_file=cert))) as fhir:
            assert (await fhir.read("Patient/1"))["id"] == "1"
        async with closing(FhirClient(FhirConfig(url=url))) as fhir:
            with pytest.raises(Permanent, match="not trusted"):
                await fhir.read("Patient/1")
