"""Orthanc's change log: a real Orthanc that stores, rests and deletes, and servers that misbehave."""

import asyncio
import io
import json
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pydicom
import pytest

from connectors.errors import Permanent, Retryable
from connectors.orthanc.client import Change, OrthancChanges
from connectors.orthanc.config import OrthancConfig
from deploy.hospital.pacs import RunningOrthanc, start_orthanc
from tests.contract.test_dicomweb_faults import (
    SELF_SIGNED,
    Script,
    answer,
    free_port,
    hang_up,
    hostile,
    read_request,
    then_silent,
)

SOURCE = min((Path(__file__).parents[3] / "shared" / "data" / "prostatex-0000" / "images").rglob("*.dcm"))
ID = "04ea0385-8a470c6b-d9b3f621-8574cf43-a9b1c900"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningOrthanc]:
    with start_orthanc(tmp_path_factory.mktemp("orthanc"), stable_age_s=1) as running:
        yield running


@asynccontextmanager
async def client(url: str, **settings: Any) -> AsyncIterator[OrthancChanges]:
    opened = OrthancChanges(OrthancConfig.model_validate({"url": url, **settings}))
    try:
        yield opened
    finally:
        await opened.aclose()


def stored(server: RunningOrthanc, study: str, series: str, instance: str) -> str:
    """Stores one instance of this study; its Orthanc id of the study."""
    dataset = pydicom.dcmread(SOURCE)
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.SOPInstanceUID = study, series, instance
    dataset.file_meta.MediaStorageSOPInstanceUID = instance
    content = io.BytesIO()
    dataset.save_as(content)
    answered = httpx.post(f"{server.http_url}/instances", content=content.getvalue(), trust_env=False)
    return str(answered.raise_for_status().json()["ParentStudy"])


async def until_stable(changes: OrthancChanges, sequence: int, *, limit: int = 100) -> list[Change]:
    """What is told from `sequence` on, up to the first StableStudy."""
    told: list[Change] = []
    for _ in range(100):
        page = await changes.changes_since(sequence, limit)
        sequence, told = page.last, [*told, *page.items]
        if any(change.kind == "StableStudy" for change in page.items):
            return told
        if page.done:
            await asyncio.sleep(0.2)
    raise AssertionError("no StableStudy")


@pytest.mark.parametrize("limit", [1, 3, 1000])
async def test_a_study_is_told_when_it_begins_grows_and_rests(server: RunningOrthanc, limit: int) -> None:
    study = f"1.2.{limit}.1"
    async with client(server.http_url) as changes:
        start = await changes.last_sequence()
        stored(server, study, f"{study}.1", f"{study}.1.1")
        stored(server, study, f"{study}.2", f"{study}.2.1")
        told = await until_stable(changes, start, limit=limit)
        stored(server, study, f"{study}.2", f"{study}.2.2")
        later = await until_stable(changes, told[-1].sequence, limit=limit)
    assert sorted(change.kind for change in told) == ["NewSeries", "NewSeries", "NewStudy", "StableStudy"]
    assert {change.study_instance_uid for change in [*told, *later]} == {study}
    numbers = [change.sequence for change in [*told, *later]]
    assert numbers == sorted(set(numbers))
    assert [change.kind for change in later] == ["StableStudy"]


async def test_pages_end_and_can_be_asked_again(server: RunningOrthanc) -> None:
    async with client(server.http_url) as changes:
        start = await changes.last_sequence()
        stored(server, "1.5.1", "1.5.1.1", "1.5.1.1.1")
        await until_stable(changes, start)
        end = await changes.last_sequence()
        pages = [await changes.changes_since(start, 2)]
        while not pages[-1].done:
            pages.append(await changes.changes_since(pages[-1].last, 2))
        again = await changes.changes_since(start)
        nothing = await changes.changes_since(end)
    assert pages[-1].last == again.last == nothing.last == end
    assert tuple(change for page in pages for change in page.items) == again.items
    assert (nothing.items, nothing.done, nothing.reset) == ((), True, False)


