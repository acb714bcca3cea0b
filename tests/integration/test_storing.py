"""DICOM out: what STOW-RS answers and what QIDO-RS shows afterwards, before a real Orthanc behind a proxy."""

import json
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from io import BytesIO
from typing import Any

import pytest
from fastapi import Response
from pydicom.uid import UID

from connectors.dicomweb.client import DicomwebClient
from connectors.dicomweb.config import DicomwebConfig
from deploy.hospital.pacs import RunningOrthanc
from mappings.model.ids import derive_uid
from middleware.release.deliveries import Outcome
from middleware.release.storing import send_to_pacs
from tests.builders import STUDY_UID
from tests.dicom_sources import build_sources
from tests.proxy import Judge, Proxy, open_proxy

SOON, LONG = timedelta(seconds=1), timedelta(minutes=10)


@pytest.fixture(scope="module")
def proxy(orthanc: RunningOrthanc) -> Iterator[Proxy]:
    with open_proxy(orthanc.http_url) as opened:
        yield opened


@pytest.fixture
async def pacs(proxy: Proxy) -> AsyncIterator[DicomwebClient]:
    proxy.seen.clear()
    proxy.judge = lambda method, path, body: None
    client = DicomwebClient(DicomwebConfig(url=f"{proxy.url}/dicom-web"))
    yield client
    await client.aclose()


def instance(name: str, content_time: str = "103000.000000") -> bytes:
    source = build_sources()[0]
    source.SOPInstanceUID = source.file_meta.MediaStorageSOPInstanceUID = UID(derive_uid(name, "stored"))
    source.file_meta.MediaStorageSOPClassUID = source.SOPClassUID
    source.ContentDate, source.ContentTime = "20260304", content_time
    buffer = BytesIO()
    source.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


async def send(
    pacs: DicomwebClient, data: bytes, *, is_first: bool = True, waited: timedelta = SOON, within: timedelta = LONG
) -> Outcome:
    return await send_to_pacs(pacs, data, STUDY_UID, is_first=is_first, waited=waited, confirm_within=within)


def on(method: str, answer: Response, times: int = 99) -> Judge:
    left = [times]

    def judge(seen: str, path: str, body: bytes) -> Response | None:
        if seen != method or left[0] == 0:
            return None
        left[0] -= 1
        return answer

    return judge


def stow(status: int, name: str, sequence: str, reason_tag: str = "", code: int = 0) -> Response:
    item: dict[str, Any] = {"00081155": {"vr": "UI", "Value": [derive_uid(name, "stored")]}}
    if reason_tag:
        item[reason_tag] = {"vr": "US", "Value": [code]}
    return Response(json.dumps({sequence: {"vr": "SQ", "Value": [item]}}), status, media_type="application/dicom+json")


NOTHING_FOUND = Response(status_code=204)
STORED, FAILED = "00081199", "00081198"


async def test_what_is_stored_and_shown_is_delivered(pacs: DicomwebClient) -> None:
    outcome = await send(pacs, instance("plain"))
    assert outcome == Outcome("delivered", receipt=f"stored {derive_uid('plain', 'stored')}; found by QIDO-RS")


async def test_a_pacs_that_indexes_late_is_waited_for(pacs: DicomwebClient, proxy: Proxy) -> None:
    proxy.judge = on("GET", NOTHING_FOUND, times=2)
    outcome = await send(pacs, instance("late"))
    assert (outcome.state, len(proxy.posts())) == ("delivered", 1)


async def test_stored_and_not_shown_is_tried_again_and_then_ambiguous(pacs: DicomwebClient, proxy: Proxy) -> None:
    proxy.judge = on("GET", NOTHING_FOUND)
    outcome = await send(pacs, instance("hidden"))
    assert (outcome.state, outcome.uncertain, outcome.answered) == ("retrying", True, True)
    assert outcome.reason == f"the PACS stored {derive_uid('hidden', 'stored')}, but QIDO-RS does not find it"
    late = await send(pacs, instance("hidden"), is_first=False, waited=LONG + SOON)
    assert late.state == "ambiguous"
    assert late.reason == outcome.reason


