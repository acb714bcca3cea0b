"""The DICOMweb connector against servers that misbehave: every fault has its name and leaves nothing behind."""

import asyncio
import errno
import io
import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pydicom
import pytest

from connectors.dicomweb import spool
from connectors.dicomweb.client import DicomwebClient
from connectors.dicomweb.config import DicomwebConfig
from connectors.errors import Permanent, Retryable

STUDY = Path(__file__).parents[3] / "shared" / "data" / "prostatex-0000" / "images"
ANY_UID = "1.2.3"

SELF_SIGNED = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def one_file() -> Path:
    return min(STUDY.rglob("*.dcm"))


@pytest.fixture
def study_uid() -> str:
    return str(pydicom.dcmread(one_file(), stop_before_pixels=True).StudyInstanceUID)


# Servers that misbehave: each answers one connection after the other with the same bytes.

Script = Callable[[socket.socket], None]


def read_request(peer: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        data += peer.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            while len(body) < int(line.split(b":")[1]):
                body += peer.recv(65536)
    return head + b"\r\n\r\n" + body


@contextmanager
def hostile(script: Script) -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):
            while True:
                peer, _ = listener.accept()
                with peer, suppress(OSError):
                    script(peer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/dicom-web"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)
        assert not thread.is_alive()


def answer(status: str, headers: str = "", body: bytes = b"", *, length: bool = True) -> Script:
    sized = f"Content-Length: {len(body)}\r\n" if length else ""
    head = f"HTTP/1.1 {status}\r\n{headers}{sized}Connection: close\r\n\r\n".encode()

    def script(peer: socket.socket) -> None:
        read_request(peer)
        peer.sendall(head + body)

    return script


def then_silent(peer: socket.socket) -> None:
    read_request(peer)
    time.sleep(1)


def hang_up(peer: socket.socket) -> None:
    read_request(peer)


def nonsense(peer: socket.socket) -> None:
    read_request(peer)
    peer.sendall(b"nonsense\r\n\r\n")


MULTIPART = 'Content-Type: multipart/related; type="application/dicom"; boundary=b1\r\n'
HEAD = f"HTTP/1.1 200 OK\r\n{MULTIPART}Connection: close\r\n\r\n".encode()
PART = b"--b1\r\nContent-Type: application/dicom\r\n\r\n" + b"x" * 5000 + b"\r\n"


@pytest.mark.parametrize(
    ("script", "error", "told"),
    [
        (answer("200 OK", MULTIPART, PART + PART, length=False), Retryable, "after 1 whole parts"),
        (answer("200 OK", MULTIPART, PART[:3000], length=False), Retryable, "after 0 whole parts"),
        (answer("200 OK", MULTIPART, b""), Retryable, "stopped before its closing boundary"),
        (answer("200 OK", MULTIPART, b"--b1--\r\n"), Permanent, "no instances"),
        (answer("204 No Content"), Permanent, "no instances"),
        (answer("200 OK", "Content-Type: text/html\r\n", b"<html>"), Permanent, "'text/html' instead of multipart"),
        (answer("200 OK", "Content-Type: multipart/related\r\n", PART), Permanent, "usable boundary"),
        (answer("200 OK", MULTIPART, b"--b1\r\nX: " + b"y" * 20000), Permanent, "headers of more than"),
        (answer("200 OK", MULTIPART, b"z" * 99999), Permanent, "no boundary in the first"),
        (
            answer("200 OK", MULTIPART, b"--b1\r\nContent-Length: 3\r\n\r\nabcdef\r\n--b1--"),
            Permanent,
            "no boundary where its Content-Length ends",
        ),
        (
            answer("200 OK", MULTIPART, b"--b1\r\nContent-Type: text/plain\r\n\r\nsorry\r\n--b1--"),
            Permanent,
            "'text/plain', not application/dicom",
        ),
        (answer("200 OK", MULTIPART + "Content-Encoding: gzip\r\n", b"zz"), Permanent, "compressed"),
        (answer("302 Found", "Location: http://elsewhere.invalid/\r\n"), Permanent, "redirects elsewhere"),
        (answer("403 Forbidden"), Permanent, "Check token"),
        (answer("406 Not Acceptable"), Permanent, "refused the request"),
        (answer("500 Oops"), Retryable, "HTTP 500"),
        (hang_up, Retryable, "connection broke"),
        (nonsense, Retryable, "connection broke"),
        (then_silent, Retryable, "read_timeout_s=0.4"),
    ],
)
async def test_retrieve_faults_are_named_and_leave_nothing(
    script: Script, error: type[Exception], told: str, tmp_path: Path
) -> None:
    with hostile(script) as url:
        client = DicomwebClient(DicomwebConfig(url=url, read_timeout_s=0.4))
        with pytest.raises(error, match=told):
            await client.fetch_study(ANY_UID, tmp_path / "study")
        await client.aclose()
    assert names(tmp_path) == []


async def test_failed_fetch_keeps_the_study_fetched_before(tmp_path: Path) -> None:
    with hostile(answer("200 OK", MULTIPART, PART + b"--b1--")) as url:
        await DicomwebClient(DicomwebConfig(url=url)).fetch_study(ANY_UID, tmp_path / "study")
    with hostile(answer("200 OK", MULTIPART, PART, length=False)) as url, pytest.raises(Retryable):
        await DicomwebClient(DicomwebConfig(url=url)).fetch_study(ANY_UID, tmp_path / "study")
    with hostile(answer("200 OK", MULTIPART, PART + PART + b"--b1--")) as url:
        assert (tmp_path / "study" / "000001.dcm").read_bytes() == b"x" * 5000
        again = await DicomwebClient(DicomwebConfig(url=url)).fetch_study(ANY_UID, tmp_path / "study")
    assert [path.read_bytes() for path in again.files] == [b"x" * 5000] * 2
    assert names(tmp_path) == ["study"]


@pytest.mark.parametrize(("value", "low_s", "high_s"), [("7", 7, 7), ("Fri, 31 Dec 2100 23:59:59 GMT", 1e6, 1e10)])
async def test_retry_after_is_passed_on(value: str, low_s: float, high_s: float, tmp_path: Path) -> None:
    with hostile(answer("503 Busy", f"Retry-After: {value}\r\n")) as url:
        client = DicomwebClient(DicomwebConfig(url=url))
        for call in (client.fetch_study(ANY_UID, tmp_path / "study"), client.probe()):
            with pytest.raises(Retryable) as busy:
                await call
            assert busy.value.retry_after_s is not None
            assert low_s <= busy.value.retry_after_s <= high_s
        await client.aclose()


async def test_refused_connection_is_retryable(tmp_path: Path, study_uid: str) -> None:
    client = DicomwebClient(DicomwebConfig(url=f"http://127.0.0.1:{free_port()}"))
    for call in (client.probe(), client.fetch_study(study_uid, tmp_path / "s"), client.store([one_file()], study_uid)):
        with pytest.raises(Retryable, match="no connection"):
            await call
    await client.aclose()


async def test_study_over_the_limit_is_permanent(tmp_path: Path) -> None:
    with hostile(answer("200 OK", MULTIPART, PART * 4 + b"--b1--")) as url:
        client = DicomwebClient(DicomwebConfig(url=url, max_study_bytes=9000))
        with pytest.raises(Permanent, match="max_study_bytes"):
            await client.fetch_study(ANY_UID, tmp_path / "study")
    assert names(tmp_path) == []


async def test_endless_study_ends_at_its_time_limit(tmp_path: Path) -> None:
    def trickle(peer: socket.socket) -> None:
        answer("200 OK", MULTIPART, PART, length=False)(peer)
        for _ in range(100):
            peer.sendall(b"y")
            time.sleep(0.02)

    with hostile(trickle) as url:
        client = DicomwebClient(DicomwebConfig(url=url, study_timeout_s=0.3))
        with pytest.raises(Retryable, match="study_timeout_s"):
            await client.fetch_study(ANY_UID, tmp_path / "study")


async def test_cancelled_fetch_leaves_nothing(tmp_path: Path) -> None:
    def slow(peer: socket.socket) -> None:
        answer("200 OK", MULTIPART, PART, length=False)(peer)
        for _ in range(50):
            peer.sendall(PART)
            time.sleep(0.02)

    with hostile(slow) as url:
        client = DicomwebClient(DicomwebConfig(url=url))
        fetching = asyncio.create_task(client.fetch_study(ANY_UID, tmp_path / "study"))
        await asyncio.sleep(0.2)
        assert [name[:15] for name in names(tmp_path)] == [".study.partial-"]
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
        await asyncio.sleep(0.3)
        assert names(tmp_path) == []


async def test_full_disk_is_retryable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(spool, "FileIO", Full)
    with (
        hostile(answer("200 OK", MULTIPART, PART + b"--b1--")) as url,
        pytest.raises(Retryable, match=r"disk of .* is full"),
    ):
        await DicomwebClient(DicomwebConfig(url=url)).fetch_study(ANY_UID, tmp_path / "study")
    assert names(tmp_path) == []


async def test_unusable_target_folder_is_permanent(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        hostile(answer("200 OK", MULTIPART, PART + b"--b1--")) as url,
        pytest.raises(Permanent, match="cannot write"),
    ):
        await DicomwebClient(DicomwebConfig(url=url)).fetch_study(ANY_UID, tmp_path / "file" / "study")


def store_answer(stored: list[str], failed: dict[str, int]) -> bytes:
    def item(uid: str, **more: int) -> dict[str, Any]:
        return {"00081155": {"vr": "UI", "Value": [uid]}} | {
            tag: {"vr": "US", "Value": [value]} for tag, value in more.items()
        }

    sequences = {
        "00081199": {"vr": "SQ", "Value": [item(uid) for uid in stored]},
        "00081198": {"vr": "SQ", "Value": [item(uid, **{"00081197": code}) for uid, code in failed.items()]},
    }
    return json.dumps(sequences).encode()


@pytest.mark.parametrize("status", ["200 OK", "202 Accepted", "409 Conflict", "400 Bad Request"])
async def test_each_instance_gets_the_outcome_the_server_names(status: str, study_uid: str) -> None:
    paths = sorted(STUDY.rglob("*.dcm"))[:3]
    uids = [str(pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID) for path in paths]
    with hostile(answer(status, body=store_answer(uids[:1], {uids[1]: 0xA700}))) as url:
        client = DicomwebClient(DicomwebConfig(url=url))
        outcomes = await client.store(paths, study_uid)
        await client.aclose()
    assert [outcome.sop_instance_uid for outcome in outcomes] == uids
    assert [outcome.stored for outcome in outcomes] == [True, False, False]
    assert [outcome.retryable for outcome in outcomes] == [False, True, False]
    assert outcomes[1].reason == "out of resources (A700H)"
    assert "does not mention it" in outcomes[2].reason


@pytest.mark.parametrize("body", [b"", b"{}", b"<html>fine</html>", b"null", b"[[[["])
async def test_success_without_an_account_is_not_called_stored(body: bytes, study_uid: str) -> None:
    with hostile(answer("200 OK", body=body)) as url:
        client = DicomwebClient(DicomwebConfig(url=url))
        outcomes = await client.store([one_file()], study_uid)
        await client.aclose()
    assert [(outcome.stored, "does not mention" in outcome.reason) for outcome in outcomes] == [(False, True)]


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (answer("400 Bad Request", body=b"no"), Permanent),
        (answer("413 Too Large"), Permanent),
        (answer("503 Busy"), Retryable),
        (then_silent, Retryable),
        (hang_up, Retryable),
    ],
)
async def test_store_faults(script: Script, error: type[Exception], study_uid: str) -> None:
    with hostile(script) as url:
        client = DicomwebClient(DicomwebConfig(url=url, store_timeout_s=0.4))
        with pytest.raises(error):
            await client.store([one_file()], study_uid)
        await client.aclose()