async def test_a_study_deleted_meanwhile_is_passed_over(server: RunningOrthanc) -> None:
    async with client(server.http_url) as changes:
        start = await changes.last_sequence()
        orthanc_id = stored(server, "1.6.1", "1.6.1.1", "1.6.1.1.1")
        stored(server, "1.6.2", "1.6.2.1", "1.6.2.1.1")
        await asyncio.to_thread(httpx.delete, f"{server.http_url}/studies/{orthanc_id}", trust_env=False)
        told = await until_stable(changes, start)
    assert {change.study_instance_uid for change in told} == {"1.6.2"}


@pytest.mark.filterwarnings("ignore:.*Invalid value for VR UI")
async def test_an_odd_study_uid_does_not_hold_up_the_log(server: RunningOrthanc) -> None:
    odd = f"1.9.odd.{'9' * 60}"
    async with client(server.http_url) as changes:
        start = await changes.last_sequence()
        stored(server, odd, "1.9.1", "1.9.1.1")
        told = await until_stable(changes, start)
    assert {change.study_instance_uid for change in told} == {odd}


async def test_a_database_that_was_reset_is_noticed(tmp_path: Path) -> None:
    with start_orthanc(tmp_path / "old") as old:
        stored(old, "1.7.1", "1.7.1.1", "1.7.1.1.1")
        async with client(old.http_url) as changes:
            remembered = await changes.last_sequence()
    with start_orthanc(tmp_path / "new") as new:
        async with client(new.http_url) as changes:
            assert await changes.last_sequence() == 0
            page = await changes.changes_since(remembered)
            untouched = await changes.changes_since(0)
    assert remembered > 0
    assert (page.reset, page.last, page.items, page.done) == (True, 0, (), False)
    assert (untouched.reset, untouched.done) == (False, True)


async def test_the_log_survives_a_restart_of_the_server(tmp_path: Path) -> None:
    with start_orthanc(tmp_path) as first:
        stored(first, "1.8.1", "1.8.1.1", "1.8.1.1.1")
        async with client(first.http_url) as changes:
            remembered = (await changes.changes_since(0, 1)).last
    with start_orthanc(tmp_path) as second:
        async with client(second.http_url) as changes:
            told = await changes.changes_since(remembered)
    assert "1.8.1" in {change.study_instance_uid for change in told.items}


async def test_probe_names_the_server(server: RunningOrthanc) -> None:
    async with client(server.http_url, name="archive") as changes:
        assert (await changes.probe()).startswith("archive: Orthanc 1.")
    async with client(server.dicomweb_url) as misled:
        with pytest.raises(Permanent, match="REST root"):
            await misled.probe()


async def test_bad_numbers_are_refused_before_asking() -> None:
    async with client(f"http://127.0.0.1:{free_port()}") as changes:
        for sequence, limit in ((-1, 10), (0, 0), (0, -5)):
            with pytest.raises(Permanent, match="0 or more"):
                await changes.changes_since(sequence, limit)


# Servers that misbehave.


def entry(sequence: object, kind: object = "NewPatient", orthanc_id: object = ID) -> dict[str, object]:
    return {"ChangeType": kind, "ID": orthanc_id, "Seq": sequence, "Path": "/elsewhere"}


def page(*entries: object, last: object = 9, done: object = True) -> Script:
    return answer("200 OK", body=json.dumps({"Changes": entries, "Last": last, "Done": done}).encode())