async def test_what_an_earlier_try_brought_there_is_not_sent_again(pacs: DicomwebClient, proxy: Proxy) -> None:
    await send(pacs, instance("there"))
    proxy.seen.clear()
    outcome = await send(pacs, instance("there"), is_first=False)
    uid = derive_uid("there", "stored")
    assert outcome.receipt == f"had {uid} already; it was not sent again; found by QIDO-RS"
    assert proxy.posts() == []


async def test_what_an_earlier_try_did_not_bring_there_is_sent(pacs: DicomwebClient, proxy: Proxy) -> None:
    outcome = await send(pacs, instance("lost"), is_first=False)
    assert outcome.state == "delivered"
    assert len(proxy.posts()) == 1


@pytest.mark.parametrize("is_first", [True, False])
async def test_another_instance_under_the_same_uid_is_said_so(is_first: bool, pacs: DicomwebClient) -> None:
    """Orthanc answers "stored" and keeps the one it had."""
    await send(pacs, instance(f"other-{is_first}", "080000"))
    outcome = await send(pacs, instance(f"other-{is_first}"), is_first=is_first)
    assert outcome.state == "dead"
    assert "another instance under this UID (other Content Time)" in outcome.reason


async def test_a_duplicate_that_the_pacs_refuses_is_there_all_the_same(pacs: DicomwebClient, proxy: Proxy) -> None:
    await send(pacs, instance("dup"))
    proxy.judge = on("POST", stow(409, "dup", FAILED, "00081197", 0x0111))
    outcome = await send(pacs, instance("dup"))
    assert outcome.state == "delivered"
    assert "has (an instance with this UID is there already (0111H))" in outcome.receipt


async def test_a_duplicate_that_is_not_there_is_refused(pacs: DicomwebClient, proxy: Proxy) -> None:
    proxy.judge = on("POST", stow(409, "ghost", FAILED, "00081197", 0x0111))
    outcome = await send(pacs, instance("ghost"))
    assert (outcome.state, outcome.answered) == ("dead", True)


async def test_a_warning_is_kept_with_the_receipt(pacs: DicomwebClient, proxy: Proxy) -> None:
    await send(pacs, instance("coerced"))
    proxy.judge = on("POST", stow(202, "coerced", STORED, "00081196", 0xB000))
    outcome = await send(pacs, instance("coerced"))
    assert outcome.state == "delivered"
    assert "with a warning: some elements were coerced (B000H); found by QIDO-RS" in outcome.receipt


@pytest.mark.parametrize(
    ("code", "state", "answered"), [(0x0110, "dead", True), (0xA700, "retrying", False), (0xC000, "dead", True)]
)
async def test_a_refused_instance(code: int, state: str, answered: bool, pacs: DicomwebClient, proxy: Proxy) -> None:
    proxy.judge = on("POST", stow(409, "refused", FAILED, "00081197", code))
    outcome = await send(pacs, instance("refused"))
    assert (outcome.state, outcome.answered) == (state, answered)
    assert f"{code:04X}H" in outcome.reason


async def test_a_pacs_without_qido_is_believed_and_the_receipt_says_so(pacs: DicomwebClient, proxy: Proxy) -> None:
    proxy.judge = on("GET", Response("no", 404))
    outcome = await send(pacs, instance("believed"))
    assert outcome.state == "delivered"
    assert "QIDO-RS cannot confirm it" in outcome.receipt


@pytest.mark.parametrize("is_first", [True, False])
async def test_a_pacs_whose_search_fails_just_now_is_asked_later(
    is_first: bool, pacs: DicomwebClient, proxy: Proxy
) -> None:
    proxy.judge = on("GET", Response("busy", 503, {"Retry-After": "7"}))
    outcome = await send(pacs, instance(f"asked-{is_first}"), is_first=is_first)
    assert (outcome.state, outcome.retry_after_s, outcome.uncertain) == ("retrying", 7.0, True)