@pytest.mark.parametrize(
    ("script", "error", "told"),
    [
        (answer("200 OK", body=b"<html>"), Permanent, "not DICOM JSON"),
        (answer("200 OK", body=b'{"a": 1}'), Permanent, "not a list"),
        (answer("200 OK", body=b"[" + b" " * 5000 + b"]"), Permanent, "max_json_bytes"),
        (answer("200 OK", body=json.dumps([{"0020000D": {"Value": ["1.2"]}}]).encode()), Permanent, "does not page"),
        (then_silent, Retryable, "time limit"),
    ],
)
async def test_search_faults(script: Script, error: type[Exception], told: str) -> None:
    with hostile(script) as url:
        client = DicomwebClient(DicomwebConfig(url=url, read_timeout_s=0.4, page_size=1, max_json_bytes=4000))
        with pytest.raises(error, match=told):
            await client.search_studies({})
        await client.aclose()


async def test_tls_is_checked_and_the_client_certificate_shown(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = [*SELF_SIGNED, "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=cert)
    context.load_cert_chain(cert, key)
    context.verify_mode = ssl.CERT_REQUIRED

    def secured(peer: socket.socket) -> None:
        with context.wrap_socket(peer.dup(), server_side=True) as inner:
            request = read_request(inner)
            inner.sendall(HEAD + (b"[]" if b"GET /dicom-web/studies?" in request else PART + b"--b1--"))

    with hostile(secured) as url:
        secure = url.replace("http:", "https:")
        trusting = DicomwebClient(DicomwebConfig(url=secure, ca_file=cert, client_cert_file=cert, client_key_file=key))
        assert len((await trusting.fetch_study(ANY_UID, tmp_path / "study")).files) == 1
        assert "answers" in await trusting.probe()
        stranger = DicomwebClient(DicomwebConfig(url=secure))
        for call in (stranger.probe(), stranger.fetch_study(ANY_UID, tmp_path / "other")):
            with pytest.raises(Permanent, match="not trusted"):
                await call
        await trusting.aclose()
        await stranger.aclose()