@pytest.mark.parametrize(
    ("script", "error", "told"),
    [
        (answer("200 OK", body=b"<html>"), Permanent, "not JSON"),
        (answer("200 OK", body=b"[" * 100_000), Permanent, "not JSON"),
        (answer("200 OK", body=b" " * 300_000), Permanent, "max_answer_bytes"),
        (answer("200 OK", body=b"[]"), Permanent, "not a list of changes"),
        (answer("200 OK", body=b"null"), Permanent, "not a list of changes"),
        (answer("200 OK", body=b'{"Changes": {}, "Last": 1, "Done": true}'), Permanent, "not a list of changes"),
        (page(last="9"), Permanent, "not a list of changes"),
        (page(last=True), Permanent, "not a list of changes"),
        (page(done="no"), Permanent, "not a list of changes"),
        (page(7), Permanent, "not a list of changes"),
        (page(entry("6")), Permanent, "not a list of changes"),
        (page(entry(6, 4)), Permanent, "not a list of changes"),
        (page(entry(6, "NewStudy", "../system")), Permanent, "not a list of changes"),
        (page(entry(6), entry(6)), Permanent, "do not rise"),
        (page(entry(5)), Permanent, "do not rise"),
        (page(*(entry(n) for n in range(6, 20))), Permanent, "more than the 10"),
        (page(done=False), Permanent, "says that there are more, and gives none"),
        (answer("404 Not Found"), Permanent, "REST root"),
        (answer("401 Unauthorized"), Permanent, "Check user and password"),
        (answer("302 Found", "Location: http://elsewhere.invalid/\r\n"), Permanent, "redirects elsewhere"),
        (answer("400 Bad Request"), Permanent, "refused the request"),
        (answer("503 Busy", "Retry-After: 7\r\n"), Retryable, "HTTP 503"),
        (hang_up, Retryable, "connection broke"),
        (then_silent, Retryable, "time limit"),
    ],
)
async def test_faults_are_named(script: Script, error: type[Exception], told: str) -> None:
    with hostile(script) as url:
        async with client(url, read_timeout_s=0.4, max_answer_bytes=200_000) as changes:
            with pytest.raises(error, match=told):
                await changes.changes_since(5, 10)


def two_answers(log: Script, study: Script) -> Script:
    """A server with one answer for the log and one for all else."""

    def script(peer: socket.socket) -> None:
        is_log = b"/changes" in peer.recv(65536, socket.MSG_PEEK).split(b"\r\n")[0]
        (log if is_log else study)(peer)

    return script


@pytest.mark.parametrize("body", [b"[]", b"{}", b'{"MainDicomTags": 3}', b'{"MainDicomTags": {"StudyInstanceUID": 3}}'])
async def test_a_study_without_uid_is_refused(body: bytes) -> None:
    with hostile(two_answers(page(entry(6, "StableStudy")), answer("200 OK", body=body))) as url:
        async with client(url) as changes:
            with pytest.raises(Permanent, match="no Study Instance UID"):
                await changes.changes_since(5)


async def test_a_busy_server_loses_no_change() -> None:
    """The look-up failed, so the page is not given without it."""
    with hostile(two_answers(page(entry(6, "StableStudy")), answer("503 Busy", "Retry-After: 7\r\n"))) as url:
        async with client(url) as changes:
            with pytest.raises(Retryable) as busy:
                await changes.changes_since(5)
    assert busy.value.retry_after_s == 7


async def test_a_last_number_beyond_the_page_skips_nothing() -> None:
    with hostile(page(entry(6), entry(8), last=10**15)) as url:
        async with client(url) as changes:
            assert (await changes.changes_since(5)).last == 8


async def test_a_slow_trickle_ends_at_its_time_limit() -> None:
    def trickle(peer: socket.socket) -> None:
        read_request(peer)
        peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n")
        for _ in range(100):
            peer.sendall(b" ")
            time.sleep(0.02)

    with hostile(trickle) as url:
        async with client(url, request_timeout_s=0.3) as changes:
            with pytest.raises(Retryable, match="time limit"):
                await changes.last_sequence()


async def test_a_server_that_is_down_is_retryable() -> None:
    async with client(f"http://127.0.0.1:{free_port()}") as changes:
        with pytest.raises(Retryable, match="no connection"):
            await changes.probe()


async def test_tls_is_checked_and_the_sign_in_sent(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = [*SELF_SIGNED, "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)

    def secured(peer: socket.socket) -> None:
        with context.wrap_socket(peer.dup(), server_side=True) as inner:
            signed_in = b"authorization: basic dtpw" in read_request(inner).lower()
            body = b'{"Changes": [], "Last": 3, "Done": true}'
            status = b"200 OK" if signed_in else b"401 Unauthorized"
            inner.sendall(
                b"HTTP/1.1 %b\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (status, len(body), body)
            )

    with hostile(secured) as url:
        secure = url.replace("http:", "https:")
        async with client(secure, ca_file=cert, user="u", password="p") as trusting:
            assert await trusting.last_sequence() == 3
        async with client(secure, ca_file=cert) as unknown:
            with pytest.raises(Permanent, match="not allowed"):
                await unknown.last_sequence()
        async with client(secure) as stranger:
            with pytest.raises(Permanent, match="not trusted"):
                await stranger.last_sequence()
